# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a test runs: on a CPU, and on a GPU where there is one."""

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
