# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A GPU's memory that does not suffice, told in a sentence with the ways out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode

__all__ = ["GpuMemoryError", "explain_lack_of_memory"]


class GpuMemoryError(RuntimeError):
    """A GPU has too little memory for the run; the message says what needs less."""


@contextmanager
def explain_lack_of_memory(cfg: CfgNode, *, training: bool) -> Iterator[None]:
    """Say what needs less memory, where a GPU runs out of it in the context.

    Raises:
        GpuMemoryError: it does.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        ways = _ways_out(cfg, training=training)
        raise GpuMemoryError(f"{reason}. These need less memory: {'; '.join(ways)}.") from error


def _ways_out(cfg: CfgNode, *, training: bool) -> list[str]:
    if not training:
        ways = ["smaller images (INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST)"]
        return ways if cfg.TEST.AMP.ENABLED else [*ways, "mixed precision (TEST.AMP.ENABLED True)"]
    batch = cfg.SOLVER.IMS_PER_BATCH
    ways = [f"fewer images per step (SOLVER.IMS_PER_BATCH below {batch}, with --auto-scale-lr)"]
    if not cfg.SOLVER.AMP.ENABLED:
        ways.append("mixed precision (SOLVER.AMP.ENABLED True)")
    if not cfg.MODEL.VOVNET.CHECKPOINT_BLOCKS and "vovnet" in cfg.MODEL.BACKBONE.NAME:
        ways.append("activation checkpointing (MODEL.VOVNET.CHECKPOINT_BLOCKS True)")
    return [*ways, "smaller images (INPUT.MIN_SIZE_TRAIN, INPUT.MAX_SIZE_TRAIN)"]
