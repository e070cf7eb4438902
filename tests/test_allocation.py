# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory of a CPU that is kept between images."""

import platform
import subprocess
import sys
from types import SimpleNamespace

from vovnet_d2.modeling import allocation

# In a process of its own, as the setting is for a whole process; it runs the file alone, as to
# import Detectron2 takes seconds. With huge pages 40 MB are about 20 pages, with the usual ones
# 10,000.
SCRIPT = """
import resource
import runpy
import sys
import torch
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(40_000_000, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

page_faults()
before = page_faults()
kept = keep_freed_memory()
page_faults()  # the last time that the memory is fetched
print(int(kept), before, page_faults())
"""


def test_memory_is_fetched_once():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, allocation.__file__],
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
    """The settings by their numbers in glibc's malloc.h, where -1 is the threshold to give back."""
    given = {}
    library = SimpleNamespace(mallopt=lambda name, value: given.update({name: value}) or 1)
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert allocation.keep_freed_memory.__wrapped__()
    assert given[-1] >= 2**30
    assert given[-4] == 0  # nothing is mapped apart
    assert given[-2] >= 2**20
    library.mallopt = lambda name, value: 0
    assert not allocation.keep_freed_memory.__wrapped__()
