# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The memory access cost counts what a layer reads and writes (VoVNet paper, section 2.1).

Equation 1 of the paper, for a k x k convolution from c_in to c_out channels on a feature map of
h x w, is ``h w (c_in + c_out) + k^2 c_in c_out``: each element of the input, the output and the
weights counts once. Among layers of equal work ``B = k^2 h w c_in c_out``, the least value is
``2 sqrt(h w B / k^2) + B / (h w)``, for c_in = c_out.

Costs are in elements, not bytes, and for one image unless the input is a batch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.ops  # noqa: F401, registers torch.ops.torchvision.deform_conv2d
from torch import Tensor
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class LayerCost:
    """The cost of one convolution or matrix product.

    Attributes:
        read: elements of the input.
        written: elements of the output. fvcore and the papers call their sum activations.
        weights: elements of the weights, without bias.
        multiply_adds: number of multiplications with one addition each.
    """

    read: int
    written: int
    weights: int
    multiply_adds: int

    @property
    def memory_access(self) -> int:
        """Return equation 1 of the paper, for any stride, number of groups and shape."""
        return self.read + self.written + self.weights

    @property
    def lower_bound(self) -> float:
        """Return the least memory access of a layer with the same work, weights and sizes.

        The product of input and output elements is then fixed, so their sum is least if they are
        equal. For a convolution of stride 1 this is the bound of the paper. A convolution of stride
        s reaches it with c_out = s^2 c_in.
        """
        return 2 * math.sqrt(self.read * self.written) + self.weights


def convolution_cost(
    height: int, width: int, in_channels: int, out_channels: int, kernel_size: int
) -> LayerCost:
    """Return the cost of a convolution of stride 1 with padding."""
    pixels, weights = height * width, kernel_size**2 * in_channels * out_channels
    return LayerCost(pixels * in_channels, pixels * out_channels, weights, pixels * weights)


def layer_cost(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> LayerCost | None:
    """Return the cost of an operator that a ``TorchDispatchMode`` has seen, or None for operators
    that do not count.

    Convolutions (also transposed and deformable ones), fully-connected layers and attention count.
    In a product of two computed tensors, the second counts as weights.
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
