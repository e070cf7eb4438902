# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The most memory that a call takes, parameters included, as the allocator counts it."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

__all__ = ["allocated", "peak_memory"]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of each start, on standard error

SOURCES = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "model, and torch's CPU allocator during one call, by its profiler; not in it: what "
    "libraries such as oneDNN allocate themselves",
}
"""How the peak is found, by type of device."""


def allocated(device: torch.device) -> int:
    """Bytes that tensors take on a GPU now; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(
    call: Callable[[], object], model: nn.Module, device: torch.device, *, before: int
) -> int:
    """Bytes.

    Args:
        call: what is done with ``model``, after a warm-up.
        before: :func:`allocated` before ``model`` was made, for what belongs to others.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    tensors = {
        t.untyped_storage().data_ptr(): t for t in chain(model.parameters(), model.buffers())
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # The only place that has allocations in the order in which they were made.
    events = profiler.profiler.kineto_results.events()
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most + sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
