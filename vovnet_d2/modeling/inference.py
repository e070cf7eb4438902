# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Preparation of a backbone or a detector for inference."""

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import UserValueError
from .fusion import fuse_norms
from .onednn import pack_convolutions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.inference_mode(False)  # tensors of inference mode do not count their changes
def optimize_for_inference(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    compile: bool = False,
) -> nn.Module:
    """Return a copy of a model for inference, with the same interface and the same results.

    Batch norms are fused into convolutions; see :func:`.fusion.fuse_norms`. In float32, feature
    maps are at most twice as far from float64 as those of the model (root mean square). On a CPU,
    oneDNN computes the convolutions with weights that are packed beforehand. Nothing is compiled
    for that, so images of any size run at full speed at once. Graphs (export, tracing,
    ``torch.compile``) get plain operators.

    Do not change the weights of the copy through ``data``. On a CPU, a program with memory to spare
    can first call :func:`.allocation.keep_freed_memory`, which makes inference faster.

    Args:
        model: a backbone, or a detector of Detectron2's with a backbone. It is not changed.
        dtype: the dtype of the backbone: float32, bfloat16 or float16. Its input, its feature maps
            and the heads of a detector stay in float32, because boxes need it. In a V-19-slim-eSE
            trained on handwritten digits, feature maps change by at most 0.7 % (bfloat16) or 0.09 %
            (float16) of their root mean square, and no predicted digit changes.
        memory_format: memory format of the weights, which feature maps take from them.
        compile: let torch.compile compile the backbone once for each size of image, with its
            weights as constants, which needs calls without gradients. After eight sizes, those of
            other networks in the process included, further ones are not compiled. Later changes of
            the weights have no effect. On a CPU the compiler takes up to a minute for a size, a
            V-19-slim-dw-eSE then takes an eighth less time, and larger networks 2 to 6 % less
            (benchmarks/inference_and_training_on_cpu). On a GPU the kernels of each size are
            recorded as a CUDA graph; the gain has not been measured.

    Raises:
        ValueError: another ``dtype``.
    """
    check_dtype(dtype)
    # Norms are fused in float32, and the result is cast.
    model = copy.deepcopy(model).eval().requires_grad_(False).float()
    fuse_norms(model)
    model.to(memory_format=memory_format)
    for module in model.modules():
        if isinstance(module, BaseKeypointRCNNHead):  # it needs contiguous feature maps
            module.to(memory_format=torch.contiguous_format)
    backbone = getattr(model, "backbone", model)
    if dtype != torch.float32:
        backbone.to(dtype)
        backbone.register_forward_pre_hook(
            partial(_cast_input, dtype=dtype, memory_format=memory_format)
        )
        backbone.register_forward_hook(_cast_maps)
    if memory_format == torch.channels_last:
        pack_convolutions(model)
    if compile:
        compile_forward(backbone)
    return model


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError if networks do not compute in a dtype."""
    if dtype not in _DTYPES:
        choices = ", ".join(map(str, _DTYPES))
        raise UserValueError(f"dtype is {dtype!r}: choose from {choices}.")


def compile_forward(backbone: Any) -> None:
    """Let torch.compile compile the forward pass for each size, with the weights as constants."""
    backbone.forward = _CompiledForward(backbone)


class _CompiledForward:
    """Runs the compiled forward pass of a module.

    A copy of the module, and the module in a file, have its plain forward pass, because the
    compiled one has the weights of this module.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._on_gpu = any(tensor.is_cuda for tensor in module.parameters())
        self._forward = torch.compile(
            module.forward, dynamic=False, options={"triton.cudagraphs": self._on_gpu}
        )

    def __call__(self, *images: torch.Tensor) -> Any:
        with _constant_weights():
            maps = self._forward(*images)
        # The next call writes into the outputs of a CUDA graph.
        return tree_map(_clone, maps) if self._on_gpu else maps

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_forward, (self._module,)


def _plain_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


def _constant_weights() -> AbstractContextManager[object]:
    """Let the compiler treat weights as constants. As an option of ``torch.compile`` this setting
    would come too late: the weights would be arguments already."""
    from torch._inductor import config

    return config.patch(freezing=True) if hasattr(config, "freezing") else nullcontext()


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _cast_input(
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[torch.Tensor, ...]:
    # Two calls, because one call for both takes torch twice as long on a CPU. The backbone itself
    # refuses integers.
    return tuple(
        x.to(dtype).contiguous(memory_format=memory_format) if x.is_floating_point() else x
        for x in args
    )


def _cast_maps(module: nn.Module, args: tuple[torch.Tensor, ...], maps: Any) -> Any:
    return tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, maps)
