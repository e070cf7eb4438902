# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The output folder has the files that the page lists. A run that a mistake ends leaves no folder
without a result.
"""

import os
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from engine_runs import FASTER_RCNN, launch, read_log

from vovnet_d2.engine.output_folder import discard_on_mistake
from vovnet_d2.errors import UserValueError
from vovnet_d2.made import note_made, note_run

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


def fail(folder: str | Path, act: Callable[[], object] = lambda: None) -> None:
    """Let a run with this ``OUTPUT_DIR`` end with a mistake of the user, after ``act``."""

    @discard_on_mistake(CfgNode({"OUTPUT_DIR": str(folder)}))
    def run() -> None:
        act()
        raise UserValueError("A mistake.")

    with pytest.raises(UserValueError, match=r"^A mistake\.$"):
        run()


def begin(out: Path, **files: str) -> None:
    """Write what a run begins with, and other files, whose names have "__" for a dot."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("a") as log:
        log.write("a line\n")
    note_run(out)
    for name, content in files.items():
        (out / name.replace("__", ".")).write_text(content)


def test_a_mistake_before_the_folder_is_made_is_told(tmp_path: Path) -> None:
    fail(tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["new/out", "runs/../out", "runs/../new/out"])
@pytest.mark.parametrize("files", [{}, {"metrics__json": ""}, {"log__txt__rank1": "a line"}])
def test_what_a_failed_run_begins_with_is_removed(
    tmp_path: Path, name: str, files: dict[str, str]
) -> None:
    fail(tmp_path / name, lambda: begin(tmp_path / name, **files))
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["out", "runs/../out", "link/../out"])
def test_a_folder_that_existed_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Fail in an empty folder and in the folder of a run. ``runs`` does not exist before, and
    ``link`` leads to a folder elsewhere."""
    monkeypatch.chdir(tmp_path)
    for folder in (Path("out"), Path("far/out"), Path("far/away")):
        folder.mkdir(parents=True)
    Path("link").symlink_to("far/away")
    here = Path(name).resolve()
    fail(name, lambda: os.makedirs(name, exist_ok=True))
    assert here.is_dir()
    begin(here)
    fail(name, lambda: begin(Path(name)))
    assert (here / "log.txt").read_text() == "a line\na line\n"


@pytest.mark.parametrize(
    "kept",
    [
        *("notes.txt", "notes_without_a_line", "config.yaml", "inference/coco.json"),
        *("log.txt.before", "log.txt.rank1.before", "metrics.json", "model_final.pth"),
    ],
)
def test_a_folder_with_anything_else_stays(tmp_path: Path, kept: str) -> None:
    """Let a run write a log, and somebody else or an evaluation another file."""
    out, content = tmp_path / "out", "" if kept == "notes_without_a_line" else "written by hand"

    def act() -> None:
        begin(out)
        (out / kept).parent.mkdir(exist_ok=True)
        (out / kept).write_text(content)

    fail(out, act)
    assert (out / "log.txt").read_text() == "a line\n"
    assert (out / kept).read_text() == content


def test_a_folder_where_another_run_has_begun_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def wait() -> None:  # as a run does that downloads weights
        begin(out)
        begin(out, config__yaml="SEED: 1\n")  # the other run
        note_made(out / "config.yaml")

    fail(out, wait)
    assert (out / "config.yaml").read_text() == "SEED: 1\n"
    assert (out / "log.txt").read_text() == "a line\n" * 2


def test_a_folder_that_cannot_be_removed_does_not_hide_the_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", unlink)
    fail(tmp_path / "out", lambda: begin(tmp_path / "out"))
    assert (tmp_path / "out" / "log.txt").is_file()
