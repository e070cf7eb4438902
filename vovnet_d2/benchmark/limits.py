# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Read how many cores and how much memory this process may use, also in a container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_cores() -> list[int]:
    """Return the numbers of the cores that this process may use. In a container that gets the time
    of two cores, these are two, although Linux moves its processes among all cores."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    return cores[: math.ceil(min([len(cores), *map(_cores_of, _control_groups("cpu"))]))]


def available_memory() -> float:
    """Return the bytes of memory that this process may still take. The number is infinity on
    systems other than Linux, where it is not known."""
    system = _table(_PROC / "meminfo").get("MemAvailable:", math.inf)
    return min([1024 * system, *map(_memory_of, _control_groups("memory"))])


def _control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of Linux's control groups (cgroups) that may limit this process. There are
    two versions, and a container may see its own folder as the root of all."""
    for line in _lines(_PROC / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = _CGROUPS / controller if controllers else _CGROUPS
            group = PurePosixPath(path)
            yield from (root / folder.relative_to("/") for folder in (group, *group.parents))


def _cores_of(group: Path) -> float:
    """Return the number of cores whose time a control group may use."""
    files = [group / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    words = _read(group / "cpu.max") or [word for file in files for word in _read(file)]
    if len(words) < 2 or words[0] in ("max", "-1"):
        return math.inf
    return int(words[0]) / int(words[1])


def _memory_of(group: Path) -> float:
    """Return the bytes that a control group may still take. Linux drops cached files for them."""
    limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
    used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
    if not limit or not used or limit == ["max"]:
        return math.inf
    statistics = _table(group / "memory.stat")
    cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
    return int(limit[0]) - int(used[0]) + cached


def _read(file: Path) -> list[str]:
    """Return the words of a file."""
    return [word for line in _lines(file) for word in line.split()]


def _table(file: Path) -> dict[str, float]:
    """Return the numbers of a file whose lines begin with a name and a number."""
    return {words[0]: float(words[1]) for words in map(str.split, _lines(file))}


def _lines(file: Path) -> list[str]:
    """Return the lines of a file, or an empty list if the system has no such file."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
