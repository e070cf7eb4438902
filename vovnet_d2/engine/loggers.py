# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Experiment trackers that get the metrics of a training: ``LOGGERS``."""

import importlib.util
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..atomic import write_text
from ..errors import UserValueError

logger = logging.getLogger(__name__)

_FILE = "loggers.json"  # in OUTPUT_DIR: the run's id in each tracker, for --resume
_PROJECT = "vovnet_d2"


class _Tracker(Protocol):
    """A run in an experiment tracker. A resumed training starts the tracker with ``id``."""

    id: str

    def log(self, metrics: dict[str, float], iteration: int) -> None: ...

    def finish(self) -> None: ...


class _Wandb:
    def __init__(self, cfg: CfgNode, known: str | None):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=_name_of(cfg),
            dir=cfg.OUTPUT_DIR,
            config=_to_plain(cfg),
            id=known,
            resume="allow" if known else None,
        )
        # A resumed training goes back to its checkpoint, but wandb's own steps can only increase.
        self._run.define_metric("*", step_metric="iteration")
        self.id = self._run.id

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self._run.log({**metrics, "iteration": iteration})

    def finish(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, cfg: CfgNode, known: str | None):
        import mlflow

        self._mlflow = mlflow
        if known is None and "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(_PROJECT)
        run = mlflow.start_run(run_id=known, run_name=_name_of(cfg))
        mlflow.log_dict(_to_plain(cfg), "config.yaml")
        self.id = run.info.run_id

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        # Names of categories may have characters that MLflow refuses in names.
        named = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=iteration)

    def finish(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    def __init__(self, cfg: CfgNode, known: str | None):
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=known or _name_of(cfg),
            config=_to_plain(cfg),
            resume="allow" if known else "never",
        )
        self.id = self._run.name

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self._run.log(metrics, step=iteration)

    def finish(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[CfgNode, str | None], _Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def check_loggers(cfg: CfgNode) -> None:
    """Raise ValueError if ``LOGGERS`` has an unknown name, or a name whose package is not
    installed."""
    if isinstance(cfg.LOGGERS, str):
        raise UserValueError(
            f"LOGGERS must be a list of names: write LOGGERS \"['{cfg.LOGGERS}']\"."
        )
    for name in cfg.LOGGERS:
        if name not in _TRACKERS:
            raise UserValueError(f"LOGGERS has {name!r}: choose from {', '.join(_TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise UserValueError(
                f"LOGGERS has {name!r}, and its package is not installed: pip install {name}"
            )


class TrackerWriter(EventWriter):
    """Sends the values of ``metrics.json``, which Detectron2 writes, to a tracker too.

    A resumed training continues its run in the tracker. A tracker that fails during the training,
    for example without a network, does not end the training: a warning says that it gets no more
    metrics.
    """

    def __init__(self, name: str, cfg: CfgNode, *, window_size: int = 20):
        """
        Args:
            name: one of ``LOGGERS``.
            window_size: the number of iterations whose median is taken, as in Detectron2's writers.

        Raises:
            ValueError: the tracker cannot be started, for example without a login.
        """
        self._name = name
        self._window_size = window_size
        self._last = -1  # iteration
        path = Path(cfg.OUTPUT_DIR, _FILE)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        try:
            self._tracker: _Tracker | None = _TRACKERS[name](cfg, known.get(name))
        except Exception as error:
            raise UserValueError(
                f"{name}, which LOGGERS names, cannot be started: {error}"
            ) from error
        write_text(path, json.dumps(known | {name: self._tracker.id}, indent=2) + "\n")

    def write(self) -> None:
        found: dict[int, dict[str, float]] = defaultdict(dict)
        storage = get_event_storage()
        latest = storage.latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self._last:
                found[iteration][name] = value
        self._last = max(found, default=self._last)
        for iteration in sorted(found):
            self._try("log", found[iteration], iteration)

    def close(self) -> None:
        self._try("finish")

    def _try(self, method: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:
            logger.warning("%s gets no more metrics of this run: %s", self._name, error)
            self._tracker = None


def _name_of(cfg: CfgNode) -> str:
    return os.path.basename(os.path.abspath(cfg.OUTPUT_DIR))


def _to_plain(cfg: CfgNode) -> dict[str, Any]:
    """Return the config of the run, YAML or Lazy, as dictionaries and lists."""
    path = Path(cfg.OUTPUT_DIR, "config.yaml")
    text = path.read_text(encoding="utf-8") if path.is_file() else cfg.dump()
    return yaml.safe_load(text)
