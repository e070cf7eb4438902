# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of training: precision, interruption and resume, the best weights, and divergence."""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, default_setup, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from engine_runs import FASTER_RCNN, MASK_RCNN, RETINANET, launch, read_log, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vovnet_d2.atomic import FileNotWrittenError
from vovnet_d2.checkpoint import VoVNetCheckpointer
from vovnet_d2.data.stream import seed_all, step_seed
from vovnet_d2.drawing.curves import read_metrics
from vovnet_d2.engine import Trainer, agreed_steps, detection, load_config, nonfinite
from vovnet_d2.engine import trainer as trainer_module
from vovnet_d2.engine.agreed_steps import AgreedSteps, MixedPrecisionTrainer
from vovnet_d2.engine.initial_weights import report_loaded
from vovnet_d2.engine.memory_format import to_memory_format
from vovnet_d2.engine.nonfinite import KeptStatistics, NonFiniteLossError

pytest_plugins = ["engine_fixtures"]


def read_losses(out: Path) -> dict[int, float]:
    """Return the losses in the log of a run that logs each iteration."""
    rows = map(json.loads, (out / "metrics.json").read_text().splitlines())
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}


@pytest.fixture
def every_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the metrics of each iteration, unsmoothed."""
    from detectron2.engine import hooks
    from detectron2.utils.events import JSONWriter

    def build(self: Trainer) -> list:
        return [JSONWriter(str(Path(self.cfg.OUTPUT_DIR) / "metrics.json"), window_size=1)]

    monkeypatch.setattr(Trainer, "build_writers", build)
    init = hooks.PeriodicWriter.__init__
    monkeypatch.setattr(
        hooks.PeriodicWriter, "__init__", lambda self, writers, period: init(self, writers, 1)
    )


class Interruption(Exception):
    pass


def launch_and_interrupt(
    monkeypatch: pytest.MonkeyPatch, iteration: int, out: Path, *options: str
) -> None:
    """Train, and fail before ``iteration``, as if the machine had crashed."""
    step = Trainer.run_step

    def run_step(self: Trainer) -> None:
        if self.iter == iteration:
            raise Interruption
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", run_step)
        with pytest.raises(Interruption):
            launch(FASTER_RCNN, out, *options)


# Precision


@pytest.mark.parametrize("config", [MASK_RCNN, RETINANET])
def test_bfloat16_agrees_with_float32(coco: Path, tmp_path: Path, config: str) -> None:
    losses, results = [], []
    for enabled in ("False", "True"):
        options = ["SOLVER.AMP.ENABLED", enabled, "TEST.AMP.ENABLED", enabled]
        cfg = tiny_config(config, tmp_path, *options)
        seed_all_rng(0)
        trainer = Trainer(cfg)
        assert isinstance(trainer._trainer, MixedPrecisionTrainer) == (enabled == "True")
        with EventStorage() as storage:
            trainer.iter = 0
            trainer.run_step()
            losses.append({k: v for k, (v, _) in storage.latest().items() if "loss" in k})
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        results.append(Trainer.test(cfg, trainer.model))
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.02)
    assert losses[1] != losses[0]
    assert results[0].keys() == results[1].keys()


def test_mixed_precision_of_panoptic_fpn(coco: Path) -> None:
    options = ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"]
    model = build_model(tiny_config(MASK_RCNN, Path("out"), *options))
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 40.0]]))
    instances.gt_masks = PolygonMasks([[np.array([4.0, 4, 40, 4, 40, 40, 4, 40])]])
    instances.gt_classes = torch.tensor([3])
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    data = {"image": image, "instances": instances, "sem_seg": torch.ones(64, 64).long()}
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        losses = model([data])
        sum(losses.values()).backward()
        model.eval()
        with torch.no_grad():
            output = model([{"image": image}])[0]
    assert all(loss.isfinite() for loss in losses.values())
    assert output["sem_seg"].shape == (54, 64, 64)


@pytest.mark.parametrize("config", [MASK_RCNN, RETINANET])
def test_channels_last_changes_the_order_in_memory_alone(coco: Path, config: str) -> None:
    outputs = []
    for enabled in ("True", "False"):
        torch.manual_seed(0)
        cfg = tiny_config(config, Path("out"), "MODEL.CHANNELS_LAST", enabled)
        model = Trainer.build_model(cfg).eval()
        weight = next(p for p in model.parameters() if p.dim() == 4 and p.shape[2] == 3)
        in_order = weight.is_contiguous(memory_format=torch.channels_last)
        assert in_order == (enabled == "True")
        image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs.append(model([{"image": image}])[0]["instances"])
    boxes, scores = zip(*[(o.pred_boxes.tensor, o.scores) for o in outputs], strict=True)
    torch.testing.assert_close(*boxes, atol=1e-3, rtol=0)  # pixels
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


def test_channels_last_is_the_default_if_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the default by device, CPU and model, and the values of the config."""
    cases = {
        ("cuda", "AVX2", False): True,
        ("cpu", "AVX512", False): True,
        ("cpu", "AVX2", False): False,
        ("cpu", "DEFAULT", False): False,  # for example Arm
        ("cpu", "AVX512", True): False,
    }
    for (device, capability, keypoints), expected in cases.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        options = ["MODEL.DEVICE", device, "MODEL.KEYPOINT_ON", str(keypoints)]
        for words, last in (
            ([], expected),
            (["MODEL.CHANNELS_LAST", "True"], True),
            (["MODEL.CHANNELS_LAST", "False"], False),
        ):
            model = torch.nn.Conv2d(3, 4, 3)
            to_memory_format(model, load_config(MASK_RCNN, options + words))
            found = model.weight.is_contiguous(memory_format=torch.channels_last)
            assert found == last, (device, capability, keypoints, words)


