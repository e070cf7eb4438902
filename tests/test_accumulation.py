# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training with SOLVER.ACCUMULATE makes the same steps as training on whole batches."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from engine_runs import FASTER_RCNN, launch, tiny_config
from fault_runs import assert_equal, load
from test_engine_trainer import launch_and_interrupt
from torch import nn

from vovnet_d2 import VOVNET_SPECS, VoVNet
from vovnet_d2.engine import Trainer
from vovnet_d2.engine.accumulation import split_batch
from vovnet_d2.engine.agreed_steps import AgreedSteps, MixedPrecisionTrainer
from vovnet_d2.engine.nonfinite import NonFiniteLossError
from vovnet_d2.engine.run_checks import check_run
from vovnet_d2.engine.solver import build_optimizer
from vovnet_d2.errors import UserError

pytest_plugins = ["engine_fixtures"]

BATCHES = [
    [{"image": torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(4 * step + i))}
     for i in range(4)]
    for step in range(3)
]  # fmt: skip


class Brightness(nn.Module):
    """Network that learns the brightness of an image. Its two losses are means over images."""

    def __init__(self, norm: str):
        super().__init__()
        spec = replace(
            VOVNET_SPECS["V-19-slim-eSE"],
            stem_channels=(8, 8, 8),
            stage_mid_channels=(8, 8, 8, 8),
            stage_out_channels=(8, 8, 8, 8),
        )
        self.net = VoVNet(spec, norm=norm, out_features=["stage3"], freeze_at=0)

    def forward(self, images: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        weight = next(self.parameters())
        inputs = torch.stack([image["image"] for image in images]).to(weight.dtype)
        errors = self.net(inputs)["stage3"].mean((1, 2, 3)) - inputs.mean((1, 2, 3))
        return {"loss_square": errors.square().mean(), "loss_abs": errors.abs().mean()}


def train(
    accumulate: int, norm: str = "GN", dtype: torch.dtype = torch.float64
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the logged losses of each step, and the parameters after the last step."""
    torch.manual_seed(0)
    model = Brightness(norm)
    cfg = tiny_config(FASTER_RCNN, Path("out"), "SOLVER.BASE_LR", "0.1")
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(
        ["ENABLED", True, "CLIP_TYPE", "norm", "CLIP_VALUE", 0.02]
    )
    if dtype == torch.float64:
        model = model.double()
        trainer = AgreedSteps(model, BATCHES, build_optimizer(cfg, model), accumulate=accumulate)
    else:
        trainer = MixedPrecisionTrainer(
            model,
            BATCHES,
            build_optimizer(cfg, model),
            device=torch.device("cpu"),
            dtype=dtype,
            accumulate=accumulate,
        )
    logged = []
    with EventStorage() as storage:
        for trainer.iter in range(len(BATCHES)):
            trainer.run_step()
            logged += [storage.latest()[name][0] for name in ("loss_square", "loss_abs")]
    return logged, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
def test_parts_make_the_step_of_the_whole_batch(norm: str, parts: int) -> None:
    losses, parameters = train(1, norm)
    found_losses, found = train(parts, norm)
    assert found_losses == pytest.approx(losses, rel=1e-12)
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-10, atol=1e-13)


def test_batch_norms_see_the_parts() -> None:
    """Check that the comparison above can fail: with batch norms, the steps differ."""
    (whole, _), (parts, _) = train(1, "BN"), train(2, "BN")
    assert parts != pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    (losses, parameters), (found_losses, found) = train(1, dtype=dtype), train(2, dtype=dtype)
    assert found_losses == pytest.approx(losses, rel=0.02, abs=1e-3)
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter, rtol=0.02, atol=2e-3)


def test_a_part_with_a_loss_that_is_not_finite_skips_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    inputs = [torch.tensor([[math.inf], [1.0]]), torch.tensor([[1.0], [3.0]])]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
    trainer = AgreedSteps(nn.Sequential(layer, nn.Flatten(0)), inputs, optimizer, accumulate=2)
    monkeypatch.setattr(trainer, "_write_shared", lambda *_: None)
    with pytest.raises(NonFiniteLossError, match="total_loss is inf"):
        trainer.run_step()
    assert layer.weight.item() == 1.0
    assert layer.weight.grad is None
    trainer.run_step()  # the gradient of (1 + 3) / 2
    assert layer.weight.item() == 1.0 - 0.25 * 2.0


def test_processes_agree_before_each_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the order, because a norm with shared statistics would otherwise wait forever."""
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
    inputs = [torch.ones(2, 1)]
    trainer = AgreedSteps(nn.Sequential(layer, nn.Flatten(0)), inputs, optimizer, accumulate=2)
    monkeypatch.setattr(trainer, "_write_shared", lambda *_: None)
    seen = []
    agree, backward = trainer._agree, trainer.backward
    monkeypatch.setattr(trainer, "_agree", lambda *words: seen.append("agree") or agree(*words))
    monkeypatch.setattr(trainer, "backward", lambda loss: seen.append("back") or backward(loss))
    trainer.run_step()
    assert seen == ["agree", "back"] * 2


class FloatLoss(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).float().sum() / 64  # small enough that the scaled loss fits float16


def test_a_fused_optimizer_gets_clipped_gradients_of_the_true_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    words = ["SOLVER.BASE_LR", "1.0", "SOLVER.OPTIMIZER_ARGS", "['fused', True, 'foreach', False]"]
    words += ["SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"]
    words += ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "1.0"]
    optimizer = build_optimizer(tiny_config(FASTER_RCNN, tmp_path, *words), layer)
    inputs = [torch.full((1, 1), 32.0)]
    trainer = MixedPrecisionTrainer(
        FloatLoss(layer),
        inputs,
        optimizer,
        device=torch.device("cpu"),
        dtype=torch.float16,
    )
    monkeypatch.setattr(trainer, "_write_shared", lambda *_: None)
    trainer.run_step()
    assert layer.weight.item() == pytest.approx(-0.5)


def test_processes_exchange_gradients_once_in_a_step(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged: list[torch.Tensor] = []

    def note(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanged.append(bucket.buffer().clone())
        return (
            dist.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(layer, nn.Flatten(0)))
    model.register_comm_hook(None, note)
    inputs = [torch.tensor([[1.0], [2.0], [6.0]])] * 2
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
    trainer = AgreedSteps(model, inputs, optimizer, accumulate=3)
    monkeypatch.setattr(trainer, "_write_shared", lambda *_: None)
    for steps in (1, 2):
        trainer.run_step()
        assert [gradients.item() for gradients in exchanged] == [3.0] * steps
        assert layer.weight.item() == 1.0 - 0.25 * 3.0 * steps


def test_a_training_takes_its_batch_in_parts_and_resumes_to_the_bit(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    build: Callable[..., Any] = Trainer.build_model.__func__

    def note(cls: type[Trainer], cfg: Any) -> nn.Module:
        model = build(cls, cfg)
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        return model

    monkeypatch.setattr(Trainer, "build_model", classmethod(note))
    options = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "1"]
    options += ["SOLVER.ACCUMULATE", "2"]
    launch(FASTER_RCNN, tmp_path / "whole", *options)
    assert sizes == [1, 1] * 4
    launch_and_interrupt(monkeypatch, 2, tmp_path / "parts", *options)
    launch(FASTER_RCNN, tmp_path / "parts", "--resume", *options)
    whole, parts = (load(tmp_path / name / "model_final.pth") for name in ("whole", "parts"))
    assert_equal(parts, whole)
    assert whole["iteration"] == 3


def test_batches_are_split_into_equal_parts() -> None:
    images = [{"image": i} for i in range(6)]
    assert split_batch(images, 3) == [images[:2], images[2:4], images[4:]]
    pixels, labels = torch.rand(4, 3, 2, 2), torch.arange(4)
    found = split_batch((pixels, labels), 2)
    assert [part[1].tolist() for part in found] == [[0, 1], [2, 3]]
    assert torch.equal(torch.cat([part[0] for part in found]), pixels)


@pytest.mark.parametrize("batch", [[{}] * 2, torch.zeros(2, 1), (torch.zeros(2, 1), [0, 1])])
@pytest.mark.parametrize("parts", [3, 4])
def test_a_batch_that_is_too_short_is_refused(batch: Any, parts: int) -> None:
    told = f"batch of 2 images cannot be split into {parts} equal parts: set SOLVER.ACCUMULATE"
    with pytest.raises(UserError, match=told):
        split_batch(batch, parts)


@pytest.mark.parametrize("batch", [[{}] * 5, torch.zeros(5, 1), []])
def test_a_batch_that_the_parts_do_not_divide_is_refused(batch: Any) -> None:
    told = f"batch of {len(batch)} images cannot be split into 2 equal parts"
    with pytest.raises(UserError, match=told):
        split_batch(batch, 2)


@pytest.mark.parametrize("parts", [0, -1, 3, 32])
def test_parts_must_divide_the_images_of_a_process(parts: int, tmp_path: Path) -> None:
    cfg = tiny_config(FASTER_RCNN, tmp_path, "SOLVER.IMS_PER_BATCH", "16")
    cfg.SOLVER.ACCUMULATE = parts
    with pytest.raises(ValueError, match=rf"ACCUMULATE is {parts}: it must divide .* are 16 "):
        check_run(cfg, training=True)
    check_run(cfg, training=False)
