# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the peak memory of a call, and what a forward pass keeps for the backward pass."""

import gc
import os
from collections.abc import Callable, Iterator
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes a line to standard error at each start

SOURCES = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "tensors that are there from the start (images, parameters, weights packed for oneDNN, "
    "gradients, the optimizer's), and torch's CPU allocator during one call, by its profiler; not "
    "in it: what libraries such as oneDNN allocate themselves",
}
"""The way to find the peak, by type of device."""


def allocated(device: torch.device) -> int:
    """Return the bytes of all tensors on a GPU; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(call: Callable[[], object], device: torch.device, *, before: int) -> int:
    """Return the largest number of bytes that are allocated during a call.

    Args:
        call: a function that is warmed up. Its closure must hold what it works with, such as the
            network, the optimizer and the images.
        before: the result of :func:`allocated` before the function was made.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # Twice, because the profiler sees a gradient freed only if it saw it allocated.
    for _ in range(2):
        gc.collect()  # otherwise the call might free what others have left
        held = dict(_memory(tensor) for tensor in _tensors_held(call) if _is_on_cpu(tensor))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    # Only this part of the profile has the allocations in their order.
    events = profiler.profiler.kineto_results.events()
    live = most = sum(held.values())
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def _tensors_held(call: Callable[[], object]) -> Iterator[Tensor]:
    """Find all tensors of the modules and optimizers that a function reaches through its closure.
    The garbage collector knows the references."""
    seen: dict[int, Any] = {}
    reached: list[Any] = [call]
    while reached:
        item = reached.pop()
        if id(item) in seen or isinstance(item, type | ModuleType):
            continue
        seen[id(item)] = item
        if isinstance(item, FunctionType):  # without its globals, which belong to the program
            reached += [item.__closure__, item.__defaults__, item.__kwdefaults__]
            continue
        reached += gc.get_referents(item)
        if isinstance(item, Tensor):
            yield item
            if item.is_leaf:
                reached.append(item.grad)  # the collector does not see them


def _is_on_cpu(tensor: Tensor) -> bool:
    # The fake tensors of a compiler have no memory.
    return tensor.is_mkldnn or tensor.untyped_storage().device.type == "cpu"


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return the address and the number of bytes of the memory that a tensor is a view of."""
    if tensor.is_mkldnn:
        return torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Return the bytes of the tensors that autograd holds when ``model(*inputs)`` has returned.

    Each storage counts once and whole. Parameters and buffers do not count.
    """
    own = {_storage(tensor) for tensor in chain(model.parameters(), model.buffers())}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # The tensors stay alive, because another tensor could get the memory of a freed one.
        saved[_storage(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(*inputs)
    del outputs
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
