# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A batch in parts, whose gradients are summed: ``SOLVER.ACCUMULATE``."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from ..errors import UserValueError


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split the batch of a process into parts of as many images each. Raise UserValueError if the
    number of parts does not divide the number of images.

    Args:
        batch: a list with an item for each image, or tensors whose first dimension counts images,
            alone or in a tuple.
    """
    if parts == 1:
        return [batch]
    if isinstance(batch, tuple):
        return list(zip(*(split_batch(each, parts) for each in batch), strict=True))
    size, rest = divmod(len(batch), parts)
    if size == 0 or rest:
        raise UserValueError(
            f"A batch of {len(batch)} images cannot be split into {parts} equal parts: set "
            "SOLVER.ACCUMULATE to a divisor of the images in a batch of a process."
        )
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def gradients_stay_here(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Keep processes from exchanging gradients, as long as there are more to come.

    The context holds for the forward pass and for the backward pass.
    """
    if enabled and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
