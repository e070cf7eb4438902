# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on GPUs and CPUs, for training and evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.config import CfgNode

__all__ = ["autocast", "autocast_dtype"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast_dtype(cfg: CfgNode) -> torch.dtype:
    """What ``SOLVER.AMP.DTYPE`` stands for on ``MODEL.DEVICE``.

    Raises:
        ValueError: the name is unknown, or the device does not compute in that type.
    """
    name = cfg.SOLVER.AMP.DTYPE
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    if name == "auto":
        return torch.float16 if on_gpu else torch.bfloat16
    if name not in _DTYPES:
        raise ValueError(
            f"SOLVER.AMP.DTYPE {name!r} is none of {', '.join(map(repr, ('auto', *_DTYPES)))}."
        )
    if name == "float16" and not on_gpu:
        raise ValueError("SOLVER.AMP.DTYPE float16 needs a GPU: on a CPU use bfloat16 or auto.")
    if name == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise ValueError("This GPU does not compute in bfloat16: set SOLVER.AMP.DTYPE to float16.")
    return _DTYPES[name]


def autocast(cfg: CfgNode, *, enabled: bool) -> AbstractContextManager[None]:
    """A context of mixed precision on ``MODEL.DEVICE``; without effect unless ``enabled``."""
    if not enabled:
        return nullcontext()
    return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, autocast_dtype(cfg))
