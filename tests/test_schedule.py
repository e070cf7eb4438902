# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The schedule that is computed from the number of images, the batch and the epochs."""

import json
import re
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from typing import Any

import detectron2
import pytest
import test_own_data
import torch
import yaml
from detectron2.data import DatasetCatalog
from detectron2.solver import build_lr_scheduler
from engine_runs import FASTER_RCNN, MASK_RCNN, RETINANET, TINY, launch, read_log
from test_own_data import BOTH, flags

from vovnet_d2 import get_config_file
from vovnet_d2.engine import Trainer, argument_parser, load_config, run
from vovnet_d2.engine.fitting import data_of, fit_to_data, keep_record
from vovnet_d2.engine.schedule import Row, fit_schedule, format_rows
from vovnet_d2.engine.written import find_written

pytest_plugins = ["engine_fixtures"]
digits = test_own_data.digits

ONE_X = "COCO-Detection/faster_rcnn_V_39_eSE_FPN_1x.yaml"
KEYS = ("MAX_ITER", "STEPS", "WARMUP_ITERS", "BASE_LR", "CHECKPOINT_PERIOD")
# Schedules computed by hand: config, images, batch, epochs, and the values of KEYS and
# TEST.EVAL_PERIOD. The 1x schedule has 90000 iterations with steps after 2/3 and 8/9 of them. The
# 3x schedule has 270000 iterations with steps after 7/9 and 25/27. Both have a warm-up of 1000
# iterations and a learning rate of 0.02 for 16 images.
BY_HAND: list[tuple[str, int, int, str | None, tuple[Any, ...]]] = [
    # 12 x sqrt(117266 / 205) = 287, so 100 epochs: 20,500 images.
    (ONE_X, 205, 2, None, (10250, (6833, 9111), 1000, 0.0025, 1025, 513)),
    (ONE_X, 205, 16, None, (1282, (855, 1140), 320, 0.02, 129, 65)),
    # Without weights, there are three times as many epochs: 159,300 images.
    (MASK_RCNN, 531, 4, None, (39825, (30975, 36875), 1000, 0.005, 3983, 1992)),
    # 12 x sqrt(117266 / 5000) = 58.1.
    (ONE_X, 5000, 16, None, (18125, (12083, 16111), 1000, 0.02, 1813, 907)),
    # With as many images as COCO or more, the number of epochs is that of COCO.
    (ONE_X, 117266, 16, None, (87950, (58633, 78178), 1000, 0.02, 5000, 7330)),
    (ONE_X, 1000000, 16, None, (750000, (500000, 666667), 1000, 0.02, 5000, 62500)),
    # 63 and 994 iterations would be 100 epochs.
    (ONE_X, 10, 16, None, (1000, (667, 889), 250, 0.02, 100, 50)),
    (ONE_X, 159, 16, None, (1000, (667, 889), 250, 0.02, 100, 50)),
    # The last batch is also full. No step is at the end.
    (ONE_X, 7, 2, "1/2", (2, (1,), 0, 0.0025, 1, 2)),
    (ONE_X, 205, 2, "3", (308, (205, 274), 77, 0.0025, 31, 103)),
    (ONE_X, 30, 3, "0.1", (1, (), 0, 0.00375, 1, 1)),
]


def fit(config: str, images: int, batch: int, epochs: str | None, *options: str) -> tuple[Any, Any]:
    words = ["SOLVER.IMS_PER_BATCH", str(batch), *options]
    base, given = find_written(config, words)
    cfg = load_config(config, words)
    number = None if epochs is None else Fraction(epochs)
    pretrained = bool(cfg.MODEL.WEIGHTS)
    rows = fit_schedule(cfg, base, given, num_images=images, epochs=number, pretrained=pretrained)
    return cfg, {row.key: row for row in rows}


def values(cfg: Any) -> tuple[Any, ...]:
    found = (*(cfg.SOLVER[key] for key in KEYS), cfg.TEST.EVAL_PERIOD)
    return tuple(round(value, 12) if isinstance(value, float) else value for value in found)


def test_schedules_equal_those_computed_by_hand() -> None:
    for config, images, batch, epochs, expected in BY_HAND:
        cfg, _ = fit(config, images, batch, epochs)
        assert values(cfg) == expected, (images, batch, epochs)


