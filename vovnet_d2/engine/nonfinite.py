# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses that are infinite or not a number: found in any process, told, kept for a look."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import nn

from ..checkpoint.atomic import atomic_write
from .interruption import StopRequest
from .precision import autocast_dtype

__all__ = ["AgreedSteps", "NonFiniteLossError", "explain", "write_record"]


class NonFiniteLossError(FloatingPointError):
    """
    Attributes:
        losses: of each process, by name; none if the network stopped before it had them.
    """

    def __init__(self, losses: list[dict[str, float]], reason: str = ""):
        found = [
            f"{name} is {value}"
            for values in losses
            for name, value in values.items()
            if not math.isfinite(value)
        ]
        told = reason or ", ".join(dict.fromkeys(found)) or "the sum of the losses is infinite"
        super().__init__(f"{told.rstrip('.')}.")
        self.losses = losses


class AgreedSteps(SimpleTrainer):
    """A :class:`SimpleTrainer` whose processes agree, before they change the parameters, whether
    all losses are finite and whether one of them is asked to end.

    Attributes:
        request: what this process was asked.
        stop_signal: that any process was sent, by the latest step; None if there was none.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        request: StopRequest | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.request = request or StopRequest()
        self.stop_signal: str | None = None

    def run_step(self) -> None:
        """
        Raises:
            NonFiniteLossError: in all processes, if a loss of one of them is not finite. The
                parameters are as before.
        """
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        losses, reason = self._compute_losses(data)
        values = {name: loss.item() for name, loss in losses.items()}
        self._agree(values, reason)
        self.optimizer.zero_grad()
        total: Any = sum(losses.values())
        self.backward(total)
        self.after_backward()
        # The values, as reading the losses once more would wait for the end of the backward pass.
        told = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
        self._write_metrics(told, data_time)
        self.update()

    def forward(self, data: Any) -> dict[str, torch.Tensor] | torch.Tensor:
        return self.model(data)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()

    def _compute_losses(self, data: Any) -> tuple[dict[str, torch.Tensor], str]:
        """Return the losses, or none and why the network stopped before it had them."""
        try:
            losses = self.forward(data)
        except FloatingPointError as error:  # Detectron2's, of proposals
            return {}, str(error) or type(error).__name__
        return losses if isinstance(losses, dict) else {"total_loss": losses}, ""

    def _agree(self, values: dict[str, float], reason: str) -> None:
        """Let all processes go on with the step, or none.

        That is before the backward pass, in which processes wait for each other.
        """
        signal = self.request.signal
        if not _in_any_process(bool(reason or signal) or not _is_finite(values)):
            return
        losses, reasons, signals = zip(*comm.all_gather((values, reason, signal)), strict=True)
        self.stop_signal = next(filter(None, signals), None)
        if any(reasons):
            raise NonFiniteLossError([{} for _ in reasons], next(filter(None, reasons)))
        if not all(map(_is_finite, losses)):
            raise NonFiniteLossError(list(losses))


def _is_finite(losses: dict[str, float]) -> bool:
    """Whether the sum of the losses of a process is finite."""
    return math.isfinite(sum(losses.values()))


def _in_any_process(flag: bool) -> bool:
    """Whether it is set in one of them. Asked in each step, and so of a tensor on the CPU: to
    gather objects takes several times as long."""
    if comm.get_world_size() == 1:
        return flag
    found = torch.tensor(flag, dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
    return bool(found)


def write_record(
    folder: str,
    iteration: int,
    *,
    losses: list[dict[str, float]],
    images: list[list[str]],
    rate: float,
    seed: int,
) -> str:
    """Write what is known of such a step to ``folder/nonfinite_<iteration>.json``.

    Args:
        losses: of each process, by name.
        images: of each process, by file name.

    Returns:
        its path.
    """
    processes = [
        {
            "losses": {n: v if math.isfinite(v) else str(v) for n, v in values.items()},
            "images": names,
        }
        for values, names in zip(losses, images, strict=True)
    ]
    content = {"iteration": iteration, "learning_rate": rate, "seed": seed, "processes": processes}
    path = os.path.join(folder, f"nonfinite_{iteration:07d}.json")
    with atomic_write(path) as partial:
        Path(partial).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def explain(cfg: CfgNode, *, rate: float) -> str:
    """The likely causes, with the keys that help."""
    solver = cfg.SOLVER
    causes = [
        f"a learning rate too high for the batch (now {rate:.3g} for {solver.IMS_PER_BATCH} "
        "images; --auto-scale-lr fits the config's)",
        f"a warm-up too short (SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS})",
    ]
    if not solver.CLIP_GRADIENTS.ENABLED:
        causes.append("no gradient clipping (SOLVER.CLIP_GRADIENTS.ENABLED True)")
    if solver.AMP.ENABLED and autocast_dtype(cfg) == torch.float16:
        causes.append("the range of float16 (SOLVER.AMP.DTYPE bfloat16)")
    causes.append("FrozenBN without weights that belong to the network")
    causes.append("the images named above")
    return f"Likely causes: {'; '.join(causes)}."
