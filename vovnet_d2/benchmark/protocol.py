# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What every measurement here has in common: interleaved timing, and where and how it was taken.

Cases that are to be compared are timed in turn, round after round, so that a machine that slows
down or speeds up meets them all alike, and in another order each round, so that none always follows
the one that leaves the caches full. A ratio of two cases is then taken within each round.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

from .. import __version__

__all__ = [
    "describe_environment",
    "interleaved_rounds",
    "ratios",
    "synchronize",
    "time_interleaved",
    "write_csv",
]


def describe_environment(device: torch.device | str) -> dict[str, str]:
    """Date, command, hardware, versions and settings that a time on ``device`` depends on.

    To be completed by the caller with what it alone knows: dtype, sizes, warm-up, repeats.
    """
    device = torch.device(device)
    described = {
        "date": datetime.date.today().isoformat(),
        "command": _command(),
        "device": _device_name(device),
        "vovnet_d2": __version__ + _commit(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if device.type == "cuda":
        described["cuda"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        described["float32 convolutions"] = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
        described["cudnn.benchmark"] = str(torch.backends.cudnn.benchmark)
    else:
        described["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return described


def _command() -> str:
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return shlex.join(["python", str(script), *sys.argv[1:]])


def _commit() -> str:
    """Of the checkout that this file is in, with a word where files differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(describe, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" at {result.stdout.strip()}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def time_interleaved(
    cases: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str,
    warmup: int,
    repeats: int,
    calls: int = 1,
) -> dict[str, list[float]]:
    """Time several functions in turn, in an order that is drawn anew each round, always alike.

    Args:
        cases: name to function. A function may queue its work on ``device``: it is waited for.
        warmup: rounds that are not timed.
        repeats: rounds that are.
        calls: calls in a row that make one time, for functions of microseconds.

    Returns:
        for each case, one time per round, in seconds per call.
    """
    for _ in range(warmup):
        for case in cases.values():
            case()
    rounds = list(interleaved_rounds(cases, device=device, repeats=repeats, calls=calls))
    return {name: [times[name] for times in rounds] for name in cases}


def interleaved_rounds(
    cases: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str,
    repeats: int,
    calls: int = 1,
) -> Iterator[dict[str, float]]:
    """The rounds of :func:`time_interleaved` one by one, without warm-up: each case's seconds per
    call. What has been measured is there already if a later round fails or is interrupted."""
    device = torch.device(device)
    # torch.utils.benchmark.Timer warms up anew at every measurement, which triples short rounds.
    order = random.Random(0)
    for _ in range(repeats):
        times = {}
        for name in order.sample(list(cases), len(cases)):
            case = cases[name]
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                case()
            synchronize(device)
            times[name] = (time.perf_counter() - start) / calls
        yield times


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """One case's time divided by another's, round by round."""
    return [t / r for t, r in zip(times, reference, strict=True)]


def write_csv(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any] | None = None,
) -> None:
    """Write a table; ``protocol`` goes above it, one line ``# name: value`` each.

    Args:
        rows: the lines of the table; the first one's keys are the columns.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in (protocol or {}).items())
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
