# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of SOLVER.EMA: the averaged weights, their evaluation and files, and resumed training."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import test_lazyconfig
import torch
from detectron2.config import LazyCall
from detectron2.evaluation import COCOEvaluator
from engine_runs import FASTER_RCNN, TINY, launch, read_log
from fault_runs import assert_equal, free_port, load, start
from test_engine_trainer import launch_and_interrupt
from torch import nn

from vovnet_d2.drawing.curves import read_metrics
from vovnet_d2.engine import Trainer, load_config
from vovnet_d2.engine.averaging import name_of_average
from vovnet_d2.engine.lazy import LazyTrainer
from vovnet_d2.engine.lazy_config import to_cfg
from vovnet_d2.engine.run_checks import check_schedule

pytest_plugins = ["engine_fixtures"]

DECAY = 0.21  # between the decays of the first two averages, 2 / 11 and 3 / 12
EMA = ["SOLVER.EMA", str(DECAY), "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "5"]
NO_TEST = ["DATASETS.TEST", "()"]


def average_by_hand(states: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the average as a weighted sum of the weights after each step."""
    states = list(states)
    decays = [min(DECAY, (1 + n) / (10 + n)) for n in range(1, len(states))]
    shares = [
        (1.0 if n == 0 else 1 - decays[n - 1]) * math.prod(decays[n:]) for n in range(len(states))
    ]
    assert sum(shares) == pytest.approx(1.0)
    return {
        name: sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        for name, value in states[0].items()
        if value.is_floating_point()
    }


def check_average(out: Path, steps: int) -> None:
    """Compare the average in the files of a training with the average of its checkpoints."""
    checkpoints = [load(out / f"model_{n:07d}.pth")["model"] for n in range(steps)]
    found = load(out / "model_final_ema.pth")
    assert found["iteration"] == steps - 1
    assert "trainer" not in found
    for name, expected in average_by_hand(checkpoints).items():
        torch.testing.assert_close(found["model"][name].double(), expected, rtol=1e-5, atol=1e-7)


def read_average(path: Path) -> dict[str, torch.Tensor]:
    return load(path)["trainer"]["hooks"]["WeightAverage"]


def test_the_average_equals_a_weighted_sum_and_resumes_to_the_bit(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(FASTER_RCNN, tmp_path / "whole", *EMA, *NO_TEST)
    check_average(tmp_path / "whole", 5)
    launch_and_interrupt(monkeypatch, 3, tmp_path / "parts", *EMA, *NO_TEST)
    launch(FASTER_RCNN, tmp_path / "parts", "--resume", *EMA, *NO_TEST)
    for name in ("model_final_ema.pth", "model_final.pth"):
        assert_equal(*(load(tmp_path / folder / name)["model"] for folder in ("parts", "whole")))
    final = [read_average(tmp_path / folder / "model_final.pth") for folder in ("parts", "whole")]
    assert_equal(*final)
    assert final[0]["n_averaged"] == 5


def test_the_average_is_evaluated_and_used_like_any_weights(coco: Path, tmp_path: Path) -> None:
    """Check the results of weights and average, and evaluate the file of the average alone."""
    trained = launch(FASTER_RCNN, tmp_path, *EMA)
    assert trained.keys() == {"bbox", "bbox_EMA"}
    for name in ("results.md", "results.json", "metrics.json"):
        assert "bbox_EMA" in (tmp_path / name).read_text()
    files = [tmp_path / f / "coco_instances_results.json" for f in ("inference", "inference_EMA")]
    raw, average = (file.read_text() for file in files)
    assert raw != average
    evaluated = launch(
        FASTER_RCNN,
        tmp_path,
        *["--eval-only", *EMA, "MODEL.WEIGHTS", str(tmp_path / "model_final_ema.pth")],
    )
    assert str(dict(evaluated)) == str({"bbox": trained["bbox_EMA"]})
    found = tmp_path / "evaluation/inference/coco_instances_results.json"
    assert found.read_text() == average


def score(monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[float, float]]) -> None:
    """Make each evaluation return a given value for the weights, then one for the average."""
    values = iter([value for pair in pairs for value in pair])
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": next(values)}})


def test_best_weights_and_patience(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that weights and average have a best checkpoint each, and that the average decides when
    training stops.
    """
    score(monkeypatch, [(30.0, 5.0), (20.0, 10.0), (10.0, 30.0), (9.0, 20.0)])
    options = [*EMA, "SOLVER.MAX_ITER", "9", "TEST.EVAL_PERIOD", "1", "TEST.PATIENCE", "1"]
    results = launch(FASTER_RCNN, tmp_path, *options)
    assert results == {"bbox": {"AP": 9.0}, "bbox_EMA": {"AP": 20.0}}
    series = read_metrics(str(tmp_path / "metrics.json"))
    assert [series[f"{task}/AP"][-1] for task in ("bbox", "bbox_EMA")] == [(3, 9.0), (3, 20.0)]
    best, best_average = (load(tmp_path / f"model_best{end}.pth") for end in ("", "_ema"))
    assert (best["metric"], best["value"], best["iteration"]) == ("bbox/AP", 30.0, 0)
    assert_equal(best["model"], load(tmp_path / "model_0000000.pth")["model"])
    found = [best_average[key] for key in ("metric", "value", "iteration")]
    assert found == ["bbox_EMA/AP", 30.0, 2]
    average = read_average(tmp_path / "model_0000002.pth")
    for name, tensor in best_average["model"].items():
        assert torch.equal(tensor, average[f"module.{name}"]), name
    check_average(tmp_path, 4)
    assert (
        "in 1 evaluations bbox_EMA/AP has not risen above its value of 30.000 after iteration 2 "
        "(TEST.PATIENCE 1). model_best_ema.pth has those weights, model_final_ema.pth the last."
    ) in read_log(tmp_path)


def test_a_training_without_an_average_can_be_resumed_with_one(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the average begins with the weights of the checkpoint.

    The first evaluation, which was due before the interruption, already has this average.
    """
    evaluated: list[dict[str, Any]] = []

    def test(cls: type[Trainer], cfg: Any, model: nn.Module, *_: object) -> dict[str, Any]:
        evaluated.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    options = [*EMA, "TEST.EVAL_PERIOD", "2"]
    launch_and_interrupt(monkeypatch, 2, tmp_path, *options, "SOLVER.EMA", "0.0")
    (tmp_path / "metrics.json").unlink()
    evaluated.clear()
    launch(FASTER_RCNN, tmp_path, "--resume", *options)
    assert "no average of the weights (SOLVER.EMA): the average begins after iteration 2." in (
        read_log(tmp_path)
    )
    raw, average, *_ = evaluated
    assert_equal(average, raw)
    checkpoints = [load(tmp_path / f"model_{n:07d}.pth")["model"] for n in (2, 3, 4)]
    expected = average_by_hand(checkpoints)
    for name, tensor in evaluated[-1].items():
        if name in expected:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_a_lazy_config_gives_the_same(coco: Path, tmp_path: Path) -> None:
    words = [f"train.ema={DECAY}", "train.checkpointer.period=1"]
    results = test_lazyconfig.launch(tmp_path, *words)
    assert results.keys() == {"bbox", "segm", "bbox_EMA", "segm_EMA"}
    check_average(tmp_path, 3)


def test_an_evaluator_of_a_lazy_config_has_a_folder_for_the_average(
    coco: Path, tmp_path: Path
) -> None:
    config = test_lazyconfig.load_lazy_config(test_lazyconfig.MASK_RCNN)
    folder = str(tmp_path / "inference")
    evaluator = LazyCall(COCOEvaluator)(dataset_name="coco_2017_val", output_dir=folder)
    config.dataloader.evaluator = evaluator
    trainer, cfg = LazyTrainer.of(config), to_cfg(config)
    folders = [
        trainer.build_evaluator(cfg, "coco_2017_val", suffix=suffix)._output_dir
        for suffix in ("", "_EMA", "")
    ]
    assert folders == [folder, f"{folder}_EMA", folder]


def test_the_name_of_a_metric() -> None:
    names = ["bbox/AP", "own_val/segm/AP", "a/b/box_proposals/AR@1000"]
    expected = ["bbox_EMA/AP", "own_val/segm_EMA/AP", "a/b/box_proposals_EMA/AR@1000"]
    assert list(map(name_of_average, names)) == expected


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_invalid_decays_are_refused(decay: float) -> None:
    cfg = load_config(FASTER_RCNN)
    cfg.SOLVER.EMA = decay
    with pytest.raises(ValueError, match=rf"SOLVER\.EMA is {decay}: give the decay"):
        check_schedule(cfg)


@pytest.mark.slow
def test_two_processes_evaluate_one_average(coco: Path, tmp_path: Path) -> None:
    port = free_port()
    options = [*EMA, "TEST.EVAL_PERIOD", "2"]
    assert TINY[:2] == ["MODEL.VOVNET.NORM", "BN"]  # its statistics differ between processes
    processes = [start(coco, tmp_path, options, rank=r, world=2, port=port) for r in range(2)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    check_average(tmp_path, 5)
    assert {"bbox/AP", "bbox_EMA/AP"} <= read_metrics(str(tmp_path / "metrics.json")).keys()
