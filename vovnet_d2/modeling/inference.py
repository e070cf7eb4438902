# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A backbone or a detector made ready for inference."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead
from torch import nn
from torch.utils._pytree import tree_map

from .folding import fold_norms
from .onednn import pack_convolutions

__all__ = ["optimize_for_inference"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.inference_mode(False)  # in which weights would not tell of their changes
def optimize_for_inference(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    compile: bool = False,
) -> nn.Module:
    """A copy of a model, with its weights as they are now, that only infers, with the same
    interface and the same results.

    Every batch norm behind a convolution that nothing else reads becomes part of it, as
    :func:`.folding.fold_norms` tells. In float32, results are about as exact as the model's own:
    maps are at most twice as far from those of float64 (root mean square). On a CPU, convolutions
    are oneDNN's with weights laid out beforehand, so that nothing is compiled and any size runs at
    full speed from its first image on. Graphs (export, tracing, ``torch.compile``) get plain
    operators. Weights are not to be changed through ``data``. A program that infers on a CPU can
    call :func:`.allocation.keep_freed_memory` first, which is faster where memory is no matter.

    Args:
        model: a backbone, or a detector of Detectron2's with one. It is left as it is.
        dtype: what the backbone computes in: float32, bfloat16 or float16. Its input and its maps
            are float32 all the same, as are a detector's heads, whose boxes need it. The maps of a
            V-19-slim-eSE that had learned to tell handwritten digits, 89 % of unseen ones right,
            were off by 0.7 % (bfloat16) and 0.09 % (float16) of their root mean square at most,
            and each of 397 images was told as in float32.
        memory_format: layout of the weights, which the maps then follow.
        compile: whether torch.compile takes the backbone, at its first call and with sizes left
            open. On a CPU it takes a minute and gains nothing; what it gains on a GPU has not been
            measured yet. Compiled for one size alone and with frozen weights, which is not offered
            here, V-19-slim-dw-eSE is faster on a CPU by an eighth, larger ones by 2 to 6 %
            (benchmarks/inference_and_training_on_cpu).

    Raises:
        ValueError: another ``dtype``.
    """
    if dtype not in _DTYPES:
        choices = ", ".join(map(str, _DTYPES))
        raise ValueError(f"Inference in {dtype} is not supported: choose from {choices}.")
    # In float32 first, so that nothing that is folded is rounded to less.
    model = copy.deepcopy(model).eval().requires_grad_(False).float()
    fold_norms(model)
    model.to(memory_format=memory_format)
    for module in model.modules():
        if isinstance(module, BaseKeypointRCNNHead):  # which takes its maps to be contiguous
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
        backbone.compile(dynamic=True)
    return model


def _cast_input(
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[torch.Tensor, ...]:
    # One after the other, as torch takes twice as long for both at once on a CPU. The backbone
    # refuses integers.
    return tuple(
        x.to(dtype).contiguous(memory_format=memory_format) if x.is_floating_point() else x
        for x in args
    )


def _cast_maps(module: nn.Module, args: tuple[torch.Tensor, ...], maps: Any) -> Any:
    return tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, maps)
