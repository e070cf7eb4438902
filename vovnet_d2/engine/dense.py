# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""State of Detectron2's dense detectors (RetinaNet, FCOS) that their state dicts lack.

Each process keeps the average number of positive anchors, which normalises the losses.
"""

from collections.abc import Iterator
from typing import Any

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn


def read_loss_normalizers(model: nn.Module) -> dict[str, float]:
    """Return the normalizers of this process, by the name of the detector in ``model``.

    The result is empty before the first step.
    """
    return {
        name: float(detector.loss_normalizer)
        for name, detector in _dense_detectors(model)
        if hasattr(detector, "loss_normalizer")
    }


def write_loss_normalizers(model: nn.Module, of_processes: list[dict[str, float]]) -> None:
    """Restore the loss normalizers of a training. Another number of processes gets their mean."""
    if len(of_processes) == comm.get_world_size():
        of_processes = [of_processes[comm.get_rank()]]
    for name, detector in _dense_detectors(model):
        values = [values[name] for values in of_processes if name in values]
        if values:
            detector.loss_normalizer = sum(values) / len(values)


def _dense_detectors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, DenseDetector))
