# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory access cost: how many numbers a layer reads and writes (VoVNet paper, section 2.1).

The paper's equation 1, for a k x k convolution from c_in to c_out channels on a map of h x w, is
``h w (c_in + c_out) + k^2 c_in c_out``: the input, the output and the weights, each touched once.
Among the layers of equal work ``B = k^2 h w c_in c_out`` it is least where c_in = c_out, and then
``2 sqrt(h w B / k^2) + B / (h w)``.

Costs are in elements, not bytes, and for one image unless the input is a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.ops  # noqa: F401, registers torch.ops.torchvision.deform_conv2d
from torch import Tensor
from torch.utils.flop_counter import flop_registry

__all__ = ["LayerCost", "convolution_cost", "layer_cost"]


@dataclass(frozen=True)
class LayerCost:
    """What one convolution or matrix product reads, writes and computes.

    Attributes:
        read: elements of the input.
        written: elements of the output. Summed over layers this is what fvcore and the papers call
            activations.
        weights: elements of the weights, without bias.
        multiply_adds: multiplications, each with its addition.
    """

    read: int
    written: int
    weights: int
    multiply_adds: int

    @property
    def memory_access(self) -> int:
        """The paper's equation 1, for any stride, group number and shape."""
        return self.read + self.written + self.weights

    @property
    def lower_bound(self) -> float:
        """The least memory access of a layer with the same work, weights and map sizes.

        The product of input and output elements is then fixed, so that their sum is least where
        they are equal. For a convolution of stride 1 this is the paper's bound; one of stride s
        would meet it at c_out = s^2 c_in.
        """
        return 2 * math.sqrt(self.read * self.written) + self.weights


def convolution_cost(
    height: int, width: int, in_channels: int, out_channels: int, kernel_size: int
) -> LayerCost:
    """The cost of a convolution of stride 1, with padding, on a map of ``height`` x ``width``."""
    pixels, weights = height * width, kernel_size**2 * in_channels * out_channels
    return LayerCost(pixels * in_channels, pixels * out_channels, weights, pixels * weights)


def layer_cost(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> LayerCost | None:
    """The cost of an operator that a ``TorchDispatchMode`` has seen.

    Counted are convolutions (transposed and deformable ones too), fully-connected layers and
    attention; in a product of two computed tensors, the second counts as weights. Norms,
    activations, pooling and additions count nothing.

    Returns:
        None for an operator that is not counted.
    """
    packet = getattr(func, "_overloadpacket", None)
    if packet == torch.ops.torchvision.deform_conv2d:
        features, weight = args[:2]
        multiply_adds = out.numel() * weight[0].numel()
        return LayerCost(features.numel(), out.numel(), weight.numel(), multiply_adds)
    count: Callable[..., int] | None = flop_registry.get(packet)
    if count is None:
        return None
    # torch counts a multiply-add as two operations.
    multiply_adds = count(*args, **kwargs, out_val=out) // 2
    tensors = [a for a in args if isinstance(a, Tensor)]
    if packet in _BIAS_FIRST:
        tensors = tensors[1:]
    elif packet in _BIAS_THIRD:
        tensors = tensors[:2]
    written = out[0] if isinstance(out, tuple) else out
    return LayerCost(
        tensors[0].numel(), written.numel(), sum(t.numel() for t in tensors[1:]), multiply_adds
    )


_BIAS_FIRST = {torch.ops.aten.addmm, torch.ops.aten.baddbmm}
_BIAS_THIRD = {torch.ops.aten.convolution, torch.ops.aten._convolution}
