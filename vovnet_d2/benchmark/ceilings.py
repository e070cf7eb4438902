# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at most, measured beside the networks, and the time that a network would
need at that pace: the sum over its layers of the larger of the time for their operations and the
time for their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..analysis.memory_access import LayerCost
from ..modeling.onednn import PackedConv2d
from .protocol import time_interleaved

__all__ = ["Ceiling", "copy_ceiling", "floor_seconds", "matrix_ceiling"]

_MATRIX_SIZE = {"cuda": 8192, "cpu": 1536}
_CONVOLUTIONS = ((128, 128), (256, 64), (512, 32))  # channels, and height and width of the maps
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**28}


@dataclass(frozen=True)
class Ceiling:
    """
    Attributes:
        call: what is timed.
        work: its multiply-adds, or the bytes that it reads and writes.
        description: what it is, with its size.
    """

    call: Callable[[], object]
    work: float
    description: str


def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """A product of two square matrices, large enough to keep the device busy; on a CPU the fastest
    of several 3x3 convolutions instead where that is faster, as they come from another library."""
    choices = [_product(device, dtype)]
    if device.type == "cpu":
        choices += [_convolution(dtype, *shape) for shape in _CONVOLUTIONS]
    calls = {choice.description: choice.call for choice in choices}
    times = time_interleaved(calls, device=device, warmup=1, repeats=3)
    return max(choices, key=lambda choice: choice.work / min(times[choice.description]))


def _product(device: torch.device, dtype: torch.dtype) -> Ceiling:
    size = _MATRIX_SIZE[device.type]
    # Random numbers: zeros take less power, and so run faster on a GPU.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Ceiling(lambda: torch.mm(a, b, out=out), size**3, f"product of {size}x{size} matrices")


def _convolution(dtype: torch.dtype, channels: int, size: int) -> Ceiling:
    maps = torch.randn(1, channels, size, size).to(dtype, memory_format=torch.channels_last)
    # With its weight in oneDNN's order: otherwise each call would put it into that order.
    conv = PackedConv2d(channels, channels, 3, padding=1, bias=False).to(dtype)
    conv.requires_grad_(False)
    return Ceiling(
        lambda: conv(maps),
        size**2 * 9 * channels**2,
        f"3x3 convolution of {channels} channels on {size}x{size}",
    )


def copy_ceiling(device: torch.device) -> Ceiling:
    """A copy from memory to memory, beyond any cache."""
    size = _COPIED_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceiling(lambda: target.copy_(source), 2 * size, f"copy of {size / 2**20:.0f} MiB")


def floor_seconds(
    layers: Sequence[LayerCost],
    *,
    batch: int,
    element_size: int,
    multiply_adds_per_second: float,
    bytes_per_second: float,
) -> float:
    """The least time for ``layers``, each on its own.

    Convolutions, fully-connected layers and attention count, as in
    :data:`~vovnet_d2.analysis.complexity.CONVENTIONS`; pooling, gates and additions do not.

    Args:
        layers: for one image.
        element_size: bytes of one number.
    """
    return sum(
        max(
            batch * layer.multiply_adds / multiply_adds_per_second,
            (batch * (layer.read + layer.written) + layer.weights)
            * element_size
            / bytes_per_second,
        )
        for layer in layers
    )