@pytest.mark.parametrize("iterations", range(1, 10))
def test_detectron2_takes_the_steps_of_a_very_short_training(iterations: int) -> None:
    cfg, _ = fit(ONE_X, 205, 2, None, "SOLVER.MAX_ITER", str(iterations))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    build_lr_scheduler(cfg, optimizer)
    assert len(cfg.SOLVER.STEPS) == len(
        {round(iterations * s) for s in (2 / 3, 8 / 9)} - {iterations}
    )


def test_given_values_are_kept() -> None:
    options = ["SOLVER.MAX_ITER", "900", "TEST.EVAL_PERIOD", "7"]
    cfg, rows = fit(ONE_X, 205, 2, None, *options)
    assert values(cfg) == (900, (600, 800), 225, 0.0025, 90, 7)
    assert rows["SOLVER.MAX_ITER"].reason == "set on the command line: 8.78 epochs"
    every = {"SOLVER.MAX_ITER": "9", "SOLVER.STEPS": "(2,)", "SOLVER.WARMUP_ITERS": "5"}
    every |= {"SOLVER.BASE_LR": "0.1", "SOLVER.CHECKPOINT_PERIOD": "4", "TEST.EVAL_PERIOD": "3"}
    cfg, rows = fit(ONE_X, 205, 2, None, *(word for pair in every.items() for word in pair))
    assert values(cfg) == (9, (2,), 5, 0.1, 4, 3)
    assert all(rows[key].reason.startswith("set on the command line") for key in every)


def test_without_data_to_evaluate_on_there_is_no_period() -> None:
    cfg, _ = fit(ONE_X, 205, 2, None, "DATASETS.TEST", "()")
    assert cfg.TEST.EVAL_PERIOD == 0


def test_a_cosine_schedule_keeps_its_ratio_and_has_no_steps() -> None:
    options = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]
    base, given = find_written(ONE_X, [])
    base.SOLVER.BASE_LR_END = 0.002
    cfg = load_config(ONE_X, [*options, "SOLVER.IMS_PER_BATCH", "4"])
    rows = fit_schedule(cfg, base, given, num_images=205)
    assert "SOLVER.STEPS" not in {row.key for row in rows}
    assert pytest.approx(0.1) == cfg.SOLVER.BASE_LR_END / cfg.SOLVER.BASE_LR


def test_several_processes_share_the_batch() -> None:
    """Use a config for 8 GPUs on 2 GPUs, which gives a batch of 4."""
    cfg = Trainer.auto_scale_workers(load_config(ONE_X, ["SOLVER.REFERENCE_WORLD_SIZE", "8"]), 2)
    assert cfg.SOLVER.IMS_PER_BATCH == 4
    base, given = find_written(ONE_X, ["SOLVER.REFERENCE_WORLD_SIZE", "8"])
    fit_schedule(cfg, base, given, num_images=205)
    assert values(cfg) == values(fit(ONE_X, 205, 4, None)[0])


@pytest.mark.parametrize(
    ("images", "iterations", "warned"),
    [
        (205, 100, True),
        (205, 103, False),
        (200, 100, False),  # one epoch
        (205, 30750, False),
        (205, 30751, True),
    ],
)
def test_an_unusual_number_of_epochs_is_a_warning(
    caplog: pytest.LogCaptureFixture, images: int, iterations: int, warned: bool
) -> None:
    fit(ONE_X, images, 2, None, "SOLVER.MAX_ITER", str(iterations))
    assert (
        f"The number of iterations, {iterations} (set on the command line), makes" in caplog.text
    ) == warned


# Values that users set


def test_files_of_users_are_recognised(tmp_path: Path) -> None:
    middle = tmp_path / "middle.yaml"
    inherited = "SOLVER: {IMS_PER_BATCH: 4}\nTEST: {EVAL_PERIOD: 50}\n"
    middle.write_text(f"_BASE_: [{get_config_file(ONE_X)}]\n{inherited}")
    last = tmp_path / "last.yaml"
    last.write_text(
        "_BASE_: middle.yaml\nSOLVER:\n  STEPS: !!python/tuple [1]\nTEST: {EVAL_PERIOD: 90}\n"
    )
    base, given = find_written(str(last), ["SEED", "3"])
    assert given == {
        "SOLVER.IMS_PER_BATCH": f"set in {middle}",
        "SOLVER.STEPS": f"set in {last}",
        "TEST.EVAL_PERIOD": f"set in {last}",
        "SEED": "set on the command line",
    }
    assert base == load_config(ONE_X)
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "Base-RCNN-FPN.yaml"
    for known in (ONE_X, str(zoo)):
        assert find_written(known, []) == (load_config(known), {})
    alone = tmp_path / "alone.yaml"
    alone.write_text("SOLVER: {MAX_ITER: 7}\n")
    assert find_written(str(alone), []) == (load_config(), {"SOLVER.MAX_ITER": f"set in {alone}"})


