# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The devices of tests: a CPU, a GPU if there is one, and the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INITIALISATIONS = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_")


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Build networks on the meta device, where tensors have a shape but no memory.

    Initialisation is skipped. It would have no effect there, and take half of the time.
    """
    nothing = dict.fromkeys(INITIALISATIONS, lambda tensor, *args, **options: tensor)
    with mock.patch.multiple(nn.init, **nothing), torch.device("meta"):
        yield
