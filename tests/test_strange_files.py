# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of users stay unchanged in all folders that this package writes to."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import check_dataset
import convert_weights
import measure_convolutions
import plot_connectivity
import pytest
import torch
from engine_runs import FASTER_RCNN, launch, read_log
from export_models import MASK_RCNN, OPTIONS, run_export
from report_runs import CLASSES, DATASET, write_run

from vovnet_d2 import VoVNet, VoVNetCheckpointer
from vovnet_d2.atomic import atomic_write
from vovnet_d2.benchmark.command import make_folder
from vovnet_d2.benchmark.report import FILES
from vovnet_d2.demo.outputs import refuse_overwriting
from vovnet_d2.engine import data_pictures_command, load_config
from vovnet_d2.engine.output_folder import choose_folder, keep_earlier_run
from vovnet_d2.made import LIST_NAME, is_made_here, note_made, note_run, refuse_foreign
from vovnet_d2.report import write_page

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.usefixtures("equal_curves_are_drawn_once")

STRANGE = b"somebody else's"
Write = Callable[[Path], object]


def read_all(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LIST_NAME
    }


# Tools that write to a given folder ---------------------------------------------------------------


def write_connectivity(folder: Path) -> None:
    words = ["OSA-5x43", "--output", str(folder)]
    plot_connectivity.run(plot_connectivity.argument_parser().parse_args(words))


def write_convolutions(folder: Path) -> None:
    words = ["--channels", "128", "--size", "4", "--warmup", "1", "--repeats", "2"]
    parser = measure_convolutions.argument_parser()
    measure_convolutions.run(parser.parse_args([*words, "--output", str(folder)]))


def write_export(folder: Path) -> None:
    words = ["--config-file", MASK_RCNN, "--part", "backbone", "--format", "torchscript"]
    words += ["--allow-partial", "--sizes", "64x64", "--output", str(folder), "--opts"]
    options = {key: value for key, value in OPTIONS.items() if key != "MODEL.DEVICE"}
    run_export([*words, *(str(word) for pair in options.items() for word in pair)])


def write_report_page(folder: Path) -> None:
    write_page(folder.parent / "run", folder / "report.html")


def write_data_report(folder: Path) -> None:
    data = folder.parent
    words = ["--train-json", str(data / "truth.json"), "--train-images", str(data / "images")]
    words += ["--json", str(folder / "report.json"), "--fix", str(folder / "fixed.json")]
    if check_dataset.main(words) == 2:
        raise ValueError


def write_weights(folder: Path) -> None:
    torch.save(VoVNet("V-19-slim-dw-eSE", norm="BN").state_dict(), folder.parent / "in.pth")
    words = [str(folder.parent / "in.pth"), str(folder / "out.pth")]
    convert_weights.run(convert_weights.argument_parser().parse_args(words))


def write_pictures(folder: Path) -> None:
    data_pictures_command.main(["annotations", str(folder), "--dataset", DATASET, "--number", "2"])


def write_sheet(folder: Path) -> None:
    data_pictures_command.main(
        ["annotations", str(folder / "sheet.png"), "--dataset", DATASET, "--number", "2"]
    )


TOOLS: dict[str, Write] = {
    function.__name__: function
    for function in (
        *(write_connectivity, write_convolutions, write_export, write_report_page),
        *(write_data_report, write_weights, write_pictures, write_sheet),
    )
}


@pytest.fixture
def run(catalogs: None, fresh_logging: None, tmp_path: Path) -> Iterator[Path]:
    """Write a run and its data set ``shapes`` next to the folder that tools write to."""
    return write_run(tmp_path, classes={key: f"class {key}" for key in CLASSES})


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_keeps_strange_files(tool: str, run: Path, tmp_path: Path) -> None:
    """Put a file with another name, and single files with the names of outputs, into the folder."""
    write = TOOLS[tool]
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "notes.txt").write_bytes(STRANGE)
    write(folder)
    written = read_all(folder)
    assert written.pop("notes.txt") == STRANGE
    assert written
    for number, name in enumerate(written):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(STRANGE)
        with pytest.raises((ValueError, SystemExit)) as caught:
            write(folder)
        assert getattr(caught.value, "code", 2) == 2
        assert read_all(folder)[name] == STRANGE


