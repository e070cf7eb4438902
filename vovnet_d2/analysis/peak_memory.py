# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a forward pass: the most bytes of tensors that are alive at one time."""

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from .observe import PartTracker


class PeakMemory:
    """Counts the bytes of the tensors alive after each operator of a forward pass without autograd.

    A tensor counts from the operator that made it until nothing refers to its storage. So feature
    maps that a later part needs, concatenations and indices of pooling count. Parameters,
    workspaces of kernels, and the rounding and fragmentation of the allocator do not.

    Attributes:
        live: bytes at present.
        peak: the most bytes while each part ran, or outside all parts under ``""``.
    """

    def __init__(self, tracker: PartTracker, *inputs: Tensor):
        """
        Args:
            inputs: tensors that are alive from the start.
        """
        self.tracker = tracker
        self.live = 0
        self.peak: Counter[str] = Counter()
        self._storages: dict[int, weakref.ref] = {}
        for tensor in inputs:
            self._add(tensor)

    def observe(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        # A view or an in-place operator returns the storage of an argument. If this storage is not
        # known yet, it belongs to a parameter.
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for tensor in tree_leaves(out):
            if _is_tensor(tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor)
        part = self.tracker.current
        self.peak[part] = max(self.peak[part], self.live)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def forget(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.live += size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