def test_processes_wait_for_each_other_once_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that they wait before the backward pass, which needs finite losses in all processes."""
    waits: list[int] = []
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
    model = nn.Sequential(layer, nn.Flatten(0))
    inputs = [torch.ones(1, 1), torch.full((1, 1), math.inf)]
    trainer = AgreedSteps(model, inputs, optimizer)
    monkeypatch.setattr(trainer, "_write_shared", lambda *_: None)
    monkeypatch.setattr(agreed_steps.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(agreed_steps.comm, "all_gather", lambda value: [value, value])
    monkeypatch.setattr(agreed_steps.comm, "_get_global_gloo_group", lambda: None)

    def exchange(rows: list[torch.Tensor], row: torch.Tensor, **_: Any) -> None:
        waits.append(1)
        for place in rows:
            place.copy_(row)

    monkeypatch.setattr(agreed_steps.dist, "all_gather", exchange)
    trainer.run_step()
    assert waits == [1]
    assert layer.weight.item() == 0.75
    layer.weight.grad = None
    with pytest.raises(NonFiniteLossError, match="total_loss is inf"):
        trainer.run_step()
    assert waits == [1, 1]
    assert layer.weight.grad is None


class Losses(nn.Module):
    def __init__(self, *values: float):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.values = values

    def forward(self, _: Any) -> dict[str, torch.Tensor]:
        return {f"loss_{i}": self.scale * value for i, value in enumerate(self.values)}


def make_steps(*values: float) -> AgreedSteps:
    model = Losses(*values)
    return AgreedSteps(model, [None] * 2, torch.optim.SGD(model.parameters(), lr=0.0))


def test_the_log_has_the_means_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate another process with losses that are greater by 2, and 3 seconds of waiting."""
    trainer = make_steps(1.0, 4.0)
    monkeypatch.setattr(agreed_steps.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(agreed_steps.comm, "_get_global_gloo_group", lambda: None)

    def exchange(rows: list[torch.Tensor], row: torch.Tensor, **_: Any) -> None:
        rows[0].copy_(row)
        rows[1].copy_(row)
        rows[1][1] = 3.0
        rows[1][3:5] = torch.tensor([3.0, 6.0])

    monkeypatch.setattr(agreed_steps.dist, "all_gather", exchange)
    with EventStorage() as storage:
        trainer.run_step()
        logged = {name: value for name, (value, _) in storage.latest().items()}
    assert logged.pop("rank_data_time") < 3
    assert logged == {"data_time": 3.0, "total_loss": 7.0, "loss_0": 2.0, "loss_1": 5.0}


aten = torch.ops.aten


class _ReadValues(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (aten._local_scalar_dense.default, aten.stack.default)
        return func(*args, **(kwargs or {}))


def test_losses_are_read_from_the_gpu_once() -> None:
    """Count the reads of values, because each one waits for the GPU."""
    trainer = make_steps(1.0, 2.0, 3.0, 4.0)
    with EventStorage(), _ReadValues() as mode:
        trainer.run_step()
    assert mode.count == 1


@pytest.mark.parametrize("copy_all", [nonfinite._foreach_copy, nonfinite._copy_one_by_one])
def test_statistics_of_norms_are_restored(monkeypatch: pytest.MonkeyPatch, copy_all: Any) -> None:
    """Replace the buffers of norms in between, as the hook PreciseBN does."""
    monkeypatch.setattr(nonfinite, "_foreach_copy", copy_all)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(3))
    statistics = KeptStatistics(model)
    for _ in range(2):
        model[0](torch.randn(2, 2, 4, 4))
        model[1](torch.randn(2, 3, 4, 4))
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        statistics.keep()
        model[0](torch.full((2, 2, 4, 4), math.nan))
        model[1].running_mean = torch.full((3,), math.inf)
        statistics.restore()
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]), name


