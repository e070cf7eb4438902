# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses that are NaN or infinite: the errors, the record of such a step, and its likely causes."""

import json
import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..atomic import write_text
from ..data.stream import Place, TrainingStream
from ..errors import UserError
from .precision import autocast_dtype


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


class NonFiniteStep(NamedTuple):
    """The facts about a step whose losses are not finite.

    Attributes:
        iteration: the iteration of the step.
        losses: the losses of each process, by name.
        images: the file names of the images of each process.
        rate: the learning rate.
        seed: the seed of the training.
    """

    iteration: int
    losses: list[dict[str, float]]
    images: list[list[str]]
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the files about this step, without their endings."""
        return f"nonfinite_{self.iteration:07d}"

    def write(self, folder: str) -> str:
        """Write the facts to a JSON file in a folder, and return the path of the file."""
        processes = [
            {
                "losses": {n: v if math.isfinite(v) else str(v) for n, v in values.items()},
                "images": names,
            }
            for values, names in zip(self.losses, self.images, strict=True)
        ]
        content = {
            "iteration": self.iteration,
            "learning_rate": self.rate,
            "seed": self.seed,
            "processes": processes,
        }
        path = os.path.join(folder, f"{self.name}.json")
        write_text(path, json.dumps(content, indent=2) + "\n")
        return path

    def explain(
        self, cfg: CfgNode, *, before: dict[str, float], record: str, checkpoint: str
    ) -> str:
        """Return what is known of the step and its likely causes, in several lines.

        Args:
            before: the losses of the iteration before, by name.
            record: the file that :meth:`write` wrote.
            checkpoint: the last checkpoint; empty if there is none.
        """
        return (
            f"Losses of each process: {self.losses}; learning rate: {self.rate:.3g}.\n"
            f"Images of each process: {self.images}.\n"
            f"Losses of the iteration before: {before or 'there was none'}.\n"
            f"{_list_causes(cfg, rate=self.rate)}\n"
            f"All this is in {record}, and the state before the step in {self.name}.pth: with this "
            "name in the file last_checkpoint, --resume makes the step again.\n"
            f"Last checkpoint: {checkpoint or 'none was saved'}."
        )


def _list_causes(cfg: CfgNode, *, rate: float) -> str:
    """Return a line with the likely causes of a NaN or infinite loss, and the keys that help."""
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


def image_names(loader: Iterable[Any], place: Place) -> list[str]:
    """Return the names of the images of this process's batch at a place in the stream. Only a
    :class:`TrainingStream` knows the names."""
    if not isinstance(loader, TrainingStream):
        return []
    return [loader.name(index) for _, index in next(loader.batches(place))]


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
