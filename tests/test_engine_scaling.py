# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import logging
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.utils import comm

from vovnet_d2.engine import detection, load_config
from vovnet_d2.engine.scaling import report_scaling, scale_to_batch, warn_of_unscaled_batch
from vovnet_d2.engine.schedule import Row

# Values by hand for the 3x schedule, which is for 16 images per step.
WRITTEN = {"BASE_LR": 0.02, "MAX_ITER": 270000, "STEPS": (210000, 250000), "WARMUP_ITERS": 1000}
FOR_2 = {"BASE_LR": 0.0025, "MAX_ITER": 2160000, "STEPS": (1680000, 2000000), "WARMUP_ITERS": 8000}
FOR_64 = {"BASE_LR": 0.08, "MAX_ITER": 67500, "STEPS": (52500, 62500), "WARMUP_ITERS": 250}


@pytest.fixture
def written() -> CfgNode:
    cfg = load_config("COCO-Detection/faster_rcnn_V_39_FPN_3x.yaml", ["TEST.EVAL_PERIOD", "5000"])
    assert {key: cfg.SOLVER[key] for key in WRITTEN} == WRITTEN
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    return cfg


@pytest.mark.parametrize(("batch", "expected"), [(2, FOR_2), (16, WRITTEN), (64, FOR_64)])
def test_all_scale_together(written: CfgNode, batch: int, expected: dict) -> None:
    scaled = scale_to_batch(written, ["SOLVER.IMS_PER_BATCH", str(batch)])
    assert {key: scaled.SOLVER[key] for key in expected} == expected
    assert scaled.SOLVER["IMS_PER_BATCH"] == batch
    assert 5000 * 16 / batch == scaled.SOLVER.CHECKPOINT_PERIOD == scaled.TEST.EVAL_PERIOD
    assert written.SOLVER.BASE_LR == 0.02  # the original does not change


@pytest.mark.parametrize("batch", [2, 64])
def test_the_last_learning_rate_keeps_its_ratio_to_the_first(written: CfgNode, batch: int) -> None:
    written.SOLVER.BASE_LR_END = 0.0016
    scaled = scale_to_batch(written, ["SOLVER.IMS_PER_BATCH", str(batch)])
    assert pytest.approx(0.0001 * batch) == scaled.SOLVER.BASE_LR_END


def test_given_options_are_not_scaled(written: CfgNode) -> None:
    options = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "100", "SOLVER.GAMMA", "0.5"]
    scaled = scale_to_batch(written, options)
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.GAMMA) == (100, 0.5)
    assert scaled.SOLVER["BASE_LR"] == 0.0025


def test_the_schedule_follows_a_given_number_of_iterations(written: CfgNode) -> None:
    """Train for a tenth of the iterations of the config, with an eighth of its batch."""
    options = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "27000"]
    scaled = scale_to_batch(written, options)
    assert pytest.approx(0.0025) == scaled.SOLVER.BASE_LR
    assert scaled.SOLVER.STEPS == (21000, 25000)
    assert (scaled.SOLVER.WARMUP_ITERS, scaled.SOLVER.CHECKPOINT_PERIOD) == (100, 500)
    assert scaled.TEST.EVAL_PERIOD == 500
    given = ["SOLVER.WARMUP_ITERS", "7", "TEST.EVAL_PERIOD", "9", "SOLVER.STEPS", "(8,)"]
    scaled = scale_to_batch(written, [*options, *given])
    assert (scaled.SOLVER.WARMUP_ITERS, scaled.SOLVER.STEPS) == (7, (8,))
    assert (scaled.TEST.EVAL_PERIOD, scaled.SOLVER.CHECKPOINT_PERIOD) == (9, 500)