def test_outputs_of_a_tool_are_written_again(run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        write_report_page(run)
        write_sheet(run)
    (run / "sheet.png").write_bytes(STRANGE)
    with pytest.raises(SystemExit, match="2"):
        write_sheet(run)
    assert (run / "sheet.png").read_bytes() == STRANGE


def test_the_demo_and_the_benchmark_refuse_strange_files(tmp_path: Path) -> None:
    (tmp_path / "drawn.jpg").write_bytes(STRANGE)
    with pytest.raises(ValueError, match=r"drawn\.jpg exists"):
        refuse_overwriting([tmp_path / "drawn.jpg"], [])
    for name in FILES:
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(STRANGE)
        with pytest.raises(ValueError, match=f"{name} exists"):
            make_folder(folder)


# Runs ---------------------------------------------------------------------------------------------


OF_A_RUN = (
    *("config.yaml", "results.json", "results.md", "loss_curve.png", "predictions.png"),
    *("metrics.json", "last_checkpoint", "checkpoints.json", "inference/predictions.json"),
    *("model_final.pth", "model_best.pth", "model_0000009.pth", "nonfinite_0000003.json"),
)


def test_a_training_keeps_strange_files(coco: Path, tmp_path: Path) -> None:
    names = ("notes.txt", "model_of_mine.pth", "a.123.partial", "mine/model_final.pth")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(STRANGE)
    options = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.CHECKPOINTS_KEPT", "1"]
    launch(FASTER_RCNN, tmp_path, *options, "DATASETS.TEST", "()", pictures=True)
    found = read_all(tmp_path)
    assert [found[name] for name in names] == [STRANGE] * len(names)
    # A run writes files with these names.
    assert {n for n in found if n not in names} <= {*OF_A_RUN, "log.txt", "model_0000002.pth"} | {
        name for name in found if name.startswith("events.out")
    }


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_folder_with_files_of_another_run(name: str, tmp_path: Path) -> None:
    strange = tmp_path / name
    strange.parent.mkdir(exist_ok=True)
    strange.write_bytes(STRANGE)
    folder = str(tmp_path)
    refused = rf"has {name.split('/')[0]}, which no run of this package wrote.*--resume"
    with pytest.raises(ValueError, match=refused):
        choose_folder(folder, training=True, resume=False)
    if name == "last_checkpoint":
        assert choose_folder(folder, training=True, resume=True) == folder
    else:  # nothing to resume
        with pytest.raises(ValueError, match=refused):
            choose_folder(folder, training=True, resume=True)
    evaluated = choose_folder(folder, training=False, resume=False)
    is_checkpoint = name.startswith(("model_", "nonfinite_"))
    assert evaluated == (folder if is_checkpoint else str(tmp_path / "evaluation"))
    if not is_checkpoint:
        again = choose_folder(folder, training=False, resume=True)
        assert again == str(tmp_path / "evaluation_2")
    note_run(tmp_path)
    assert choose_folder(folder, training=True, resume=False) == folder
    assert strange.read_bytes() == STRANGE


def test_a_checkpoint_that_was_replaced_is_not_pruned(tmp_path: Path) -> None:
    checkpointer = VoVNetCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), max_to_keep=1)
    checkpointer.save("model_0000000")
    checkpointer.save("model_0000001")
    assert not (tmp_path / "model_0000000.pth").exists()
    (tmp_path / "model_0000001.pth").write_bytes(STRANGE)
    checkpointer.save("model_0000002")
    assert (tmp_path / "model_0000001.pth").read_bytes() == STRANGE


def test_a_config_that_was_edited_is_copied(coco: Path, tmp_path: Path) -> None:
    options = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    launch(FASTER_RCNN, tmp_path, *options)
    config = tmp_path / "config.yaml"
    launch(FASTER_RCNN, tmp_path, *options)
    assert not (tmp_path / "config.yaml.before").exists()
    edited = config.read_bytes() + b"# a thought\n"
    config.write_bytes(edited)
    launch(str(config), tmp_path, *options)
    assert (tmp_path / "config.yaml.before").read_bytes() == edited
    assert b"a thought" not in config.read_bytes()


