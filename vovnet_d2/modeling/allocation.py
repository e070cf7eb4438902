# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of the C library that keep freed memory of a CPU for the next image."""

import ctypes
import platform
from functools import cache

# The values of M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep freed memory, for the whole process and without a bound.

    By default glibc returns each feature map of more than a few MiB to the system when it is freed,
    and the next one is fetched page by page, which takes a tenth to a third of the time of an
    inference. With these settings the process keeps the most memory that it has needed, as torch
    does on GPUs. A program may call this. In this package the demo and the benchmarks do.

    Returns:
        True if the C library accepts the settings. Only glibc does.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
    accepted = [mallopt(*setting) == 1 for setting in settings]
    return all(accepted)
