# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Convolution, norm and ReLU as one function that keeps little for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .tracing import call_as_one_node, is_symbolic, is_traced

__all__ = [
    "ConvNormAct",
    "Geometry",
    "convolve",
    "has_hooks",
    "is_relu",
    "needs_gradient",
]


class Geometry(NamedTuple):
    """Of a convolution, as :class:`torch.nn.Conv2d` names it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]


class ConvNormAct(Conv2d):
    """Convolution of one map, or of the concatenation of several, with norm and ReLU.

    A frozen batch norm becomes part of the weight and bias in each forward pass, and so of the
    gradient: a map is read and written once, not once more per norm, and rounded less often. Only
    the maps that come in and the one that goes out are kept for the backward pass, which
    concatenates and folds anew.
    """

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor:
        """
        Args:
            maps: one feature map or several, each (N, channels, H, W); their channels together are
                ``in_channels``.
        """
        if not torch.jit.is_scripting():
            return self._run([maps] if not isinstance(maps, list) else maps)
        x = maps if isinstance(maps, Tensor) else torch.cat(maps, dim=1)
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _run(self, maps: list[Tensor]) -> Tensor:
        """Compute what :meth:`forward` returns, outside of TorchScript, which cannot express it."""
        scale, bias, norm = None, self.bias, self.norm
        symbolic = is_symbolic(maps[0])
        if type(norm) is FrozenBatchNorm2d and not symbolic and not has_hooks(norm):
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            shift = norm.bias - norm.running_mean * scale
            bias = shift if bias is None else torch.addcmul(shift, bias, scale)
            norm = None
        relu = norm is None and is_relu(self.activation)
        x = convolve(maps, self.weight, scale, bias, Geometry.of(self), relu=relu)
        if norm is not None:
            x = call_as_one_node(norm, x)
        if self.activation is not None and not relu:
            x = self.activation(x)
        return x


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to know of its calls, which it then has to have."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_relu(activation: Any) -> bool:
    """Whether it is ReLU and no more."""
    if type(activation) is nn.ReLU:
        return not has_hooks(activation)
    return activation in (F.relu_, F.relu)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def convolve(
    maps: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    relu: bool,
) -> Tensor:
    """Convolution of the concatenation of ``maps``, each output channel scaled, and ReLU.

    Args:
        weight: (out, in / groups, height, width), in any precision: where it is another than the
            maps', it is scaled first and rounded then.
        scale: (out,), or None.
        bias: (out,), added after scaling; None only without ``scale``.
    """
    if is_symbolic(maps[0]):
        y = F.conv2d(_concatenate(maps), weight, bias, *geometry)
        return F.relu(y) if relu else y
    device = maps[0].device.type
    # The meta device has no autocast. torch.amp.is_autocast_available would tell, but torch.compile
    # of torch 2.6 cannot look into it.
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        maps = [x if x.dtype == torch.float64 else x.to(dtype) for x in maps]
    if needs_gradient(weight, bias, *maps) and not is_traced():
        return _Convolution.apply(geometry, relu, weight, scale, bias, *maps)
    return _forward(maps, weight, scale, bias, geometry, relu)


def _forward(
    maps: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    x = _concatenate(maps)
    bias = None if bias is None else bias.to(x.dtype)
    if scale is None or is_traced() or _weight_is_smaller(weight, x, geometry):
        y = F.conv2d(x, _scale(weight, scale, dim=0).to(x.dtype), bias, *geometry)
    else:
        assert bias is not None, "a norm has a shift"
        y = F.conv2d(x, weight.to(x.dtype), None, *geometry)
        scale, shift = (t.to(x.dtype)[:, None, None] for t in (scale, bias))
        torch.addcmul(shift, y, scale, out=y)
    return F.relu_(y) if relu else y


def _concatenate(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(list(maps), dim=1)


def _weight_is_smaller(weight: Tensor, x: Tensor, geometry: Geometry) -> bool:
    """Than the map that comes out, so that it is the cheaper one to scale."""
    pixels = x.shape[0] * math.prod(x.shape[2:]) // math.prod(geometry.stride)
    return weight[0].numel() <= pixels


def _scale(x: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    """The slices of a tensor along ``dim`` times a number each."""
    if scale is None:
        return x
    return x * scale.view([-1 if d == dim else 1 for d in range(x.dim())])


class _Convolution(torch.autograd.Function):
    """:func:`_forward` with a backward pass that concatenates and folds anew."""

    @staticmethod
    def forward(
        geometry: Geometry,
        relu: bool,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        *maps: Tensor,
    ) -> Tensor:
        return _forward(maps, weight, scale, bias, geometry, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry, ctx.relu, weight, scale, bias, *maps = inputs
        ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)
        ctx.save_for_backward(weight, scale, output if ctx.relu else None, *maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        weight, scale, output, *maps = ctx.saved_tensors
        _, _, for_weight, for_scale, for_bias, *for_maps = ctx.needs_input_grad
        assert not for_scale, "the statistics of a frozen norm take no gradient"
        if ctx.relu:
            gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
        x = _concatenate(maps)
        if scale is not None and not _weight_is_smaller(weight, x, ctx.geometry):
            assert not for_bias, "the bias under a frozen norm has a gradient of its own"
            gradient, scale = _scale(gradient, scale.to(gradient.dtype), dim=1), None
        size, dtype = ctx.bias or (None, None)
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            x,
            _scale(weight, scale, dim=0).to(x.dtype),
            size,
            *ctx.geometry[:3],
            False,  # not transposed
            [0, 0],
            ctx.geometry.groups,
            [any(for_maps), for_weight, for_bias],
        )
        if for_weight:
            of_weight = _scale(of_weight.to(weight.dtype), scale, dim=0)
        if for_bias:
            of_bias = of_bias.to(dtype)
        of_maps = of_x.split([m.shape[1] for m in maps], dim=1) if any(for_maps) else maps
        of_maps = [g if needed else None for g, needed in zip(of_maps, for_maps, strict=True)]
        return None, None, of_weight, None, of_bias, *of_maps
