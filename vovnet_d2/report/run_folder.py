# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Read the files that a run left in its folder. Any of them may be missing or incomplete."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ..drawing.curves import Series, read_metrics
from ..engine.config import is_lazy
from ..engine.lazy_config import to_cfg
from ..errors import UserFileNotFoundError, UserValueError
from ..words import suggest_path

_FILES = ("config.yaml", "metrics.json", "results.json")

# Values by data set, task and metric; None where a metric could not be computed.
Results = dict[str, dict[str, dict[str, float | None]]]


class MissingPart(Exception):
    """A part of the page cannot be made. The message tells the reader why."""


@dataclass(frozen=True)
class RunFolder:
    """Holds the files of a run, as far as they can be read.

    Attributes:
        config_text: config.yaml, if there is one.
        config: its values, empty if they cannot be read.
        facts: weights, command, versions and so on by name, from results.json.
        results: the results of the last evaluation, from results.json.
        series: the values in metrics.json, from :func:`read_metrics`.
        notes: sentences about files that are missing or cannot be read.
    """

    path: Path
    config_text: str | None
    config: dict[str, Any]
    facts: dict[str, str]
    results: Results
    series: Series
    notes: tuple[str, ...]

    def setting(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key of the config, such as ``"SOLVER.MAX_ITER"``."""
        node: Any = self.config
        for name in key.split("."):
            if not isinstance(node, dict) or name not in node:
                return default
            node = node[name]
        return node

    @property
    def test_sets(self) -> list[str]:
        names = self.setting("DATASETS.TEST", [])
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def iterations(self) -> int:
        """Return the number of iterations that are known to be done."""
        points = self.series.get("total_loss", [])
        return points[-1][0] + 1 if points else 0

    def predictions_file(self, dataset: str, suffix: str = "") -> Path:
        """Return the file that COCO's evaluator wrote. See :func:`build_evaluator` for
        ``suffix``."""
        folder = self.path / f"inference{suffix}"
        if len(self.test_sets) > 1:
            folder = folder / dataset
        return folder / "coco_instances_results.json"


def read_run(folder: Path) -> RunFolder:
    """Read the folder of a run. Raise FileNotFoundError if there is no folder, and ValueError if no
    run has left files there."""
    if not folder.is_dir():
        raise UserFileNotFoundError(f"There is no folder {folder}.{suggest_path(folder)}")
    if not any((folder / name).is_file() for name in _FILES):
        raise UserValueError(
            f"{folder} is not the folder of a run, which holds one of {', '.join(_FILES)}: give "
            "the OUTPUT_DIR of a training or an evaluation."
        )
    notes: list[str] = []
    text, config = _read_config(folder / "config.yaml", notes)
    facts, results = _read_results(folder / "results.json", notes)
    metrics = folder / "metrics.json"
    series = read_metrics(metrics) if metrics.is_file() else {}
    return RunFolder(folder, text, config, facts, results, series, tuple(notes))


def _read_config(path: Path, notes: list[str]) -> tuple[str | None, dict[str, Any]]:
    if not path.is_file():
        notes.append("There is no config.yaml, so settings and data sets are not known.")
        return None, {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if is_lazy(config):  # the page reads only values that both kinds of config have
        config = yaml.safe_load(to_cfg(OmegaConf.create(config)).dump())
    if not isinstance(config, dict):
        notes.append("config.yaml is not a plain YAML mapping: it is shown but not used.")
        config = {}
    return text, config


def _read_results(path: Path, notes: list[str]) -> tuple[dict[str, str], Results]:
    if not path.is_file():
        notes.append(
            "There is no results.json, which a run writes when it ends: weights, command and "
            "environment are not known, and the results are from the last evaluation on the way."
        )
        return {}, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = {str(name): str(value) for name, value in content["run"].items()}
        results = {
            dataset: {task: dict(metrics) for task, metrics in tasks.items()}
            for dataset, tasks in content["results"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        notes.append("results.json cannot be read: it was cut, or something else wrote it.")
        return {}, {}
    return facts, results
