# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Functions for a training step that need less memory and time than plain operators.

benchmarks/training_step_on_cpu/what_was_tried.md says what each part saves, and what else was
tried.
"""

import operator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor

from .tracing import call_as_one_node, has_hooks, is_followed

_Params = tuple[Any, Any, Any, int]  # stride, padding, dilation and groups


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return True if autograd records operators on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def convolve(conv: Any, maps: Tensor | list[Tensor]) -> Tensor:
    """Compute ``conv`` of a feature map, or of the concatenation of several, without its norm."""
    params = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if not isinstance(maps, list):
        return F.conv2d(maps, conv.weight, conv.bias, *params)
    tensors = (conv.weight, *maps)
    if is_followed(*tensors) or not needs_gradient(*tensors) or isinstance(conv.padding, str):
        return F.conv2d(torch.cat(maps, dim=1), conv.weight, conv.bias, *params)
    return _ConvolutionOfSeveral.apply(params, conv.weight, conv.bias, *maps)


class _ConvolutionOfSeveral(torch.autograd.Function):
    """A convolution of the concatenation of several feature maps.

    It keeps the feature maps for the backward pass, which are kept anyway, and not their
    concatenation.
    """

    @staticmethod
    def forward(params: _Params, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> Tensor:
        # Autograd records nothing here. Without detach, autocast would keep its copy of a parameter
        # and use it later where a gradient is needed.
        bias = None if bias is None else bias.detach()
        return F.conv2d(torch.cat(maps, dim=1), weight.detach(), bias, *params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.params, weight, ctx.bias, *maps = inputs
        ctx.bias = None if ctx.bias is None else (list(ctx.bias.shape), ctx.bias.dtype)
        ctx.save_for_backward(weight, *maps)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.params
        _, for_weight, for_bias, *for_maps = ctx.needs_input_grad
        shape, bias_dtype = ctx.bias or (None, None)
        # Autocast may have cast the operands of the convolution.
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_y,
            torch.cat(maps, dim=1).to(grad_y.dtype),
            weight.to(grad_y.dtype),
            shape,
            *(stride, padding, dilation),
            False,  # not transposed
            [0, 0],
            groups,
            [any(for_maps), for_weight, for_bias],
        )
        grads = grad_x.split([x.shape[1] for x in maps], dim=1) if any(for_maps) else maps
        return (
            None,
            grad_weight.to(weight.dtype) if for_weight else None,
            grad_bias.to(bias_dtype) if for_bias else None,
            *(g.to(x.dtype) if n else None for g, x, n in zip(grads, maps, for_maps, strict=True)),
        )


def normalize(norm: Any, x: Tensor) -> Tensor:
    """Apply ``norm`` to ``x``; a frozen batch norm in training scales and shifts ``x`` in place."""
    frozen = type(norm) is FrozenBatchNorm2d and not has_hooks(norm)
    if frozen and not is_followed(x) and needs_gradient(x):
        scale, shift = _constants(norm, x.dtype)
        return x.mul_(scale).add_(shift)
    return call_as_one_node(norm, x)


def _constants(norm: FrozenBatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and shift, each (channels, 1, 1), which are kept until a buffer changes."""
    buffers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    # Tensors of inference mode do not count their changes.
    if any(buffer.is_inference() for buffer in buffers):
        return _compute_constants(norm, dtype)
    state = (dtype, norm.eps, *(buffer._version for buffer in buffers))
    known = _KNOWN.get(norm)
    if known is None or known.state != state or any(map(operator.is_not, known.buffers, buffers)):
        known = _Known(state, buffers, _compute_constants(norm, dtype))
        _KNOWN[norm] = known
    return known.constants


def _compute_constants(norm: FrozenBatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return scale.to(dtype)[:, None, None], shift.to(dtype)[:, None, None]


class _Known(NamedTuple):
    """The constants of a norm, and the buffers and their versions that they were computed from."""

    state: tuple[Any, ...]
    buffers: tuple[Tensor, ...]
    constants: tuple[Tensor, Tensor]


# Copies and pickles of norms stay those of Detectron2, because the constants are kept here.
_KNOWN: WeakKeyDictionary[FrozenBatchNorm2d, _Known] = WeakKeyDictionary()
