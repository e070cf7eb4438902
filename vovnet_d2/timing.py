# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Time cases in turn, and describe the machine, for every measurement of this package.

The cases of a comparison are timed in turn, round after round, so that a machine that slows down or
speeds up meets all cases alike. Each round has another order, so that no case always follows a case
that fills the caches. The ratio of two cases is taken within each round.
"""

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
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
import torchvision

from . import __version__


def describe_environment(device: torch.device | str) -> dict[str, str]:
    """Return the date, command, hardware, versions and settings that a time on ``device`` depends
    on.

    The caller adds what only it knows: dtype, sizes, warm-up, repeats.
    """
    device = torch.device(device)
    described = {
        "date": datetime.date.today().isoformat(),
        "command": command_line(),
        "device": _device_name(device),
        "vovnet_d2": __version__ + _commit(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if device.type == "cuda":
        described["cuda"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        described["float32 convolutions"] = "TF32" if tf32_in_use()[0] else "float32"
        described["cudnn.benchmark"] = str(torch.backends.cudnn.benchmark)
    else:
        described["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return described


def package_version(module: str) -> str:
    """Return the version of the package that has a module. Several packages have onnxruntime."""
    with suppress(PackageNotFoundError):
        return version(module)
    for name in packages_distributions().get(module, ()):  # this reads the files of all packages
        return version(name)
    return "of unknown version"


def tf32_in_use() -> tuple[bool, bool]:
    """Return whether convolutions, and whether matrix products, on a GPU round float32 to TF32.

    torch 2.9 has new names for both settings. It refuses to read the older names after somebody
    has set one of the new ones, and setting an older name sets the new one, too.
    """
    convolution: Any = getattr(torch.backends.cudnn, "conv", None)
    product: Any = torch.backends.cuda.matmul
    if convolution is None:
        return torch.backends.cudnn.allow_tf32, product.allow_tf32
    return convolution.fp32_precision == "tf32", product.fp32_precision == "tf32"


def command_line() -> str:
    """Return the command that started this program, as it can be typed again."""
    script = Path(sys.argv[0])
    if script.suffix != ".py":  # a command of the installed package
        return shlex.join([script.name, *sys.argv[1:]])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return shlex.join(["python", str(script), *sys.argv[1:]])


def _commit() -> str:
    """Return the commit of this checkout. It ends with "-dirty" if files differ from the commit."""
    root = Path(__file__).parents[1]
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
    """Time several functions in turn, in an order that is drawn anew in each round.

    The orders are the same in every call.

    Args:
        cases: functions by name. The timing waits for the work that a function queues on
            ``device``.
        warmup: rounds that are not timed.
        repeats: rounds that are timed.
        calls: the number of calls per measured time, for functions that take microseconds.

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
    """Yield the rounds of :func:`time_interleaved` one by one, without warm-up: seconds per call
    for each case.

    If a later round fails or is interrupted, the earlier rounds are not lost.
    """
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
    """Wait for the work that is queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return the time of one case divided by the time of another case, for each round."""
    return [t / r for t, r in zip(times, reference, strict=True)]


def write_csv(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any] | None = None,
) -> None:
    """Write a table, with a line ``# name: value`` above it for each entry of ``protocol``. The
    columns are the keys of the first row."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in (protocol or {}).items())
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
