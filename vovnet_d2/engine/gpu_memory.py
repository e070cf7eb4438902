# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The error of a GPU with too little memory, and the settings that need less memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..errors import UserError


class GpuMemoryError(UserError, RuntimeError):
    """A GPU has too little memory for the run; the message says what needs less."""

    exit_status = 1


@contextmanager
def explain_lack_of_memory(cfg: CfgNode, *, training: bool) -> Iterator[None]:
    """Raise a GpuMemoryError that says which settings need less memory, if a GPU runs out of memory
    in the context."""
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
    batch, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    ways = [f"fewer images per step (SOLVER.IMS_PER_BATCH below {batch}, with --auto-scale-lr)"]
    if (batch // comm.get_world_size()) % (2 * parts) == 0:
        ways.insert(0, f"the same images in more parts (SOLVER.ACCUMULATE {2 * parts})")
    if not cfg.SOLVER.AMP.ENABLED:
        ways.append("mixed precision (SOLVER.AMP.ENABLED True)")
    if cfg.SOLVER.COMPILE.MEMORY_BUDGET == 1:
        ways.append(
            "a memory budget (SOLVER.COMPILE.ENABLED True SOLVER.COMPILE.MEMORY_BUDGET 0.5)"
        )
    if not cfg.MODEL.VOVNET.CHECKPOINT_BLOCKS and "vovnet" in cfg.MODEL.BACKBONE.NAME:
        ways.append("activation checkpointing (MODEL.VOVNET.CHECKPOINT_BLOCKS True)")
    return [*ways, "smaller images (INPUT.MIN_SIZE_TRAIN, INPUT.MAX_SIZE_TRAIN)"]
