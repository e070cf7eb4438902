# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the settings that keep freed CPU memory between images."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vovnet_d2.modeling import allocation

# The script runs in a separate process, because the setting holds for a whole process. It runs only
# the file of the setting, because an import of Detectron2 takes seconds. 40 MB are about 20 huge
# pages, or 10,000 usual pages.
SCRIPT = """
import resource
import runpy
import sys
{imports}
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        {use}
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

page_faults()
before = page_faults()
kept = keep_freed_memory()
page_faults()  # the system gives the memory for the last time
print(int(kept), before, page_faults())
"""


# Two ways to use memory: the calls that torch makes to the C library, and torch itself. The import
# of torch takes seconds.
USES = {
    "C library": (
        "import ctypes; c, memory = ctypes.CDLL(None), ctypes.c_void_p()",
        "c.posix_memalign(ctypes.byref(memory), ctypes.c_size_t(64), ctypes.c_size_t(40_000_000));"
        "ctypes.memset(memory, 1, 40_000_000); c.free(memory)",
    ),
    "torch": ("import torch", "torch.empty(40_000_000, dtype=torch.uint8).fill_(1)"),
}


@pytest.mark.parametrize("user", ["C library", pytest.param("torch", marks=pytest.mark.slow)])
def test_freed_memory_is_used_again(user: str) -> None:
    imports, use = USES[user]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(imports=imports, use=use), allocation.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    kept, before, after = map(int, result.stdout.split())
    assert kept == (platform.libc_ver()[0] == "glibc")
    if kept:
        assert before > 10 * 16
        assert after < before / 20


def test_memory_of_any_size_is_kept(monkeypatch):
    """Check the settings by their numbers in glibc's malloc.h.

    The numbers are -1 for the threshold to return memory to the system, -2 for the size of a
    request to the system, and -4 for the number of separate mappings.
    """
    given = {}
    library = SimpleNamespace(mallopt=lambda name, value: given.update({name: value}) or 1)
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert allocation.keep_freed_memory.__wrapped__()
    assert given[-1] >= 2**30
    assert given[-4] == 0
    assert given[-2] >= 2**20
    library.mallopt = lambda name, value: 0
    assert not allocation.keep_freed_memory.__wrapped__()
