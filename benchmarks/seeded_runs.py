# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Run trainings that the experiments here share, each of them once."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import yaml

from vovnet_d2.drawing.curves import read_metrics
from vovnet_d2.engine import load_config
from vovnet_d2.engine.pretrain import add_pretraining_config
from vovnet_d2.timing import describe_environment

__all__ = [
    "Run",
    "describe",
    "experiment_parser",
    "mean_and_spread",
    "read_run",
    "run_all_once",
    "run_once",
]

_WITHOUT_EFFECT = ("OUTPUT_DIR", "MODEL.DEVICE", "SOLVER.CHECKPOINT_PERIOD")


def experiment_parser(script: str, doc: str | None, files: str) -> argparse.ArgumentParser:
    """Return a parser with the folders that each experiment has.

    Args:
        script: the experiment's file, after which its folder in benchmarks/ is named.
        doc: its docstring.
        files: what is written there.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks") / Path(script).stem,
        help=f"folder for {files}",
    )
    return parser


class Run(NamedTuple):
    """A training by one of ``tools/``."""

    tool: str
    config: str
    output_dir: Path
    options: Mapping[str, object]
    arguments: Sequence[str] = ()  # of the tool, before the options


def run_all_once(runs: Sequence[Run], jobs: int = 1) -> None:
    """Train what is not finished, ``jobs`` trainings at a time, which share the cores.

    Raises:
        subprocess.CalledProcessError: one failed; what it said stands above.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_once, run, threads=threads) for run in runs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # of one of them, or Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_once(run: Run, *, threads: int | None = None) -> None:
    """Train, unless the folder holds the finished run already.

    Args:
        threads: of the trainer; None is one for each core.

    Raises:
        subprocess.CalledProcessError: it failed; what it said stands above.
        ValueError: the run in the folder has other options.
    """
    if (run.output_dir / "config.yaml").exists():
        _require_same(run)
    if (run.output_dir / "model_final.pth").exists():
        print(f"{run.output_dir} is there already.", flush=True)
        return
    pairs = {**run.options, "OUTPUT_DIR": run.output_dir}
    command = [f"tools/{run.tool}.py", "--config-file", run.config, "--resume", *run.arguments]
    command += [str(word) for pair in pairs.items() for word in pair]
    print(shlex.join(["python", *command]), flush=True)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    # Waiting threads that do not spin leave the cores to the processes of the data loader.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with open(run.output_dir / "stdout.txt", "a") as stdout:
        subprocess.run([sys.executable, *command], env=environment, stdout=stdout, check=True)


def _require_same(run: Run) -> None:
    """Refuse a folder of an earlier call, or of an earlier state of the config, with other values.

    Where the tool's arguments name data, most keys follow from the data, so the options of the run
    are compared alone.
    """
    add_config = add_pretraining_config if run.tool == "pretrain_net" else None
    options = [str(word) for pair in run.options.items() for word in pair]
    wanted = load_config(run.config, options, add_config=add_config)
    text = (run.output_dir / "config.yaml").read_text(encoding="utf-8")
    theirs = dict(_flatten(yaml.safe_load(text)))
    for key, value in _flatten(yaml.safe_load(wanted.dump())):
        found = theirs.get(key)
        compared = key in run.options if run.arguments else key not in _WITHOUT_EFFECT
        if found != value and compared:
            raise ValueError(
                f"{run.output_dir} holds a run with {key} {found}, not {value}: give another "
                "folder for --work."
            )


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_run(
    folder: Path, labels: Mapping[str, Any], iterations: int, metrics: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return a row for each evaluation of a finished run.

    Args:
        labels: the columns before its "iteration".
        metrics: name in metrics.json to name of the column.
    """
    series = read_metrics(str(folder / "metrics.json"))
    curves = {name: dict(series[key]) for key, name in metrics.items()}
    # The last evaluation is logged one iteration later than the others.
    return [
        {
            **labels,
            "iteration": min(i + 1, iterations),
            **{name: curve[i] for name, curve in curves.items()},
        }
        for i in next(iter(curves.values()))
    ]


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """Return "mean ± sample standard deviation"; one value stands alone."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def describe(extra: Mapping[str, str], device: torch.device | str = "cpu") -> str:
    """Return hardware, versions, command and ``extra`` as lines of Markdown."""
    environment = describe_environment(device) | extra
    return "\n".join(f"- {name}: {value}" for name, value in environment.items())
