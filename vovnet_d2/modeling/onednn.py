# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Convolutions of oneDNN for inference on a CPU, with packed weights and fused ReLU.

torch.compile uses the same operators. Here they are called without compilation and for any size. On
a GPU, in a graph, with gradients and in mixed precision, plain operators are called.
"""

from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from .convolution import ConvNormAct
from .tracing import has_hooks, is_followed, is_traced
from .training_step import needs_gradient

_SIZES = 64  # sizes of feature maps for which a layer keeps its packed weight


class PackedConv2d(ConvNormAct):
    """A convolution whose weight seldom changes."""

    def _run(self, maps: Any) -> Tensor:
        tensors = maps if isinstance(maps, list) else [maps]
        if not self._is_packable(tensors):
            return super()._run(maps)
        fused = _is_relu(self.activation)
        y = self._convolve(tensors, "relu" if fused else "none")
        return y if fused or self.activation is None else self.activation(y)

    def relu(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` after a ReLU, if the convolution has no activation of its
        own.
        """
        return self._convolve((x,), "relu") if self._is_packable((x,)) else F.relu_(self(x))

    def _is_packable(self, maps: Sequence[Tensor]) -> bool:
        if is_followed(*maps):  # first, because a placeholder of torch.fx has no dtype
            return False
        dtype = self.weight.dtype
        for x in maps:
            if x.dtype != dtype or x.dim() != 4 or x.device.type != "cpu" or x.numel() == 0:
                return False
        return (
            self.norm is None
            and self.weight.device.type == "cpu"
            and not self.weight.is_inference()  # such a tensor does not count its changes
            and dtype in _supported_dtypes()
            and not torch.is_autocast_enabled("cpu")
            and not needs_gradient(self.weight, self.bias, *maps)
        )

    def _convolve(self, maps: Sequence[Tensor], activation: str) -> Tensor:
        x = maps[0] if len(maps) == 1 else torch.cat(list(maps), dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        params = (self.padding, self.stride, self.dilation, self.groups)
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, self._packed_weight(x.shape), self.bias, *params, activation, [], ""
        )

    def _packed_weight(self, shape: torch.Size) -> Tensor:
        """Return the weight as oneDNN packs it for a feature map of this shape.

        Many sizes of feature maps share one packed weight, which is stored once.
        """
        packed = self._packed_before()
        if (known := packed.get(shape)) is not None:
            return known
        weight = torch.ops.mkldnn._reorder_convolution_weight(
            self.weight.contiguous(memory_format=torch.channels_last),
            *(self.padding, self.stride, self.dilation, self.groups),
            shape,
        )
        for other in list(packed.values()):  # a copy, because other threads may add entries
            if _same_order(other, weight):
                weight = other
        if len(packed) >= _SIZES:
            packed.clear()
        packed[shape] = weight
        return weight

    def _packed_before(self) -> dict[torch.Size, Tensor]:
        """Return the packed weights by the shape of the feature map; none if the weight changed."""
        weight = self.weight
        known, version, packed = self.__dict__.get("_packed", (None, None, None))
        if known is not weight or version != weight._version:
            packed = {}
            self.__dict__["_packed"] = weight, weight._version, packed
        return packed

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        # Casts and moves replace the values of a parameter, but not the parameter.
        self.__dict__.pop("_packed", None)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_packed", None)
        return state


class PackedSequential(nn.Sequential):
    """A sequence of modules whose convolutions compute the ReLU that follows them."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for module in self:
                x = module(x)
            return x
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        if is_traced(x):
            return super().forward(x)
        modules: list[Any] = list(self)
        taken = None
        for module, following in zip_longest(modules, modules[1:]):
            if module is taken:
                taken = None
            elif _takes(module, following):
                x, taken = module.relu(x), following
            else:
                x = module(x)
        return x


def _takes(conv: nn.Module, relu: nn.Module | None) -> bool:
    return (
        type(conv) is PackedConv2d
        and conv.norm is conv.activation is None
        and not has_hooks(conv)
        and type(relu) is nn.ReLU
        and _is_relu(relu)
    )


def _is_relu(activation: Any) -> bool:
    """Return True if ``activation`` is a plain ReLU."""
    if type(activation) is nn.ReLU:
        return not has_hooks(activation)
    return activation in (F.relu_, F.relu)


@cache
def _supported_dtypes() -> set[torch.dtype]:
    """Return the dtypes for which this build of torch has the operators and this CPU runs them.

    The operators are private in torch. If a version lacks them, plain convolutions are used.
    """
    return {dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if _works(dtype)}


def _works(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    checks = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    try:
        if dtype in checks and not getattr(torch.ops.mkldnn, checks[dtype])():
            return False
        conv = PackedConv2d(1, 1, 1, device="cpu", dtype=dtype)
        with torch.no_grad():
            for side in (1, 2):  # the second call compares the weight's memory layouts
                x = torch.ones(1, 1, side, side, device="cpu", dtype=dtype)
                conv._convolve((x,), "none")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def _same_order(first: Tensor, second: Tensor) -> bool:
    describe = torch.ops.mkldnn._get_mkldnn_serialized_md
    return torch.equal(describe(first), describe(second))


def pack_convolutions(model: nn.Module) -> None:
    """Make every convolution of ``model`` a :class:`PackedConv2d`.

    Unknown subclasses of ``nn.Conv2d`` stay, because they may compute something else.
    """
    # Only the class changes, so hooks, names and shared modules stay as they are.
    for module in model.modules():
        if type(module) is nn.Sequential:
            module.__class__ = PackedSequential
        elif type(module) in (nn.Conv2d, Conv2d, ConvNormAct) and _is_simple(module):
            module.__class__ = PackedConv2d
            for name in ("norm", "activation"):
                setattr(module, name, getattr(module, name, None))


def _is_simple(conv: nn.Module) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
