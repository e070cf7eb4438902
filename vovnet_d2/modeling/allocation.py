# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory of a CPU that is kept between images instead of being returned and fetched anew."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

__all__ = ["keep_freed_memory"]

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep freed memory, for this process as a whole and without a bound.

    By default glibc returns each feature map of more than a few MiB to the system when it is freed,
    and the next one is fetched page by page, which takes as long as a tenth to a third of an
    inference. The process then holds what it needed at most, as torch does on GPUs. So it is for a
    program to call, and no other function of this package does, but those that measure.

    Returns:
        whether it could be set: with other C libraries nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
    accepted = [mallopt(*setting) == 1 for setting in settings]
    return all(accepted)