def test_the_learning_rate_is_scaled_from_its_batch(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"_BASE_: {get_config_file(ONE_X)}\nSOLVER: {{IMS_PER_BATCH: 4}}\n")
    base, given = find_written(str(file), [])
    cfg = load_config(str(file))
    rows = fit_schedule(cfg, base, given, num_images=205)
    assert cfg.SOLVER.BASE_LR == 0.02 / 4
    assert re.search(r"SOLVER\.IMS_PER_BATCH +16 +4 +set in ", format_rows(rows))


# The command line


def launch_own(root: Path, out: Path, *words: str, options: list[str]) -> dict[str, Any]:
    options = [*options, "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(96,)"]
    config = ["--config-file", FASTER_RCNN, *flags(root, *BOTH), *words]
    return run(argument_parser().parse_args([*config, *options, "OUTPUT_DIR", str(out)]))


def without(options: list[str], *keys: str) -> list[str]:
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in keys for word in pair]


@pytest.mark.slow
def test_epochs_on_the_command_line_and_a_resumption_with_more_data(
    catalogs: None,
    fresh_logging: None,
    digits: Path,
    tmp_path: Path,
) -> None:
    """Train for half an epoch: 12 of the 14 images have objects, so these are 3 batches of 2."""
    free = without(TINY, "SOLVER.MAX_ITER", "SOLVER.BASE_LR", "TEST.EVAL_PERIOD")
    out = tmp_path / "out"
    launch_own(digits, out, "--epochs", "0.5", options=free)
    log = read_log(out)
    assert log.count("Values fitted to the 12 training images:") == 1
    assert re.search(r"SOLVER\.MAX_ITER +270000 +3 +0\.5 epochs \(--epochs\)\n", log)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["SOLVER"]["MAX_ITER"], saved["SOLVER"]["BASE_LR"]) == (3, 0.0025)
    assert saved["TEST"]["EVAL_PERIOD"] == 3

    more = json.loads((digits / "train.json").read_text())
    for number in range(3):
        image = more["images"][-1] | {"id": 900 + number}
        found = [a for a in more["annotations"] if a["image_id"] == more["images"][-1]["id"]]
        more["images"].append(image)
        more["annotations"] += [
            a | {"image_id": image["id"], "id": 10000 * (number + 1) + a["id"]} for a in found
        ]
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "train.json").write_text(json.dumps(more))
    (changed / "val.json").write_text((digits / "val.json").read_text())
    (changed / "vovnet_d2_digits").symlink_to(digits / "vovnet_d2_digits")
    launch_own(changed, out, "--resume", "--epochs", "1", options=free)
    log = read_log(out)
    assert "have 15 images, and had 12 when this training began" in log
    assert yaml.safe_load((out / "config.yaml").read_text())["SOLVER"]["MAX_ITER"] == 6
    launch_own(changed, tmp_path / "anew", "--epochs", "1", options=free)
    anew = yaml.safe_load((tmp_path / "anew" / "config.yaml").read_text())
    assert anew["SOLVER"]["MAX_ITER"] == 8  # 15 images


def test_epochs_of_a_data_set_of_detectron2(coco: Path, tmp_path: Path) -> None:
    free = without(TINY, "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH")
    words = ["SOLVER.IMS_PER_BATCH", "1"]
    args = ["--config-file", RETINANET, "--epochs", "1", *free, *words, "MODEL.DEVICE", "cpu"]
    run(argument_parser().parse_args([*args, "OUTPUT_DIR", str(tmp_path)]))
    log = read_log(tmp_path)
    number = json.loads((tmp_path / "fitted.json").read_text())["images"]
    assert f"Values fitted to the {number} training images" in log
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["SOLVER"]["MAX_ITER"] == number
    # A new training in the folder that fits no schedule removes the record of the earlier one.
    before = read_log(tmp_path)
    launch(RETINANET, tmp_path)
    assert "Values fitted" not in read_log(tmp_path).removeprefix(before)
    assert not (tmp_path / "fitted.json").exists()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "1/0", "many", ""])