def test_the_number_of_processes_sets_the_batch(
    written: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = scale_to_batch(written, ["SOLVER.REFERENCE_WORLD_SIZE", "8"])
    assert scaled.SOLVER.IMS_PER_BATCH == 2
    assert {key: scaled.SOLVER[key] for key in FOR_2} == FOR_2
    # 16 / 6 is rounded, and a batch has at least one image.
    for reference, processes, batch in ((6, 1, 3), (64, 1, 1), (1, 1, 16), (8, 2, 4)):
        monkeypatch.setattr(comm, "get_world_size", lambda processes=processes: processes)
        asked = scale_to_batch(written, ["SOLVER.REFERENCE_WORLD_SIZE", str(reference)])
        assert batch == asked.SOLVER.IMS_PER_BATCH
    # Detectron2 also scales by this number, and must not scale again.
    assert scaled.SOLVER.REFERENCE_WORLD_SIZE == 1


def test_a_scaled_period_is_never_0(written: CfgNode) -> None:
    scaled = scale_to_batch(written, ["SOLVER.IMS_PER_BATCH", str(16 * 20000)])
    assert scaled.TEST.EVAL_PERIOD == scaled.SOLVER.CHECKPOINT_PERIOD == 1
    written.TEST.EVAL_PERIOD = 0
    assert scale_to_batch(written, ["SOLVER.IMS_PER_BATCH", "2"]).TEST.EVAL_PERIOD == 0


def test_trainings_of_one_iteration(written: CfgNode) -> None:
    all_at_once = scale_to_batch(written, ["SOLVER.IMS_PER_BATCH", str(16 * 10**7)])
    assert all_at_once.SOLVER.MAX_ITER == 1
    for before, after in ((4, 1), (1, 4)):
        written.SOLVER.MAX_ITER = written.SOLVER.WARMUP_ITERS = before
        options = ["SOLVER.IMS_PER_BATCH", "16", "SOLVER.MAX_ITER", str(after)]
        scaled = scale_to_batch(written, options)
        assert scaled.SOLVER.MAX_ITER == scaled.SOLVER.WARMUP_ITERS == after


def test_the_effective_values_are_logged(
    written: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    written.SOLVER.BASE_LR_END = 0.0016
    with caplog.at_level(logging.INFO, logger="vovnet_d2"):
        report_scaling(written, scale_to_batch(written, ["SOLVER.IMS_PER_BATCH", "2"]))
    for value in ("0.0025", "0.0002", "2160000", "(1680000, 2000000)", "8000"):
        assert value in caplog.text


def test_an_unknown_batch_is_refused(written: CfgNode) -> None:
    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH .*is 16.*REFERENCE_WORLD_SIZE"):
        scale_to_batch(written, [])
    with pytest.raises(ValueError, match="at least 1, not 0"):
        scale_to_batch(written, ["SOLVER.IMS_PER_BATCH", "0"])


def test_a_batch_without_a_learning_rate_is_a_warning(
    written: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    small = written.clone()
    small.SOLVER.IMS_PER_BATCH = 2
    warn_of_unscaled_batch(written, small)
    assert "--auto-scale-lr would set it to 0.0025" in caplog.text
    caplog.clear()
    small.SOLVER.BASE_LR = 0.0025
    warn_of_unscaled_batch(written, small)
    warn_of_unscaled_batch(written, written)
    assert not caplog.text


def test_a_learning_rate_of_another_batch_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Use a file with a learning rate for its batch, and another batch on the command line."""
    row = Row("SOLVER.MAX_ITER", 10, 20, "fitted")
    monkeypatch.setattr(detection, "fit_to_data", lambda *_, **__: [row])
    path = tmp_path / "mine.yaml"
    path.write_text("SOLVER: {BASE_LR: 0.02, IMS_PER_BATCH: 16}")
    for batch, warnings in (("16", 0), ("2", 1)):
        words = ["--config-file", str(path), "SOLVER.IMS_PER_BATCH", batch]
        task = detection.DetectionTask(detection.argument_parser().parse_args(words))
        task.fit(task.load(), resuming=False)
        assert caplog.text.count("SOLVER.BASE_LR 0.02 was written for a batch of 16") == warnings
