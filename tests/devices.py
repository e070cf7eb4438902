# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a test runs: on a CPU, on a GPU where there is one, and without numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
_INITIALISATIONS = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_")


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Build networks on the meta device, where tensors have a shape and no memory.

    Initialisation is left out: there is nothing to fill, and it would take half of the time.
    """
    nothing = dict.fromkeys(_INITIALISATIONS, lambda tensor, *args, **options: tensor)
    with mock.patch.multiple(nn.init, **nothing), torch.device("meta"):
        yield
