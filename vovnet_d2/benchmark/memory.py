# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The most memory that a call takes, with what it holds from the start, such as parameters."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["allocated", "peak_memory"]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of each start, on standard error

SOURCES = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "tensors that are there from the start (images, parameters, weights packed for oneDNN, "
    "gradients, the optimizer's), and torch's CPU allocator during one call, by its profiler; not "
    "in it: what libraries such as oneDNN allocate themselves",
}
"""How the peak is found, by type of device."""


def allocated(device: torch.device) -> int:
    """Bytes that tensors take on a GPU now; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(call: Callable[[], object], device: torch.device, *, before: int) -> int:
    """Bytes.

    Args:
        call: what is measured, after a warm-up; it holds what it works with.
        before: :func:`allocated` before that was made, for what belongs to others.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # Twice, as the profiler tells of what is freed only where it saw it allocated: gradients.
    for _ in range(2):
        gc.collect()  # or the call could be the one to free what others have left
        held = dict(_memory(tensor) for tensor in _tensors_held(call) if _is_on_cpu(tensor))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    # The only place that has allocations in the order in which they were made.
    events = profiler.profiler.kineto_results.events()
    live = most = sum(held.values())
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def _tensors_held(call: Callable[[], object]) -> Iterator[Tensor]:
    """All that a function reaches through its closure: whatever a module or an optimizer keeps, and
    wherever. The garbage collector knows the ways."""
    seen: dict[int, Any] = {}
    reached: list[Any] = [call]
    while reached:
        item = reached.pop()
        if id(item) in seen or isinstance(item, type | ModuleType):
            continue
        seen[id(item)] = item
        if isinstance(item, FunctionType):  # but for its globals, which are the program's
            reached += [item.__closure__, item.__defaults__, item.__kwdefaults__]
            continue
        reached += gc.get_referents(item)
        if isinstance(item, Tensor):
            yield item
            if item.is_leaf:
                reached.append(item.grad)  # which the collector does not see


def _is_on_cpu(tensor: Tensor) -> bool:
    # A compiler's fake tensors only say so.
    return tensor.is_mkldnn or tensor.untyped_storage().device.type == "cpu"


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address and number of bytes of what a tensor is a view of."""
    if tensor.is_mkldnn:
        return torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
