# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Classes of errors that a user can correct, and how their messages reach the user."""

import argparse
import ast
import builtins
import importlib
import pickle
import pkgutil
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

import vovnet_d2
from vovnet_d2 import errors
from vovnet_d2.engine import launch
from vovnet_d2.errors import UserError, UserKeyError

ROOT = Path(__file__).parents[1]
BUILT_IN = {"FileNotFoundError", "ImportError", "KeyError", "ModuleNotFoundError", "ValueError"}
# These files run without the package.
APART = {"tools/doctor.py", "tools/install_detectron2.py", "vovnet_d2/__init__.py"}
MESSAGE = "There is no key 'A.B': write\nA.C, or UserKeyError: leave it out."


def find_kinds() -> list[type[UserError]]:
    for module in pkgutil.iter_modules(vovnet_d2.__path__, "vovnet_d2."):
        importlib.import_module(module.name)
    importlib.import_module("vovnet_d2.engine.run")
    found: list[type[UserError]] = [UserError]
    for kind in found:
        found += kind.__subclasses__()
    return found


KINDS = find_kinds()


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise UserKeyError(MESSAGE)


def find_raised(file: Path) -> list[str]:
    """Return the lines of a file that raise a built-in error."""
    return [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id in BUILT_IN
    ]


def test_no_built_in_error_is_raised() -> None:
    """Find lines that raise a built-in error, which tools would show with its traceback."""
    files = [file for folder in ("tools", "vovnet_d2") for file in (ROOT / folder).rglob("*.py")]
    raised = [line for file in files for line in find_raised(file)]
    assert [line for line in raised if line.partition(":")[0] not in APART] == []
    assert any(line.startswith("vovnet_d2/__init__.py") for line in raised)


def test_all_kinds_are_found() -> None:
    names = {kind.__name__ for kind in KINDS}
    assert {"UserValueError", "FileNotWrittenError", "GpuMemoryError"} <= names
    assert {"TrainingDivergedError", "UnreadableImageError"} <= names


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_survive_the_way_to_another_process(kind: type[UserError]) -> None:
    sent = pickle.loads(pickle.dumps(kind(MESSAGE)))
    assert type(sent) is kind
    assert str(sent) == sent.sentence == MESSAGE


@pytest.mark.parametrize(
    "name", ["UserFileNotFoundError", "UserImportError", "UserKeyError", "UserValueError"]
)
def test_our_errors_are_caught_as_built_in_errors(name: str) -> None:
    with pytest.raises(getattr(builtins, name.removeprefix("User"))):
        raise getattr(errors, name)(MESSAGE)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_sentence_of_a_worker_is_shown_alone(
    start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = DataLoader(Broken(), num_workers=1, multiprocessing_context=start)
    with pytest.raises(SystemExit) as caught:
        launch.run_or_exit(lambda args: list(loader), argparse.Namespace())
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {MESSAGE}\n"


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (KeyError("no\nheight."), "KeyError: no height"),
        (
            OSError(2, "No such file", "a.json"),
            "FileNotFoundError: [Errno 2] No such file: 'a.json'",
        ),
        (AssertionError(), "AssertionError"),
        (errors.UserKeyError("There is no 'A'."), "There is no 'A'"),
    ],
)
def test_errors_are_described_in_one_line(error: Exception, described: str) -> None:
    assert errors.describe(error) == described
