# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses that are NaN or infinite are found in any process, explained, and recorded."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..atomic import write_text
from ..errors import UserError, UserValueError, one_line
from .accumulation import gradients_stay_here, split_batch
from .interruption import StopRequest
from .precision import autocast_dtype
from .solver import load_optimizer_state

__all__ = [
    "AgreedSteps",
    "KeptStatistics",
    "NonFiniteLossError",
    "TrainingDivergedError",
    "explain",
    "write_record",
]


class TrainingDivergedError(UserError, FloatingPointError):
    """A training ends at a loss that is NaN or infinite; the message names likely causes."""

    exit_status = 1


class NonFiniteLossError(FloatingPointError):
    """The losses of a step are NaN or infinite. The trainer skips the step or ends the training.

    Attributes:
        losses: the losses of each process by name; empty if the network stopped before it had any.
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
    """A :class:`SimpleTrainer` whose processes make a step together, or not at all.

    Before the processes change the parameters, they agree whether all losses are finite and whether
    a signal has asked one of the processes to end.

    A step takes a batch, in one part or in several, one after the other. The gradients and the
    losses of the parts are averaged. So a step of several parts equals the step of the whole batch
    if the loss is a mean over images and no norm uses the statistics of a batch.

    Attributes:
        accumulate: the number of parts.
        request: the request to end, in which this process notes a signal.
        stop_signal: the name of a signal that one of the processes got before the latest step; None
            if there was no signal.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        request: StopRequest | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.accumulate = accumulate
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
        self.optimizer.zero_grad()
        values: dict[str, float] = {}
        parts = split_batch(data, self.accumulate)
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            with gradients_stay_here(self.model, enabled=not is_last):
                losses, reason = self._compute_losses(part)
                for name, value in _read(losses).items():
                    values[name] = values.get(name, 0.0) + value / len(parts)
                shared = self._agree(values, data_time, reason)
                total: Any = sum(losses.values())
                self.backward(total / len(parts))
        self.after_backward()
        self._write_shared(shared, data_time)
        self.update()

    def _write_shared(self, shared: _Shared, data_time: float) -> None:
        """Write what Detectron2's ``write_metrics`` writes, without asking the processes again."""
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time)
        if comm.is_main_process():
            storage.put_scalar("data_time", shared.data_time)
            storage.put_scalar("total_loss", sum(shared.losses.values()))
            if len(shared.losses) > 1:
                storage.put_scalars(**shared.losses)

    def forward(self, data: Any) -> dict[str, torch.Tensor] | torch.Tensor:
        return self.model(data)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        load_optimizer_state(self.optimizer, state_dict["optimizer"])

    def _compute_losses(self, data: Any) -> tuple[dict[str, torch.Tensor], str]:
        """Return the losses and an empty string, or no losses and why the network stopped
        before."""
        try:
            losses = self.forward(data)
        except FloatingPointError as error:  # Detectron2 raises it for proposals
            return {}, one_line(error)
        return losses if isinstance(losses, dict) else {"total_loss": losses}, ""

    def _agree(self, values: dict[str, float], data_time: float, reason: str) -> _Shared:
        """Let all processes go on with the step, or raise an error in all of them.

        Each process calls this method once for each part of a batch, before the backward pass. In
        the backward pass processes wait for each other if they share gradients or statistics of
        norms.
        """
        signal = self.request.signal
        stop = bool(reason or signal) or not _is_finite(values)
        shared = _share(values, data_time, stop=stop)
        if not shared.stop:
            return shared
        losses, reasons, signals = zip(*comm.all_gather((values, reason, signal)), strict=True)
        self.stop_signal = next(filter(None, signals), None)
        if any(reasons):
            raise NonFiniteLossError([{} for _ in reasons], next(filter(None, reasons)))
        if not all(map(_is_finite, losses)):
            raise NonFiniteLossError(list(losses))
        return shared


