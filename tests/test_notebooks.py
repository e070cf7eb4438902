# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The notebooks in docs/notebooks run from start to end, with small settings."""

import inspect
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("ipykernel", reason="ipykernel has no release for Python 3.10")
import nbformat
from nbclient import NotebookClient

from vovnet_d2.data import build_digits

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SMALL = {"first_training": {"EPOCHS": "0.4"}, "own_data": {"EPOCHS": "1", "IMAGES": "16"}}
"""Settings in the first cell of each notebook that make the run short."""


def write_few_digits(root: Path) -> None:
    """Write a small digits data set in place of the whole one, which takes long to build."""
    folder = build_digits(root, num_train=120, num_val=20)
    made = json.loads((folder / "recipe.json").read_text())
    parameters = inspect.signature(build_digits).parameters
    made["recipe"]["images"] = {s: parameters[f"num_{s}"].default for s in ("train", "val")}
    (folder / "recipe.json").write_text(json.dumps(made))


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in SMALL[path.stem].items():
        settings.source, count = re.subn(
            rf"^{name} = .*$", f"{name} = {value}", settings.source, flags=re.MULTILINE
        )
        assert count == 1
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    write_few_digits(tmp_path / "datasets")
    text = printed(run(path, tmp_path))
    assert len(re.findall(r"^\S+ \d+% at \[\d+, \d+, \d+, \d+\]$", text, re.MULTILINE)) > 0
    assert re.search(r"^\| \S+ +\| bbox ", text, re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") for cell in cells)
