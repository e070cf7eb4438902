# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Functions of earlier versions of NumPy that the packages of LVIS and Cityscapes need."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np

_count_nonzero = np.count_nonzero


def old_numpy() -> AbstractContextManager[Any]:
    """Give NumPy, in a context, the functions that lvis 0.5.3 and cityscapesscripts 2.3.0 need.

    These are ``np.float`` (gone since 1.24), ``np.in1d`` (since 2.4), and a ``np.count_nonzero``
    whose result JSON can hold (since 2.4 it is a NumPy scalar).
    """
    return mock.patch.multiple(
        np,
        create=True,
        float=float,
        in1d=lambda values, tested, **options: np.isin(np.ravel(values), tested, **options),
        count_nonzero=lambda *args, **options: _as_python(_count_nonzero(*args, **options)),
    )


def _as_python(count: Any) -> Any:
    return int(count) if np.ndim(count) == 0 else count