def test_a_model_may_return_one_loss_without_a_name() -> None:
    """Compare the step with that of Detectron2's SimpleTrainer."""
    data = [torch.tensor([[1.0, 2.0]])] * 2
    weights = []
    for mixed in (False, True):
        model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Flatten(0))
        nn.init.constant_(model[0].weight, 0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        trainer = (
            MixedPrecisionTrainer(
                model, data, optimizer, device=torch.device("cpu"), dtype=torch.bfloat16
            )
            if mixed
            else SimpleTrainer(model, data, optimizer)
        )
        with EventStorage() as storage:
            trainer.run_step()
            assert storage.latest()["total_loss"][0] == 1.5
        weights.append(model[0].weight.detach())
    assert torch.equal(*weights)


class Quadratic(nn.Module):
    """Network with the interface of a detector and tiny gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, data: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": 1e-6 * self.layer(data).float().square().mean()}


def test_float16_losses_are_scaled_and_the_clipping_sees_true_gradients() -> None:
    cfg = tiny_config(FASTER_RCNN, Path("out"), "SOLVER.BASE_LR", "1000.0")
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(["ENABLED", True, "CLIP_VALUE", 1e-6])
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    data = [torch.full((2, 4), 0.1)] * 3
    models = []
    for dtype in (torch.float16, torch.bfloat16):
        model = Quadratic()
        optimizer = build_optimizer(cfg, model)
        trainer = MixedPrecisionTrainer(
            model, data, optimizer, device=torch.device("cpu"), dtype=dtype
        )
        assert trainer.grad_scaler.is_enabled() == (dtype == torch.float16)
        with EventStorage():
            trainer.run_step()
        models.append((trainer, model.layer.weight.detach()))
    # The gradient of 1e-6 (4 * 0.1 * 0.5)^2 by one weight is 4e-8, less than the smallest float16.
    expected = torch.full((1, 4), 0.5 - 1000 * 4e-8)
    torch.testing.assert_close(models[0][1], expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(models[1][1], expected, atol=2e-6, rtol=0)
    state = models[0][0].state_dict()
    assert state["grad_scaler"]["scale"] == models[0][0].grad_scaler.get_scale()
    models[0][0].load_state_dict(state)
    models[0][0].load_state_dict(models[1][0].state_dict() | {"iteration": 1})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_on_a_gpu(coco: Path, tmp_path: Path, dtype: str) -> None:
    options = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", dtype]
    options += ["TEST.AMP.ENABLED", "True"]
    results = launch(MASK_RCNN, tmp_path, *options)
    assert set(results) == {"bbox", "segm"}
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)["trainer"]["_trainer"]
    assert ("grad_scaler" in state) == (dtype == "float16")


# Use within another program


def test_the_log_after_default_setup_has_our_lines(coco: Path, tmp_path: Path) -> None:
    logging.getLogger("vovnet_d2").setLevel(logging.NOTSET)  # an earlier test may have set it
    cfg = tiny_config(FASTER_RCNN, tmp_path)
    default_setup(cfg, argparse.Namespace())
    Trainer(cfg).resume_or_load(resume=True)
    assert f"Nothing to resume in {tmp_path}" in read_log(tmp_path)


def test_the_folder_without_a_checkpoint_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Check the message of an evaluation. It looks for checkpoints in the parent of its folder."""
    caplog.set_level(logging.INFO, logger="vovnet_d2")
    cfg = tiny_config(FASTER_RCNN, tmp_path / "evaluation")
    checkpointer = VoVNetCheckpointer(torch.nn.Identity(), str(tmp_path))
    report_loaded(checkpointer, cfg, resume=True)
    assert f"Nothing to resume in {tmp_path}: started" in caplog.text


def test_scaling_to_the_processes_is_done_once() -> None:
    options = ["SOLVER.IMS_PER_BATCH", "16", "SOLVER.REFERENCE_WORLD_SIZE"]
    once = Trainer.auto_scale_workers(tiny_config(FASTER_RCNN, Path("out"), *options, "8"), 2)
    assert (once.SOLVER.IMS_PER_BATCH, once.SOLVER.BASE_LR) == (4, 0.002 / 4)
    assert Trainer.auto_scale_workers(once, 2) == once
    for reference in ("3", "-8"):
        cfg = tiny_config(FASTER_RCNN, Path("out"), *options, reference)
        with pytest.raises(ValueError, match=f"WORLD_SIZE is {reference}: .* which is 16"):
            Trainer.auto_scale_workers(cfg, 2)


# Seeds, interruption, resume


def test_another_seed_is_another_training(
    coco: Path, tmp_path: Path, every_iteration: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare two seeds. test_faults.py checks that the same seed gives the same training."""
    seeds: list[int] = []
    monkeypatch.setattr(trainer_module, "seed_all", lambda n: [seeds.append(n), seed_all(n)])
    for seed in ("1", "2"):
        launch(FASTER_RCNN, tmp_path / seed, "DATASETS.TEST", "()", "SEED", seed)
    assert seeds == [step_seed(seed, i, rank=0) for seed in (1, 2) for i in range(3)]
    losses = [read_losses(tmp_path / seed) for seed in ("1", "2")]
    assert list(losses[0]) == [0, 1, 2]
    assert losses[0] != losses[1]


def test_resume_continues_from_the_checkpoint(
    coco: Path, tmp_path: Path, every_iteration: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2"]
    options += ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]
    launch_and_interrupt(monkeypatch, 5, tmp_path, *options)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    saved = torch.load(tmp_path / "model_0000003.pth", weights_only=False)

    loaded = {}
    train = Trainer.train

    def remember_and_train(self: Trainer) -> dict:
        loaded.update({k: v.clone() for k, v in self.model.state_dict().items()})
        loaded["momentum"] = self.optimizer.state_dict()["state"][0]["momentum_buffer"].clone()
        loaded["last_epoch"] = self.scheduler.last_epoch
        return train(self)

    monkeypatch.setattr(Trainer, "train", remember_and_train)
    launch(FASTER_RCNN, tmp_path, "--resume", *options)
    log = read_log(tmp_path)
    assert f"Resumed from {tmp_path}/model_0000003.pth." in log
    assert "4 of 6 iterations are done." in log
    for name, tensor in saved["model"].items():
        assert torch.equal(loaded[name], tensor), name
    momentum = saved["trainer"]["_trainer"]["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(loaded["momentum"], momentum)
    assert loaded["last_epoch"] == saved["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 4
    rows = [json.loads(row) for row in (tmp_path / "metrics.json").read_text().splitlines()]
    iterations = [row["iteration"] for row in rows]
    assert iterations == [0, 1, 2, 3, 4, 4, 5]
    assert all(math.isfinite(row["total_loss"]) for row in rows)
    cosine = [0.002 * (1 + math.cos(math.pi * i / 6)) / 2 for i in iterations]
    assert [row["lr"] for row in rows] == pytest.approx(cosine)

    # Resuming again only logs that nothing is left to do.
    launch(FASTER_RCNN, tmp_path, "--resume", *options)
    assert "6 of 6 iterations are done: nothing is left to train." in read_log(tmp_path)


def test_nothing_to_resume_and_starting_over_are_logged(coco: Path, tmp_path: Path) -> None:
    launch(FASTER_RCNN, tmp_path, "--resume", "DATASETS.TEST", "()")
    log = read_log(tmp_path)
    assert f"Nothing to resume in {tmp_path}: started from random weights." in log
    assert "No file of weights is loaded." in log
    assert "Loading from  ..." not in log
    # The first line says so too, long before the network is built.
    assert f"WARNING: There is no checkpoint to resume from in {tmp_path}, " in log.splitlines()[0]
    assert "held an earlier run" not in read_log(tmp_path)
    before = (tmp_path / "metrics.json").read_text()
    launch(FASTER_RCNN, tmp_path, "DATASETS.TEST", "()")
    assert f"{tmp_path} held an earlier run: it is now {tmp_path}/earlier." in read_log(tmp_path)
    # A refused run does not change the files.
    with pytest.raises(KeyError, match="not registered"):
        launch(FASTER_RCNN, tmp_path, "DATASETS.TRAIN", "('gone',)")
    assert read_log(tmp_path).count("held an earlier run") == 1
    # The new run does not continue the curves of the old run.
    assert (tmp_path / "earlier/metrics.json").read_text() == before
    assert before not in (tmp_path / "metrics.json").read_text()


def test_processes_evaluate_the_statistics_of_the_first(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_config(FASTER_RCNN, tmp_path))
    monkeypatch.setattr(trainer, "gather_rank_states", lambda: None)
    monkeypatch.setattr(trainer_module.comm, "get_world_size", lambda: 2)
    received = []

    def broadcast(tensor: torch.Tensor, source: int) -> None:
        received.append(source)
        tensor.fill_(7)

    def evaluate() -> dict:
        statistics = dict(trainer.model.named_buffers())
        assert any(name.endswith("running_mean") for name in statistics)
        assert all((value == 7).all() for value in statistics.values())
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(trainer_module.dist, "broadcast", broadcast)
    assert trainer._interruptible(evaluate)() == {"bbox": {"AP": 1.0}}
    assert received
    assert set(received) == {0}


# The best weights


def test_the_best_weights_are_kept_over_a_resume(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([10.0, 30.0, 20.0, math.nan, 25.0])
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": next(scores)}})
    options = ["TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "5"]

    launch_and_interrupt(monkeypatch, 2, tmp_path, *options)
    best = torch.load(tmp_path / "model_best.pth")
    assert (best["value"], best["metric"], best["iteration"]) == (30.0, "bbox/AP", 1)
    # Resume uses the newest checkpoint, which has the optimizer.
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert "trainer" not in best

    last = tmp_path / "model_0000001.pth"
    saved = torch.load(last, weights_only=False)
    assert 0 < saved["trainer"]["seconds"] < 600
    saved["trainer"]["seconds"] = 86400.0
    torch.save(saved, last)
    launch(FASTER_RCNN, tmp_path, "--resume", *options)
    assert torch.load(tmp_path / "model_final.pth")["trainer"]["seconds"] > 86400
    told = json.loads((tmp_path / "results.json").read_text())["run"]["wall time"]
    assert told.startswith("1 day, 0:0")
    assert told.endswith(" since --resume")
    assert torch.load(tmp_path / "model_best.pth")["value"] == 30.0
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert "No bbox/AP in this evaluation" in read_log(tmp_path)
    second = torch.load(tmp_path / "model_0000001.pth", weights_only=False)["model"]
    for name, tensor in best["model"].items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(("made_up", "best"), [(40.0, (40.0, 1)), (10.0, (30.0, 0))])
def test_the_best_weights_are_kept_if_another_process_is_lost(
    coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made_up: float,
    best: tuple[float, int],
) -> None:
    """Let another process be lost during the wait after an evaluation.

    This process has the result, and a resumed training does not evaluate again."""
    options = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "1"]
    scores: Iterator[float]

    def test(*_: object) -> dict[str, dict[str, float]]:
        for score in scores:
            if score == made_up:
                monkeypatch.setattr(hooks.comm, "synchronize", synchronize)
            return {"bbox": {"AP": score}}
        raise Interruption

    def synchronize() -> None:
        raise Interruption

    monkeypatch.setattr(Trainer, "test", test)
    monkeypatch.setattr(detection, "rehearse_evaluation", lambda *_: None)  # it would wait, too
    scores = iter([30.0])
    with pytest.raises(Interruption):
        launch(FASTER_RCNN, tmp_path, *options)
    scores = iter([made_up])
    with pytest.raises(Interruption):
        launch(FASTER_RCNN, tmp_path, "--resume", *options)
    assert read_metrics(tmp_path / "metrics.json")["bbox/AP"] == [(0, 30.0), (1, made_up)]
    saved = torch.load(tmp_path / "model_best.pth")
    assert (saved["value"], saved["iteration"]) == best


def test_the_best_weights_are_written_later_if_writing_fails(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "1"]
    scores = iter([10.0, 30.0, 30.0, 20.0])
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": next(scores)}})
    save = VoVNetCheckpointer.save

    def fail(self: VoVNetCheckpointer, name: str, **more: object) -> None:
        if more.get("value") == 30.0:
            raise FileNotWrittenError("the disk is full")
        save(self, name, **more)

    with monkeypatch.context() as patch:
        patch.setattr(VoVNetCheckpointer, "save", fail)
        with pytest.raises(FileNotWrittenError):
            launch(FASTER_RCNN, tmp_path, *options)
    assert torch.load(tmp_path / "model_best.pth")["value"] == 10.0
    launch(FASTER_RCNN, tmp_path, "--resume", *options)
    best = torch.load(tmp_path / "model_best.pth")
    assert (best["value"], best["iteration"]) == (30.0, 1)


# Divergence


def test_divergence_names_causes_and_keeps_the_checkpoint(coco: Path, tmp_path: Path) -> None:
    options = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "9", "SOLVER.BASE_LR", "1e15"]
    with pytest.raises(FloatingPointError) as caught:
        launch(FASTER_RCNN, tmp_path, *options, "SOLVER.AMP.ENABLED", "True")
    message = str(caught.value)
    last = (tmp_path / "last_checkpoint").read_text()
    iteration = int(last.removeprefix("model_").removesuffix(".pth"))
    assert message.startswith(f"Training diverged at iteration {iteration + 1}. ")
    for part in ("'loss_rpn_cls': ", "1e+15 for 2 images", "--auto-scale-lr", "WARMUP_ITERS 0"):
        assert part in message
    assert "CLIP_GRADIENTS.ENABLED True" in message
    assert "float16" not in message
    assert f"Last checkpoint: {tmp_path}/{last}." in message
    assert torch.load(tmp_path / last, weights_only=False)["iteration"] == iteration
    assert "Traceback" not in read_log(tmp_path)


# Keys of Detectron2 for evaluation


def test_precise_bn_starts_no_processes(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[int] = []
    build = Trainer.build_train_loader

    def note(cfg: CfgNode) -> Any:
        workers.append(cfg.DATALOADER.NUM_WORKERS)
        return build(cfg)

    monkeypatch.setattr(Trainer, "build_train_loader", staticmethod(note))
    options = ["TEST.PRECISE_BN.ENABLED", "True", "DATALOADER.NUM_WORKERS", "2"]
    Trainer(tiny_config(MASK_RCNN, tmp_path, *options))
    assert workers == [2, 0]


def test_precise_bn_and_test_time_augmentation(coco: Path, tmp_path: Path) -> None:
    options = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"]
    options += ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 80)"]
    results = launch(MASK_RCNN, tmp_path, *options)
    assert set(results) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    assert "Running precise-BN for 2 iterations" in read_log(tmp_path)
    assert "bbox_TTA" in (tmp_path / "results.md").read_text()
    plain, augmented = (
        json.loads((tmp_path / folder / "coco_instances_results.json").read_text())
        for folder in ("inference", "inference_TTA")
    )
    assert np.shape(plain) != np.shape(augmented) or plain != augmented
    again = launch(MASK_RCNN, tmp_path, "--eval-only", "--resume", *options)
    assert str(again) == str(results)  # compared as text, because NaN is not equal to NaN
