# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["saved_bytes"]


def saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes of the tensors that autograd holds when ``model(*inputs)`` has returned.

    Each storage counts once and whole, parameters and buffers not at all.
    """
    own = {_storage(tensor) for tensor in chain(model.parameters(), model.buffers())}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Kept alive, as another tensor could take the place of one that is gone.
        saved[_storage(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(*inputs)
    del outputs
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
