# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What Detectron2's dense detectors (RetinaNet, FCOS) keep from step to step outside their state
dict: the average number of positive anchors, which normalises their losses, in each process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn

__all__ = ["read_loss_normalizers", "write_loss_normalizers"]


def read_loss_normalizers(model: nn.Module) -> dict[str, float]:
    """Those of this process, by the detector's name in ``model``; empty before the first step."""
    return {
        name: float(detector.loss_normalizer)
        for name, detector in _dense_detectors(model)
        if hasattr(detector, "loss_normalizer")
    }


def write_loss_normalizers(model: nn.Module, of_processes: list[dict[str, float]]) -> None:
    """Go on with those of a training; in another number of processes, with their mean."""
    if len(of_processes) == comm.get_world_size():
        of_processes = [of_processes[comm.get_rank()]]
    for name, detector in _dense_detectors(model):
        values = [values[name] for values in of_processes if name in values]
        if values:
            detector.loss_normalizer = sum(values) / len(values)


def _dense_detectors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, DenseDetector))
