# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The import of the package with other packages, and without Detectron2."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vovnet_d2

PACKAGE = Path(vovnet_d2.__file__).parent
PUBLIC = {"VOVNET_SPECS", "VoVNet", "VoVNetSpec", "add_vovnet_config", "get_config_file"}


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code in another Python process, which finds modules in ``folder`` and the package."""
    path = os.pathsep.join([str(folder), str(PACKAGE.parent)])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_public_names():
    assert set(vovnet_d2.__all__) >= PUBLIC
    assert all(hasattr(vovnet_d2, name) for name in vovnet_d2.__all__)


def test_without_detectron2(tmp_path):
    result = run("import sys; sys.modules['detectron2'] = None; import vovnet_d2", tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "ModuleNotFoundError: vovnet_d2 needs Detectron2, which is not on PyPI: run "
        "`vovnet-install-detectron2`, or `python tools/install_detectron2.py` in vovnet_d2's "
        "repository."
    )


def test_a_missing_requirement_of_detectron2_is_named(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("import fvcore_is_missing")
    result = run("import vovnet_d2", tmp_path)
    assert result.returncode == 1
    assert "install_detectron2" not in result.stderr
    assert "No module named 'fvcore_is_missing'" in result.stderr.splitlines()[-1]


OTHER_PACKAGE = """
from detectron2.modeling import BACKBONE_REGISTRY

@BACKBONE_REGISTRY.register()
def build_vovnet_backbone(cfg, input_shape): ...

@BACKBONE_REGISTRY.register()
def build_vovnet_fpn_backbone(cfg, input_shape): ...
"""

AFTER_ANOTHER_PACKAGE = """
import other_package
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
import vovnet_d2

def owners():
    return [BACKBONE_REGISTRY.get(f"build_{name}_backbone").__module__.split(".")[0]
            for name in ("vovnet", "vovnet_fpn", "retinanet_vovnet_fpn", "fcos_vovnet_fpn")]

print(owners())
try:
    vovnet_d2.add_vovnet_config(get_cfg())
except KeyError as error:
    print(error.args[0])
vovnet_d2.register_backbones()
print(owners())
vovnet_d2.register_backbones(override=True)
print(owners())
cfg = get_cfg()
vovnet_d2.add_vovnet_config(cfg)
print(cfg.MODEL.VOVNET.CONV_BODY)
"""


NEW_MODULES = """
import sys
before = set(sys.modules)
import vovnet_d2
print(*sorted(set(sys.modules) - before))
import vovnet_d2.data
print(*sorted(set(sys.modules) - before))
"""

# Each code runs in a child of a process that has imported Detectron2, which takes seconds.
CHILDREN = f"""
import os, sys
import detectron2.modeling

for code in {[AFTER_ANOTHER_PACKAGE, NEW_MODULES]}:
    if os.fork() == 0:
        exec(code, {{}})
        sys.exit()
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the printed lines of both codes."""
    folder = tmp_path_factory.mktemp("other_package")
    (folder / "other_package.py").write_text(OTHER_PACKAGE)
    result = run(CHILDREN, folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_another_package_has_registered_the_names(lines: list[str]) -> None:
    first, message, unchanged, overridden, variant = lines[:5]
    assert first == unchanged == str(["other_package"] * 2 + ["vovnet_d2"] * 2)
    assert message == (
        "Registered by another package before vovnet_d2 was imported: build_vovnet_backbone (by "
        "other_package), build_vovnet_fpn_backbone (by other_package). To use vovnet_d2's, call "
        "vovnet_d2.register_backbones(override=True) before add_vovnet_config(cfg); to keep "
        "theirs, do not call add_vovnet_config."
    )
    assert overridden == str(["vovnet_d2"] * 4)
    assert variant == "V-39-eSE"


def test_code_for_training_and_evaluation_is_not_imported(lines: list[str]) -> None:
    modules, with_data = (line.split() for line in lines[5:])
    own = {tuple(name.split(".")[:2]) for name in modules if name.startswith("vovnet_d2.")}
    late = {"predictor", "engine", "data", "analysis", "benchmark", "export", "demo"}
    assert ("vovnet_d2", "modeling") in own
    assert not {part for _, part in own} & late
    others = {name.split(".")[0] for name in modules} - {"vovnet_d2", "detectron2", "fvcore"}
    assert not others & {"matplotlib", "scipy", "sklearn", "cv2", "timm", "onnx", "huggingface_hub"}
    assert "torchvision.models.feature_extraction" not in modules
    assert "vovnet_d2.data.digits" in with_data
    assert "sklearn" not in with_data


# Rules of the structure


def imported_by(file: Path) -> set[str]:
    """Return the absolute names of all imports in a file, also inside functions."""
    package = (PACKAGE.name, *file.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


MODELING = sorted((PACKAGE / "modeling").rglob("*.py"))


def test_modeling_does_not_import_its_users():
    users = ("checkpoint", "data", "engine", "analysis", "benchmark", "export")
    above = {f"vovnet_d2.{user}" for user in users}
    imported = [(file.name, name) for file in MODELING for name in imported_by(file)]
    assert len(imported) > len(MODELING) > 20
    assert [pair for pair in imported if ".".join(pair[1].split(".")[:2]) in above] == []


def test_only_the_builders_read_a_config():
    """Check where functions take a config.

    Only ``from_config`` is allowed elsewhere, which Detectron2's ``configurable`` calls.
    """
    readers = {
        (file.name, node.name)
        for file in MODELING
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(arg.arg == "cfg" for arg in all_arguments(node))
    }
    others = {(file, name) for file, name in readers if file != "build.py"}
    assert others < readers
    assert {pair for pair in others if not pair[1].endswith("from_config")} == set()


def all_arguments(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def test_layouts_are_read_without_the_package():
    assert {name.split(".")[0] for name in imported_by(PACKAGE / "layouts.py")} <= {
        *sys.stdlib_module_names
    }
