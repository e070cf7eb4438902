# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The order of dimensions in memory that a network is trained in."""

from typing import TypeVar

import torch
from detectron2.config import CfgNode
from torch import nn


def prefers_channels_last(device: str | torch.device) -> bool:
    """Return True if a training on ``device`` is faster in channels-last order."""
    if torch.device(device).type != "cpu":
        return True
    # Without AVX-512, oneDNN's gradients of weights are slow in this order: with oneDNN held to
    # AVX2, a step of the plain V-39-eSE took 1.12 times as long as in NCHW, with AVX-512 0.94 times
    # (AMD EPYC, 2026-11-26: benchmarks/training_step_on_cpu/what_was_tried.md).
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


_Model = TypeVar("_Model", bound=nn.Module)


def to_memory_format(model: _Model, cfg: CfgNode) -> _Model:
    """Bring the weights of ``model`` to the order that ``MODEL.CHANNELS_LAST`` asks for.

    The feature maps follow the weights. None, the default, leaves the choice to device and CPU;
    keypoint heads need the usual order.
    """
    last = cfg.MODEL.CHANNELS_LAST
    if last is None:
        last = not cfg.MODEL.KEYPOINT_ON and prefers_channels_last(cfg.MODEL.DEVICE)
    return model.to(memory_format=torch.channels_last) if last else model
