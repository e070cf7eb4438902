# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on GPUs and CPUs, for training and evaluation."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, KRCNNConvDeconvUpsampleHead
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import UserValueError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast_dtype(cfg: CfgNode) -> torch.dtype:
    """Return the dtype that ``SOLVER.AMP.DTYPE`` means on ``MODEL.DEVICE``. Raise ValueError if the
    name is unknown, or if the device does not compute in that type."""
    name = cfg.SOLVER.AMP.DTYPE
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.float16 if on_gpu and not has_bfloat16 else torch.bfloat16
    if name not in _DTYPES:
        raise UserValueError(
            f"SOLVER.AMP.DTYPE is {name!r}: choose from {', '.join(map(repr, ('auto', *_DTYPES)))}."
        )
    if name == "float16" and not on_gpu:
        raise UserValueError("SOLVER.AMP.DTYPE float16 needs a GPU: on a CPU use bfloat16 or auto.")
    if name == "bfloat16" and on_gpu and not has_bfloat16:
        raise UserValueError(
            "This GPU does not compute in bfloat16: set SOLVER.AMP.DTYPE to float16."
        )
    return _DTYPES[name]


def autocast(cfg: CfgNode, *, enabled: bool) -> AbstractContextManager[None]:
    """Compute in mixed precision on ``MODEL.DEVICE``, in a context; without effect unless
    ``enabled``.
    """
    if not enabled:
        return nullcontext()
    return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, autocast_dtype(cfg))


def backend_dtype(cfg: CfgNode) -> torch.dtype:
    """Return the dtype of an evaluation in a backend, which ``TEST.AMP.ENABLED`` decides."""
    return autocast_dtype(cfg) if cfg.TEST.AMP.ENABLED else torch.float32


def predict_in_float32(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Let a detector compute boxes, scores and keypoints in float32 in mixed precision.

    Without this, Detectron2 uses the dtype of the last convolution. In bfloat16, coordinates beyond
    256 pixels are multiples of 2, and those beyond 512 multiples of 4: regions are pooled at such
    boxes, and keypoints lie at such pixels. Only the outputs for boxes, scores and keypoints, and
    the inputs of pooling, are cast. The layers of all heads, masks and semantic segmentation stay
    in half precision.

    Args:
        model: a detector, which gets hooks if the config trains or evaluates in mixed precision.

    Returns:
        the same model.
    """
    if not (cfg.SOLVER.AMP.ENABLED or cfg.TEST.AMP.ENABLED):
        return model
    modules: Any = model.modules()
    for module in modules:
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(_cast_inputs)
        elif isinstance(module, RPN):
            module.rpn_head.register_forward_hook(_cast_outputs)
        elif isinstance(module, DenseDetector):
            module.head.register_forward_hook(_cast_outputs)
        elif isinstance(module, FastRCNNOutputLayers):
            module.register_forward_hook(_cast_outputs)
        elif isinstance(module, KRCNNConvDeconvUpsampleHead):
            module.score_lowres.register_forward_hook(_cast_outputs)
    return model


def _cast_inputs(module: nn.Module, args: Any) -> Any:
    return tree_map(_to_float32, args)


def _cast_outputs(module: nn.Module, args: Any, outputs: Any) -> Any:
    return tree_map(_to_float32, outputs)


def _to_float32(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_float else value
