# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Steps of a training that all processes make together, or none, in full and mixed precision."""

from __future__ import annotations

import math
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

from ..errors import UserValueError, one_line
from .accumulation import gradients_stay_here, split_batch
from .interruption import StopRequest
from .nonfinite import NonFiniteLossError
from .precision import autocast_dtype
from .solver import load_optimizer_state

_ROOM = 256  # the most losses of a step: every process sends this many numbers, also without losses


def build_steps(
    cfg: CfgNode,
    model: nn.Module,
    data_loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    request: StopRequest,
) -> AgreedSteps:
    """Return what makes the steps of a training, in the precision that ``SOLVER.AMP`` asks for."""
    accumulate = cfg.SOLVER.ACCUMULATE
    if not cfg.SOLVER.AMP.ENABLED:
        return AgreedSteps(model, data_loader, optimizer, accumulate=accumulate, request=request)
    return MixedPrecisionTrainer(
        model,
        data_loader,
        optimizer,
        device=torch.device(cfg.MODEL.DEVICE),
        dtype=autocast_dtype(cfg),
        accumulate=accumulate,
        request=request,
    )


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
        """Make a step with the next batch.

        Raises:
            NonFiniteLossError: a loss of one process is not finite. All processes raise this error,
                and the parameters are as before.
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
        """Return the losses and "", or no losses and the reason why the network stopped early."""
        try:
            losses = self.forward(data)
        except FloatingPointError as error:  # Detectron2 raises it for proposals
            return {}, one_line(error)
        return losses if isinstance(losses, dict) else {"total_loss": losses}, ""

    def _agree(self, values: dict[str, float], data_time: float, reason: str) -> _Shared:
        """Let all processes continue the step, or none. If a loss of one process is not finite,
        raise NonFiniteLossError.

        Each process calls this method once for each part of a batch. The call comes before the
        backward pass, in which processes wait for each other to share gradients or the statistics
        of norms.
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


class MixedPrecisionTrainer(AgreedSteps):
    """A :class:`SimpleTrainer` whose forward pass runs under autocast, on any device.

    Losses in float16 are scaled, so that small gradients do not become zero. bfloat16 needs no
    scaling. Detectron2's AMPTrainer works on GPUs only.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        dtype: torch.dtype,
        **options: Any,
    ):
        """
        Args:
            device: the device of the model.
            dtype: the type that autocast computes in, float16 or bfloat16.
            options: see :class:`AgreedSteps`.
        """
        super().__init__(model, data_loader, optimizer, **options)
        self.device = device
        self.dtype = dtype
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def forward(self, data: Any) -> dict[str, torch.Tensor] | torch.Tensor:
        with torch.autocast(self.device.type, self.dtype):
            return super().forward(data)

    def backward(self, loss: torch.Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def update(self) -> None:
        # Gradients are clipped before the step, in which fused optimizers would unscale them.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _read(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the values of losses. All are copied at once, so the process waits for a GPU once."""
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
        stop: True if one of the processes has a reason not to continue.
        data_time: the longest time that a process waited for its data, in seconds.
        losses: the mean of each loss over the processes, by name.
    """

    stop: bool
    data_time: float
    losses: dict[str, float]


def _share(values: dict[str, float], data_time: float, *, stop: bool) -> _Shared:
    """Send the state of this process to all processes, and return the state of all.

    Each step calls this function. So the processes exchange one tensor on the CPU. To gather
    objects would take several times as long.
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
    """Raise ValueError about the losses that some processes lack. All processes call this."""
    every = [set(each) for each in comm.all_gather(names)]
    lacking = sorted(set.union(*every) - set.intersection(*every))
    raise UserValueError(
        f"Some processes have no loss {', '.join(lacking)} in this step: the network must return "
        "the same losses for every batch, such as 0 where there is nothing to learn."
    )
