# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of TEST.PATIENCE: a training ends when its evaluations no longer improve."""

import json
import math
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from engine_runs import FASTER_RCNN, launch, read_log
from fault_runs import assert_equal

from vovnet_d2.engine import Trainer, load_config
from vovnet_d2.engine.hooks import EarlyStopping, EndOfTraining
from vovnet_d2.engine.interruption import Interrupted
from vovnet_d2.engine.run_checks import check_schedule

pytest_plugins = ["engine_fixtures"]

OFTEN = ["TEST.EVAL_PERIOD", "1", "SOLVER.MAX_ITER", "12", "SOLVER.CHECKPOINT_PERIOD", "1"]


def score(monkeypatch: pytest.MonkeyPatch, *values: float) -> list[float]:
    """Make evaluations return these values in turn; return a list of the values used so far."""
    scores, given = iter(values), []

    def test(*_: object) -> dict[str, Any]:
        given.append(next(scores))
        return {"bbox": {"AP": given[-1]}}

    monkeypatch.setattr(Trainer, "test", test)
    return given


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def test_a_training_ends_early_and_does_not_continue_when_resumed(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = score(monkeypatch, 10.0, 30.0, 20.0, 30.0)
    results = launch(FASTER_RCNN, tmp_path, *OFTEN, "TEST.PATIENCE", "2")
    assert results["bbox"]["AP"] == 30.0
    assert len(given) == 4  # the last evaluation is not repeated at the end
    assert (
        "ends early, after 4 of 12 iterations: in 2 evaluations bbox/AP has not risen above its "
        "value of 30.000 after iteration 1 (TEST.PATIENCE 2). model_best.pth has those weights"
    ) in read_log(tmp_path)
    final, best = load(tmp_path / "model_final.pth"), load(tmp_path / "model_best.pth")
    assert (final["iteration"], best["iteration"]) == (3, 1)
    assert_equal(final["model"], load(tmp_path / "model_0000003.pth")["model"])
    assert_equal(best["model"], load(tmp_path / "model_0000001.pth")["model"])

    given = score(monkeypatch, 30.0)
    launch(FASTER_RCNN, tmp_path, "--resume", *OFTEN, "TEST.PATIENCE", "2")
    assert load(tmp_path / "model_final.pth")["iteration"] == 3
    assert len(given) == 1  # a finished training only evaluates again
    # With more patience it continues, and also counts the earlier evaluations.
    given = score(monkeypatch, 25.0, 24.0)
    launch(FASTER_RCNN, tmp_path, "--resume", *OFTEN, "TEST.PATIENCE", "3")
    assert load(tmp_path / "model_final.pth")["iteration"] == 4
    launch(FASTER_RCNN, tmp_path, "--resume", *OFTEN, "TEST.PATIENCE", "4")
    assert given == [25.0, 24.0]


def test_interruptions_do_not_change_where_a_training_ends(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [10.0, 20.0, math.nan, 19.0, 20.0]
    options = [*OFTEN, "TEST.PATIENCE", "3"]
    score(monkeypatch, *values)
    launch(FASTER_RCNN, tmp_path / "whole", *options)
    # A signal arrives before the evaluation after a step, so the next run does this evaluation.
    for place in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "stop_signal", property(lambda _: "SIGTERM"))
            score(patch, *values[max(0, place - 1) : place])
            with pytest.raises(Interrupted, match=f"after {place + 1} of 12"):
                launch(FASTER_RCNN, tmp_path / "often", "--resume", *options)
    given = score(monkeypatch, values[4])
    launch(FASTER_RCNN, tmp_path / "often", "--resume", *options)
    assert given == values[4:]
    for name in ("model_final.pth", "model_best.pth"):
        found, expected = (load(tmp_path / folder / name) for folder in ("often", "whole"))
        assert_equal(found["model"], expected["model"])
        assert found["iteration"] == expected["iteration"]


def count_steps(values: list[float], patience: int, starts: set[int], folder: Path) -> int:
    """Run the hook with one evaluation per iteration, and return after how many it ends.

    ``values`` are the results of the evaluations. At ``starts`` the training is interrupted and
    resumed.
    """
    saved: list[int] = []
    checkpointing = SimpleNamespace(save_final=lambda: saved.append(trainer.iter))
    trainer = SimpleNamespace(iter=0, start_iter=0, max_iter=len(values) + 1)
    metrics = folder / "metrics.json"
    metrics.write_text("")
    hook = EarlyStopping(checkpointing, 1, "bbox/AP", patience, str(folder))
    hook.trainer = trainer
    checkpoint = hook.state_dict()
    try:
        for trainer.iter, value in enumerate(values):
            if trainer.iter in starts:
                hook = EarlyStopping(checkpointing, 1, "bbox/AP", patience, str(folder))
                hook.load_state_dict(checkpoint)
                hook.trainer = trainer
                trainer.start_iter = trainer.iter
                with EventStorage(trainer.iter) as trainer.storage:
                    hook.before_train()
            checkpoint = hook.state_dict()  # checkpoints are saved before an evaluation
            with EventStorage(trainer.iter) as trainer.storage:
                trainer.storage.put_scalar("bbox/AP", value)
                metrics.write_text(json.dumps({"iteration": trainer.iter, "bbox/AP": value}))
                hook.after_step()
    except EndOfTraining:
        assert saved == [trainer.iter]
        assert trainer.max_iter == trainer.iter + 1
        return trainer.iter + 1
    return len(values)


def count_by_hand(values: list[float], patience: int) -> int:
    waited, best = 0, -math.inf
    for number, value in enumerate(values, start=1):
        if value > best:
            waited, best = 0, value
        elif best > -math.inf:
            waited += 1
        if waited == patience:
            return number
    return len(values)


def random_values() -> Iterator[tuple[list[float], int, set[int]]]:
    rng = random.Random(0)
    for patience in cycle((1, 2, 3)):
        values = [rng.choice([math.nan, *map(float, range(8))]) for _ in range(12)]
        yield values, patience, set(rng.sample(range(1, 12), 2))


def test_the_count_equals_that_of_a_plain_loop(tmp_path: Path) -> None:
    counts = set()
    for _, (values, patience, starts) in zip(range(60), random_values(), strict=False):
        expected = count_by_hand(values, patience)
        assert count_steps(values, patience, set(), tmp_path) == expected, values
        assert count_steps(values, patience, starts, tmp_path) == expected, (values, starts)
        counts.add(expected)
    assert len(counts) > 5


def test_evaluations_count_in_the_order_of_their_run(tmp_path: Path) -> None:
    """Resume with evaluations of later iterations, as after a change of the batch size."""
    saved: list[int] = []
    checkpointing = SimpleNamespace(save_final=lambda: saved.append(trainer.iter))
    trainer = SimpleNamespace(iter=3, start_iter=3, max_iter=10)
    hook = EarlyStopping(checkpointing, 1, "bbox/AP", 3, str(tmp_path))
    hook.trainer = trainer
    hook.load_state_dict({"metric": "bbox/AP", "values": {3: 10.0, 4: 40.0, 5: 20.0}})
    with EventStorage(3) as trainer.storage:
        trainer.storage.put_scalar("bbox/AP", 30.0)
        hook.after_step()
    assert not saved
    trainer.iter = 4
    hook.load_state_dict({"metric": "bbox/AP", "values": {6: 40.0, 5: 20.0, 3: 30.0}})
    with EventStorage(4) as trainer.storage:
        trainer.storage.put_scalar("bbox/AP", 39.0)
        with pytest.raises(EndOfTraining):
            hook.after_step()
    assert saved == [4]


def test_evaluations_of_other_data_do_not_count(tmp_path: Path) -> None:
    one = EarlyStopping(SimpleNamespace(), 1, "bbox/AP", 1, str(tmp_path))
    one.load_state_dict({"metric": "bbox/AP", "values": {3: 40.0}})
    for metric, kept in (("bbox/AP", {3: 40.0}), ("own_val/bbox/AP", {})):
        other = EarlyStopping(SimpleNamespace(), 1, metric, 1, str(tmp_path))
        other.load_state_dict(one.state_dict())
        assert other.state_dict() == {"metric": metric, "values": kept}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["TEST.PATIENCE", "-1"], "TEST.PATIENCE is -1: give a number of evaluations"),
        (["TEST.PATIENCE", "2", "TEST.EVAL_PERIOD", "0"], "is 2, and nothing is evaluated"),
        (["TEST.PATIENCE", "2", "DATASETS.TEST", "()"], "evaluate on .--val-annotations, DATA"),
    ],
)
def test_patience_needs_evaluations(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(load_config(FASTER_RCNN, options))
