# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What the experiments here share: training runs, one after another, each done once."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from vovnet_d2.benchmark.protocol import describe_environment

__all__ = ["describe", "mean_and_spread", "run_once"]


def run_once(tool: str, config: str, output_dir: Path, options: Mapping[str, object]) -> None:
    """Train by one of ``tools/``, unless ``output_dir`` holds the finished run already.

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
    with open(output_dir / "stdout.txt", "w") as stdout:
        subprocess.run([sys.executable, *command], env=environment, stdout=stdout, check=True)


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """ "mean ± sample standard deviation"."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def describe(extra: Mapping[str, str]) -> str:
    """Hardware, versions, command and ``extra``, as lines of Markdown."""
    environment = describe_environment("cpu") | extra
    return "\n".join(f"- {name}: {value}" for name, value in environment.items())
