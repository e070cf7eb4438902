# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What the experiments here share: training runs, each done once."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from vovnet_d2.benchmark.protocol import describe_environment
from vovnet_d2.engine.pictures import read_metrics

__all__ = ["Run", "describe", "mean_and_spread", "read_run", "run_all_once", "run_once"]


class Run(NamedTuple):
    """A training by one of ``tools/``."""

    tool: str
    config: str
    output_dir: Path
    options: Mapping[str, object]


def run_all_once(runs: Sequence[Run], jobs: int = 1) -> None:
    """Train, ``jobs`` at a time, which share the cores, what is not finished already.

    Raises:
        subprocess.CalledProcessError: one failed; what it said stands above.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run_once, *run, threads=threads) for run in runs]:
            future.result()


def run_once(
    tool: str,
    config: str,
    output_dir: Path,
    options: Mapping[str, object],
    *,
    threads: int | None = None,
) -> None:
    """Train by one of ``tools/``, unless ``output_dir`` holds the finished run already.

    Args:
        threads: of the trainer; None is one for each core.

    Raises:
        subprocess.CalledProcessError: it failed; what it said stands above.
    """
    if (output_dir / "model_final.pth").exists():
        print(f"{output_dir} is there already.", flush=True)
        return
    pairs = {**options, "OUTPUT_DIR": output_dir}
    command = [f"tools/{tool}.py", "--config-file", config, "--resume"]
    command += [str(word) for pair in pairs.items() for word in pair]
    print(shlex.join(["python", *command]), flush=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    # Threads that wait without spinning leave the cores to the data loader's processes.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with open(output_dir / "stdout.txt", "w") as stdout:
        subprocess.run([sys.executable, *command], env=environment, stdout=stdout, check=True)


def read_run(
    folder: Path, labels: Mapping[str, Any], iterations: int, metrics: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The evaluations of a run of so many iterations, a row each.

    Args:
        labels: the columns before its "iteration".
        metrics: name in metrics.json to name of the column.
    """
    series = read_metrics(str(folder / "metrics.json"))
    curves = {name: dict(series[key]) for key, name in metrics.items()}
    # The evaluation at the end is logged one later than those on the way.
    return [
        {
            **labels,
            "iteration": min(i + 1, iterations),
            **{name: curve[i] for name, curve in curves.items()},
        }
        for i in next(iter(curves.values()))
    ]


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """ "mean ± sample standard deviation"."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def describe(extra: Mapping[str, str], device: torch.device | str = "cpu") -> str:
    """Hardware, versions, command and ``extra``, as lines of Markdown."""
    environment = describe_environment(device) | extra
    return "\n".join(f"- {name}: {value}" for name, value in environment.items())
