# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of LOGGERS: trackers get the same values as metrics.json. Stub modules record the calls."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import test_lazyconfig
from engine_runs import FASTER_RCNN, launch, read_log, tiny_config

from vovnet_d2.engine.loggers import TrackerWriter
from vovnet_d2.engine.run_checks import check_run

pytest_plugins = ["engine_fixtures"]

Calls = list[tuple[str, Any]]


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


def install_wandb(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    def init(**arguments: Any) -> Any:
        calls.append(("start", arguments))
        return SimpleNamespace(
            id=arguments["id"] or "run7",
            define_metric=lambda *names, **options: calls.append(("define", (names, options))),
            log=lambda row: calls.append(("log", row)),
            finish=lambda: calls.append(("finish", None)),
        )

    install(monkeypatch, "wandb", init=init)


def install_mlflow(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    def start_run(**arguments: Any) -> Any:
        calls.append(("start", arguments))
        return SimpleNamespace(info=SimpleNamespace(run_id=arguments["run_id"] or "run7"))

    install(
        monkeypatch,
        "mlflow",
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=start_run,
        log_dict=lambda content, file: calls.append(("config", content)),
        log_metrics=lambda row, step: calls.append(("log", {**row, "iteration": step})),
        end_run=lambda: calls.append(("finish", None)),
    )


def install_trackio(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    def init(**arguments: Any) -> Any:
        calls.append(("start", arguments))
        return SimpleNamespace(
            name=arguments["name"],
            log=lambda row, step: calls.append(("log", {**row, "iteration": step})),
            finish=lambda: calls.append(("finish", None)),
        )

    install(monkeypatch, "trackio", init=init)


TRACKERS = {"wandb": install_wandb, "mlflow": install_mlflow, "trackio": install_trackio}
OPTIONS = ["SOLVER.MAX_ITER", "22", "SOLVER.CHECKPOINT_PERIOD", "0", "DATASETS.TEST", "()"]


def read_rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]


def rows_of(calls: Calls) -> list[dict[str, float]]:
    return [row for kind, row in calls if kind == "log"]


def starts_of(calls: Calls) -> list[dict[str, Any]]:
    return [arguments for kind, arguments in calls if kind == "start"]


def test_each_tracker_gets_the_metrics_and_the_config(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Calls] = {name: [] for name in TRACKERS}
    for name, own in calls.items():
        TRACKERS[name](monkeypatch, own)
    out, trackers = tmp_path / "mine", ["LOGGERS", str(list(TRACKERS))]
    launch(FASTER_RCNN, out, *OPTIONS, *trackers)
    for name, own in calls.items():
        # Rows are in the order of their iterations. A metric at the end has its own row.
        assert rows_of(own) == sorted(read_rows(out), key=lambda row: row["iteration"]), name
        assert [row["iteration"] for row in rows_of(own)] == [19, 21]
        assert own[-1][0] == "finish"
        (start,) = starts_of(own)
        assert start.get("name", start.get("run_name")) == "mine"
        config = start.get("config") or dict(own)["config"]
        assert config["SOLVER"]["MAX_ITER"] == 22
        assert start.get("project", dict(own).get("experiment")) == "vovnet_d2"
    assert starts_of(calls["wandb"])[0]["dir"] == str(out)
    assert dict(calls["wandb"])["define"] == (("*",), {"step_metric": "iteration"})

    # A resumed training continues the run of the tracker. A new training starts a new run.
    launch(FASTER_RCNN, out, "--resume", *OPTIONS, *trackers)
    launch(FASTER_RCNN, out, *OPTIONS, "SOLVER.MAX_ITER", "1", *trackers)
    _, resumed, anew = starts_of(calls["mlflow"])
    assert (resumed["run_id"], anew["run_id"]) == ("run7", None)
    _, resumed, anew = starts_of(calls["wandb"])
    assert (resumed["id"], resumed["resume"]) == ("run7", "allow")
    assert (anew["id"], anew["resume"]) == (None, None)
    _, resumed, anew = starts_of(calls["trackio"])
    assert (resumed["name"], resumed["resume"], anew["resume"]) == ("mine", "allow", "never")


def test_a_lazy_config_gives_the_same(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Calls] = {"wandb": [], "trackio": []}
    for name, own in calls.items():
        TRACKERS[name](monkeypatch, own)
    test_lazyconfig.launch(tmp_path, "train.loggers=[wandb,trackio]")
    (expected,) = [row for row in read_rows(tmp_path) if "total_loss" in row]
    for own in calls.values():
        (start,) = starts_of(own)
        assert start["config"]["train"]["loggers"] == ["wandb", "trackio"]
        (found,) = [row for row in rows_of(own) if "total_loss" in row]
        # An evaluation adds its values to the row of its iteration. Some values of AP are NaN.
        assert {name: found[name] for name in expected} == expected
    assert json.loads((tmp_path / "loggers.json").read_text()).keys() == {"wandb", "trackio"}


def test_names_that_mlflow_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    install_mlflow(monkeypatch, calls)
    writer = TrackerWriter("mlflow", tiny_config(FASTER_RCNN, tmp_path))
    writer._tracker.log({"box_proposals/AR@1000": 1.0, "bbox/AP-a (b)é": 2.0}, 3)
    expected = {"box_proposals/AR_1000": 1.0, "bbox/AP-a _b_é": 2.0, "iteration": 3}
    assert rows_of(calls) == [expected]


def test_a_tracker_that_fails_does_not_end_the_training(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        calls.append(("log", {}))
        raise OSError("no network")

    calls: Calls = []
    install_mlflow(monkeypatch, calls)
    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", fail)
    launch(FASTER_RCNN, tmp_path, *OPTIONS, "LOGGERS", "['mlflow']")
    assert (tmp_path / "model_final.pth").is_file()
    assert len(rows_of(calls)) == 1
    assert read_log(tmp_path).count("mlflow gets no more metrics of this run: no network") == 1

    monkeypatch.setattr(sys.modules["mlflow"], "start_run", fail)
    with pytest.raises(ValueError, match=r"mlflow, which LOGGERS names, .* started: no netw"):
        TrackerWriter("mlflow", tiny_config(FASTER_RCNN, tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorboard"], r"LOGGERS has 'tensorboard': choose from wandb, mlflow, trackio\."),
        ("wandb", r"LOGGERS must be a list of names: write LOGGERS \"\['wandb'\]\"\."),
        (["wandb"], r"LOGGERS has 'wandb', and its package is not installed: pip install wandb"),
    ],
)
def test_a_missing_tracker_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: Any, message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg = tiny_config(FASTER_RCNN, tmp_path)
    cfg.LOGGERS = names
    with pytest.raises(ValueError, match=message):
        check_run(cfg, training=True)
    check_run(cfg, training=False)