def _read(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the values of losses. They are copied together, so that the CPU waits for a GPU
    once."""
    if not losses:
        return {}
    stacked = torch.stack([loss.detach().double().reshape(()) for loss in losses.values()])
    return dict(zip(losses, stacked.tolist(), strict=True))


def _is_finite(losses: dict[str, float]) -> bool:
    """Return True if the sum of the losses of a process is finite."""
    return math.isfinite(sum(losses.values()))


class _Shared(NamedTuple):
    """The state of all processes before the backward pass of a step.

    Attributes:
        stop: True if one of them has a reason not to go on.
        data_time: the longest time that one of them waited for its data, in seconds.
        losses: the means over the processes, by name.
    """

    stop: bool
    data_time: float
    losses: dict[str, float]


_ROOM = 256  # the most losses of a step: every process sends this many numbers, also without losses


def _share(values: dict[str, float], data_time: float, *, stop: bool) -> _Shared:
    """Send the state of this process to all others, and return the state of all processes.

    This runs in each step, so it is one exchange of tensors on the CPU: gathering objects takes
    several times as long.
    """
    processes = comm.get_world_size()
    if processes == 1:
        return _Shared(stop, data_time, values)
    names = sorted(values)
    if len(names) > _ROOM:
        raise UserValueError(
            f"A step has {len(names)} losses, but several processes can share at most {_ROOM}: let "
            "the network add some of them up, or train in one process."
        )
    checksum = zlib.crc32("\n".join(names).encode())
    row = torch.zeros(3 + _ROOM, dtype=torch.float64)
    row[: 3 + len(names)] = torch.tensor(
        [stop, data_time, checksum, *(values[name] for name in names)], dtype=row.dtype
    )
    rows = [torch.empty_like(row) for _ in range(processes)]
    dist.all_gather(rows, row, group=comm._get_global_gloo_group())
    table = torch.stack(rows)
    stopped = bool(table[:, 0].any())
    if not stopped and len(table[:, 2].unique()) > 1:
        _refuse_other_names(names)
    means = dict(zip(names, table[:, 3 : 3 + len(names)].mean(dim=0).tolist(), strict=True))
    return _Shared(stopped, float(table[:, 1].max()), {name: means[name] for name in values})


def _refuse_other_names(names: list[str]) -> NoReturn:
    """Raise an error about the losses that some processes lack. All processes call this."""
    every = [set(each) for each in comm.all_gather(names)]
    lacking = sorted(set.union(*every) - set.intersection(*every))
    raise UserValueError(
        f"Some processes have no loss {', '.join(lacking)} in this step: the network must return "
        "the same losses for every batch, such as 0 where there is nothing to learn."
    )


class KeptStatistics:
    """A copy of the running statistics of batch norms, taken before each step."""

    def __init__(self, model: nn.Module):
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._kept: list[list[torch.Tensor]] = []

    def keep(self) -> None:
        current = self._find()
        if not self._kept:
            self._kept = [[torch.empty_like(buffer) for buffer in group] for group in current]
        for kept, group in zip(self._kept, current, strict=True):
            _copy_all(kept, group)

    def restore(self) -> None:
        """Restore the statistics of the last :meth:`keep`."""
        for group, kept in zip(self._find(), self._kept, strict=True):
            _copy_all(group, kept)

    def _find(self) -> list[list[torch.Tensor]]:
        """Return the statistics and the counts of batches in two lists, because one kernel copies
        tensors of one type only. The buffers are looked for each time, because the hook PreciseBN
        replaces them.
        """
        buffers = [buffer for norm in self._norms for buffer in norm.buffers()]
        floats = [buffer for buffer in buffers if buffer.is_floating_point()]
        return [floats, [buffer for buffer in buffers if not buffer.is_floating_point()]]


def _copy_one_by_one(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


# This function is private in torch. It copies all tensors by one kernel.
_foreach_copy = getattr(torch, "_foreach_copy_", _copy_one_by_one)


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        _foreach_copy(targets, sources)


def write_record(
    folder: str,
    iteration: int,
    *,
    losses: list[dict[str, float]],
    images: list[list[str]],
    rate: float,
    seed: int,
) -> str:
    """Write the facts of a step with a NaN or infinite loss to
    ``folder/nonfinite_<iteration>.json``.

    Args:
        losses: the losses of each process, by name.
        images: the file names of the images of each process.

    Returns:
        the path of the file.
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
    write_text(path, json.dumps(content, indent=2) + "\n")
    return path


def explain(cfg: CfgNode, *, rate: float) -> str:
    """Return the likely causes of a NaN or infinite loss, with the keys that help."""
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
