# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: blocks that run a second time in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, of which only ``x`` is kept; the backward pass computes the rest anew.

    Batch norms count each batch once. A block must draw no random numbers.
    """
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if torch.compiler.is_compiling():  # which knows what writes to a buffer, and runs it once
        return run(block, x)
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    return run(block, x, context_fn=partial(_contexts, norms))


def _contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Of the first run of a block, and of the second."""
    return nullcontext(), _statistics_kept(norms)


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms take no part of the batch into their running statistics."""
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
