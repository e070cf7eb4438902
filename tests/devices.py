# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The devices of tests: a CPU, a GPU if there is one, and the meta device."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INITIALISATIONS = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_")


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Build networks on the meta device, where tensors have a shape but no memory."""
    with initialisation_without_meta(), torch.device("meta"):
        yield


def initialisation_without_meta() -> AbstractContextManager[object]:
    """Skip the initialisation of tensors on the meta device, in a context.

    It would have no effect there, and take half of the time in which a network is built.
    """

    def skip_meta(initialise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(initialise)
        def skipping(tensor: Tensor, *args: object, **options: object) -> Tensor:
            return tensor if tensor.is_meta else initialise(tensor, *args, **options)

        return skipping

    functions = {name: skip_meta(getattr(nn.init, name)) for name in INITIALISATIONS}
    return mock.patch.multiple(nn.init, **functions)