def test_epochs_are_a_number_above_0(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        argument_parser().parse_args([f"--epochs={text}"])
    assert "is no number above 0, such as 12 or 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.MAX_ITER", "5"], "--epochs and SOLVER.MAX_ITER both say how long"),
        (["--eval-only"], "--epochs is for a training: leave it out with --eval-only"),
    ],
)
def test_contradictions(coco: Path, tmp_path: Path, words: list[str], message: str) -> None:
    options = [*without(TINY, "SOLVER.MAX_ITER"), "MODEL.DEVICE", "cpu"]
    options += ["OUTPUT_DIR", str(tmp_path)]
    before, after = (words, []) if words[0].startswith("--") else ([], words)
    args = ["--config-file", FASTER_RCNN, "--epochs", "2", *before, *options, *after]
    with pytest.raises(ValueError, match=message):
        run(argument_parser().parse_args(args))


def test_a_record_that_cannot_be_read(catalogs: None, tmp_path: Path) -> None:
    cfg = load_config(ONE_X, ["OUTPUT_DIR", str(tmp_path)])
    (tmp_path / "fitted.json").write_text("[]")
    args = Namespace(epochs=Fraction(1), fit_anchors=False)
    with pytest.raises(ValueError, match="does not say how many images"):
        fit_to_data(cfg, args, lambda: find_written(ONE_X, []), data_of(cfg), resuming=True)


def test_only_records_of_earlier_trainings_are_removed(tmp_path: Path) -> None:
    """Check that a new training removes an old record, and keeps a user's file of that name."""
    out, file = str(tmp_path), tmp_path / "fitted.json"
    keep_record(out, {"images": 3}, anew=True)
    keep_record(out, None, anew=False)
    assert json.loads(file.read_text()) == {"images": 3}
    keep_record(out, None, anew=True)
    assert not file.exists()
    file.write_text("mine")
    keep_record(out, None, anew=True)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(("leaves_out", "number"), [("True", 1), ("False", 2)])
def test_images_that_training_leaves_out_do_not_count(
    catalogs: None, leaves_out: str, number: int
) -> None:
    records = [{"annotations": [{"iscrowd": 0}]}, {"annotations": []}]
    DatasetCatalog.register("mine", lambda: records)
    options = ["DATASETS.TRAIN", "('mine',)", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", leaves_out]
    assert len(data_of(load_config(ONE_X, options)).load()) == number


def test_a_resumed_training_keeps_its_epochs(catalogs: None, tmp_path: Path) -> None:
    """Resume with different records of earlier trainings. An epoch has 20 batches of 16 images."""

    def fit_again(record: dict[str, Any], epochs: str | None, *options: str) -> tuple[int, Any]:
        (tmp_path / "fitted.json").write_text(json.dumps(record))
        cfg = load_config(ONE_X, [*options, "OUTPUT_DIR", str(tmp_path)])
        args = Namespace(epochs=None if epochs is None else Fraction(epochs), fit_anchors=False)
        data = data_of(cfg)._replace(load=lambda: [{}] * 320)
        fit_to_data(cfg, args, lambda: find_written(ONE_X, options), data, resuming=True)
        return cfg.SOLVER.MAX_ITER, args.fitted

    began = {"images": 320, "epochs": "5/2"}
    assert fit_again({"images": 320}, "2.5") == (50, began)
    assert fit_again(began, None) == (50, began)
    assert fit_again(began, "4") == (80, began | {"epochs": "4"})
    assert fit_again(began, None, "SOLVER.MAX_ITER", "7") == (7, {"images": 320})
    for wrong in ("0", "many", "1/0", None):
        with pytest.raises(ValueError, match="does not say how many images"):
            fit_again(began | {"epochs": wrong}, None)


def test_the_table_fits_a_terminal() -> None:
    octaves = [[32.0, 40.31747, 50.79684], [64.0, 80.63495, 101.59367]] * 3
    rows = [
        Row("SOLVER.MAX_ITER", 90000, 10250, "100 epochs"),
        Row("MODEL.ANCHOR_GENERATOR.SIZES", octaves, octaves, "k-means over all boxes: " * 9),
        Row("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0]] * 5, [[0.52, 1]] * 5, "likewise"),
    ]
    lines = format_rows(rows).splitlines()
    assert max(map(len, lines)) <= 170
    assert re.search(r"ASPECT_RATIOS +\[\[0\.5, 1\]\] +\[\[0\.52, 1\]\] +likewise", lines[-1])
    assert "40.32" in "".join(lines)
