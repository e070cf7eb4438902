# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The output folder has the files that the page lists. A run that a mistake ends leaves no folder
without a result.
"""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from engine_runs import FASTER_RCNN, launch, read_log

from vovnet_d2.engine.output_folder import discard_on_mistake
from vovnet_d2.errors import UserValueError

pytest_plugins = ["engine_fixtures"]

GONE = ["MODEL.WEIGHTS", "gone.pth"]


def test_the_page_lists_the_files_of_a_training(coco: Path, tmp_path: Path) -> None:
    """Compare the table with the folder, in both directions."""
    page = (Path(__file__).parents[1] / "docs" / "first_training.md").read_text()
    table = page.partition("| file | what it is |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if "`" in line]
    listed = [name.rstrip("/") for cell in cells for name in re.findall("`([^`]+)`", cell)]
    patterns = [re.sub(r"\d{7}", "[0-9]" * 7, name) for name in listed]

    options = ["SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1"]
    launch(FASTER_RCNN, tmp_path, *options, pictures=True)
    found = {path.name for path in tmp_path.iterdir()}
    assert [name for name in found if not any(fnmatch(name, each) for each in patterns)] == []
    # These files need data of the user's or a tracker.
    elsewhere = {"annotations_train.json", "annotations_val.json", "fitted.json", "loggers.json"}
    assert {each for each in patterns if not any(fnmatch(n, each) for n in found)} == elsewhere


@pytest.mark.parametrize(
    "words",
    [["--eval-only"], ["--eval-only", *GONE], GONE, ["MODEL.BACKBONE.FREEZE_AT", "2"]],
    ids=["evaluation without weights", "evaluation", "training", "frozen without weights"],
)
def test_the_folders_that_a_failed_run_made_are_removed(
    coco: Path, tmp_path: Path, words: list[str]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)):
        launch(FASTER_RCNN, tmp_path / "new" / "out", *words)
    assert [*tmp_path.iterdir()] == []


def test_a_run_after_a_failed_run_has_its_log(coco: Path, tmp_path: Path) -> None:
    """Train in the folder that a failed run has made, then fail to evaluate there."""
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError):
        launch(FASTER_RCNN, out, *GONE)
    launch(FASTER_RCNN, out)
    assert "Starting training from iteration 0" in read_log(out)
    before = sorted(out.rglob("*"))
    with pytest.raises(FileNotFoundError):
        launch(FASTER_RCNN, out, "--eval-only", *GONE)
    assert sorted(out.rglob("*")) == before


def test_a_mistake_before_the_folder_is_made_is_told(tmp_path: Path) -> None:
    class Config:
        OUTPUT_DIR = str(tmp_path / "out")

    with pytest.raises(UserValueError), discard_on_mistake(Config()):  # type: ignore[arg-type]
        raise UserValueError("A mistake.")


@pytest.mark.parametrize("kept", ["notes.txt", "config.yaml", "inference/coco.json"])
def test_a_folder_with_anything_else_stays(tmp_path: Path, kept: str) -> None:
    """Let a run write a log, and somebody else or an evaluation another file."""
    out = tmp_path / "out"

    class Config:
        OUTPUT_DIR = str(out)

    def fail() -> None:
        (out / kept).parent.mkdir(parents=True)
        (out / "log.txt").write_text("a line")
        (out / kept).write_text("written by hand")
        raise UserValueError("A mistake.")

    with pytest.raises(UserValueError), discard_on_mistake(Config()):  # type: ignore[arg-type]
        fail()
    assert (out / "log.txt").read_text() == "a line"
    assert (out / kept).read_text() == "written by hand"
