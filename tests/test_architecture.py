# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The import rules of pyproject.toml notice an import that they forbid."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter has no release for Python 3.10")

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the Python files of the package and of the rules."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        ROOT / "vovnet_d2", folder / "vovnet_d2", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def check_imports(folder: Path) -> tuple[int, str]:
    """Return the exit status of the import check and what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", LINT_IMPORTS],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


FORBIDDEN = {
    "modeling.vovnet": "data.mapper",
    "modeling.fusion": "modeling.single_shot.layers",
    "analysis.report": "benchmark.report",
    "checkpoint.reading": "data.image_file",
    "engine.trainer": "predictor",
    "engine.loggers": "analysis.observe",
    "engine.schedule": "modeling.baselines.cifar",
    "words": "config",
}


def test_forbidden_imports_and_a_new_package_are_noticed(copy: Path) -> None:
    """Check the package as it is, and then with forbidden imports.

    These imports are inside functions, where the rules hold, too. A check takes seconds, so one
    check must find all of them."""
    status, printed = check_imports(copy)
    assert status == 0, printed
    assert " 0 broken" in printed
    for module, imported in FORBIDDEN.items():
        file = copy / "vovnet_d2" / Path(*module.split(".")).with_suffix(".py")
        with file.open("a", encoding="utf-8") as source:
            source.write(f"\n\ndef late():\n    import vovnet_d2.{imported}\n")
    (copy / "vovnet_d2" / "attic.py").write_text("")
    status, printed = check_imports(copy)
    assert status == 1
    for module, imported in FORBIDDEN.items():
        assert f"vovnet_d2.{module} -> vovnet_d2.{imported}" in printed
    assert "attic" in printed
