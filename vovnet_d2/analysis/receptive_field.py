# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The receptive field: the part of the input that one position of a map depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["ReceptiveFields"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Axis:
    """Position i of the map reads the input's positions ``i * step + low`` to
    ``i * step + high``."""

    step: int = 1
    low: int = 0
    high: int = 0

    def window(self, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
        return _Axis(
            self.step * stride,
            self.low - self.step * padding,
            self.high + self.step * (dilation * (kernel - 1) - padding),
        )


class ReceptiveFields:
    """Follows the receptive field through a forward pass, by arithmetic on the operators.

    Convolutions, pooling and padding widen or shift it; where maps are added or concatenated, it is
    the smallest interval that holds all of theirs. What a map-wide average gates, as in
    squeeze-excitation, keeps the field that it has without the gate. After an operator that is
    not known here, such as upsampling or deformable convolution, it is undefined.
    """

    def __init__(self, image: Tensor):
        """
        Args:
            image: the input, (N, C, H, W).
        """
        # None stands for undefined; tensors that do not depend on the image's position, such as
        # parameters and map-wide averages, are not in here.
        self._fields = WeakTensorKeyDictionary()
        self._fields[image] = (_Axis(), _Axis())

    def of(self, tensor: Tensor) -> tuple[int, int] | None:
        """(height, width) in pixels that a position of ``tensor`` sees, not cut at the border of
        the image; None where it is undefined."""
        field = self._fields.get(tensor)
        if field is None:
            return None
        rows, columns = field
        return rows.high - rows.low + 1, columns.high - columns.low + 1

    def observe(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fields = [self._fields[t] for t in inputs if t in self._fields]
        packet = func._overloadpacket
        if not fields or (packet == aten.mean and _is_map_wide(args)):
            return
        field = None
        if None not in fields:
            if packet in _WINDOWS:
                windows = _WINDOWS[packet](args)
                field = _slide(fields[0], *windows) if windows else None
            elif torch.Tag.pointwise in func.tags or packet in _PASSED_ON:
                field = _union(fields)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._fields[tensor] = field


def _is_map_wide(args: tuple[Any, ...]) -> bool:
    dims = args[1] if len(args) > 1 and args[1] is not None else range(args[0].dim())
    return {d % args[0].dim() for d in dims} >= {2, 3}


# An operator to its windows: kernel, stride, padding and dilation, each (rows, columns).
_Windows = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]


def _convolution(args: tuple[Any, ...]) -> _Windows | None:
    _, weight, _, stride, padding, dilation, transposed = args[:7]
    return None if transposed else (weight.shape[2:], stride, padding, dilation)


def _max_pool(args: tuple[Any, ...]) -> _Windows:
    _, kernel, stride, padding, dilation = _with_defaults(args, 5)
    return kernel, stride or kernel, padding or (0,), dilation or (1,)


def _avg_pool(args: tuple[Any, ...]) -> _Windows:
    _, kernel, stride, padding = _with_defaults(args, 4)
    return kernel, stride or kernel, padding or (0,), (1,)


def _pad(args: tuple[Any, ...]) -> _Windows:
    # [left, right, top, bottom, ...]; what is added at the far end moves nothing.
    left, _, top, _ = [*args[1], 0, 0][:4]
    return (1,), (1,), (top, left), (1,)


def _with_defaults(args: tuple[Any, ...], count: int) -> list[Any]:
    return [*args[:count], *[None] * (count - len(args))]


_WINDOWS: dict[Any, Callable[[tuple[Any, ...]], _Windows | None]] = {
    aten.convolution: _convolution,
    aten.max_pool2d_with_indices: _max_pool,
    aten.avg_pool2d: _avg_pool,
    aten.constant_pad_nd: _pad,
}

# Not tagged as pointwise in torch, but without effect on where a position's input lies. Norms
# count here as in inference with batch norm; group norm's statistics are map-wide, as a gate's.
_PASSED_ON = {
    aten.cat,
    aten.native_batch_norm,
    aten._native_batch_norm_legit_no_training,
    aten.cudnn_batch_norm,
    aten.native_group_norm,
    aten.hardswish,
    aten.detach,
    aten.alias,
    aten.split,
    aten.split_with_sizes,
}


def _slide(field: tuple[_Axis, _Axis], *windows: Sequence[int]) -> tuple[_Axis, _Axis] | None:
    kernel, stride, padding, dilation = ([*w, *w][:2] for w in windows)
    axes = zip(field, kernel, stride, padding, dilation, strict=True)
    rows, columns = (axis.window(*window) for axis, *window in axes)
    return rows, columns


def _union(fields: list[tuple[_Axis, _Axis]]) -> tuple[_Axis, _Axis] | None:
    if len({(rows.step, columns.step) for rows, columns in fields}) > 1:
        return None
    rows, columns = (
        _Axis(axes[0].step, min(a.low for a in axes), max(a.high for a in axes))
        for axes in zip(*fields, strict=True)
    )
    return rows, columns