def test_a_training_keeps_files_of_the_earlier_training(coco: Path, tmp_path: Path) -> None:
    options = ["SOLVER.MAX_ITER", "1", "INPUT.MIN_SIZE_TEST", "32"]
    launch(FASTER_RCNN, tmp_path, *options)
    launch(FASTER_RCNN, tmp_path, "--eval-only", "--resume", *options)
    write_page(tmp_path)
    (tmp_path / "mine.txt").write_bytes(STRANGE)
    first = read_all(tmp_path)
    del first["mine.txt"]
    # In one case, files of the first training are the input of the second training.
    launch(str(tmp_path / "config.yaml"), tmp_path, "MODEL.WEIGHTS", f"{tmp_path}/model_final.pth")
    second = {n: c for n, c in read_all(tmp_path).items() if not n.startswith("earlier/")}
    assert second.pop("mine.txt") == STRANGE
    launch(FASTER_RCNN, tmp_path, *options)
    for folder, before in (("earlier", first), ("earlier_2", second)):
        kept = read_all(tmp_path / folder)
        assert kept.keys() == before.keys()
        logs = {name for name in before if name.endswith("log.txt")}
        assert {n: kept[n] for n in kept.keys() - logs} == {
            n: before[n] for n in before.keys() - logs
        }
        assert before["log.txt"] in kept["log.txt"]  # each training appends to the log
    assert {"report.html", "model_final.pth", "metrics.json", "evaluation/results.md"} <= set(first)
    # The moved training can be resumed in its new folder.
    launch(FASTER_RCNN, tmp_path / "earlier", "--resume", *options, "SOLVER.MAX_ITER", "2")
    assert f"Resumed from {tmp_path}/earlier/model_final.pth" in read_log(tmp_path / "earlier")


def test_files_that_the_training_reads_are_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Do not move weights that the training reads, also if ``?entry=`` chooses among them."""
    kept: list[str] = []
    module = sys.modules["vovnet_d2.engine.run"]  # in the package, the name is a function
    monkeypatch.setattr(module, "keep_earlier_run", lambda folder, files: kept.extend(files))
    monkeypatch.setattr(module, "default_setup", lambda config, args: None)
    (tmp_path / "config.yaml").touch()
    args = Namespace(config_file="", eval_only=False, resume=False)
    options = ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "a.pth?entry=model_ema"]
    cfg = load_config("", options)
    module._set_up_with_detectron2(cfg, cfg, args)
    assert kept == ["", "a.pth"]


def test_a_run_that_has_not_begun_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert keep_earlier_run(str(tmp_path)) == ""
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_strange_log_is_not_appended_to(coco: Path, tmp_path: Path) -> None:
    for name in ("log.txt", "log.txt.rank1"):
        (tmp_path / name).write_bytes(STRANGE)
    options = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    for flags in ([], ["--resume"]):
        launch(FASTER_RCNN, tmp_path, *flags, *options)
        for name in ("log.txt", "log.txt.rank1"):
            assert (tmp_path / f"{name}.before").read_bytes() == STRANGE
    assert "of 1 iterations are done" in read_log(tmp_path)
    assert not (tmp_path / "log.txt.before2").exists()


# The list of written files ------------------------------------------------------------------------


def test_a_strange_file_is_moved_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    for number in ("", "2"):
        path.write_bytes(STRANGE)
        with atomic_write(path) as partial:
            Path(partial).write_text("ours")
        assert path.read_text() == "ours"
        assert (tmp_path / f"results.md.before{number}").read_bytes() == STRANGE


def test_a_kill_while_a_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.md"
    with atomic_write(path) as partial:
        Path(partial).write_text("old")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as partial:
        Path(partial).write_text("new")
    assert path.read_text() == "old"
    assert is_made_here(path)


def test_files_are_recognised_by_their_contents(tmp_path: Path) -> None:
    """Change the beginning, the end or the size of a file, and move the folder."""
    path = tmp_path / "a" / "large"
    path.parent.mkdir()
    content = bytes(3 << 20)
    path.write_bytes(content)
    assert not is_made_here(path)
    note_made(path)
    path = path.parent.rename(tmp_path / "b") / "large"
    assert is_made_here(path)
    refuse_foreign([path, tmp_path / "nothing"])
    for other in (b"1" + content[1:], content[1:] + b"1", content + b"\0"):
        path.write_bytes(other)
        assert not is_made_here(path)
        with pytest.raises(ValueError, match="large exists, and is not as this package wrote it"):
            refuse_foreign([path])
    path.write_bytes(content)
    with open(path.parent / LIST_NAME, "a") as file:
        file.write('{"name": "lar')  # a kill has cut this line
    assert is_made_here(path)
