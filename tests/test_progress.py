# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The progress bar, which replaces the log."""

from types import SimpleNamespace

import pytest
from detectron2.data import DatasetCatalog

from vovnet_d2.engine import progress


@pytest.fixture
def trainer():
    """Return a stand-in for a trainer that resumes at step 20 of 100 and evaluates 300 images."""
    DatasetCatalog.register("three_hundred_images", lambda: [{}] * 300)
    yield SimpleNamespace(
        cfg=SimpleNamespace(
            DATASETS=SimpleNamespace(TEST=("three_hundred_images",)),
            MODEL=SimpleNamespace(DEVICE="cpu"),
            SOLVER=SimpleNamespace(IMS_PER_BATCH=4),
        ),
        start_iter=20,
        max_iter=100,
        storage=SimpleNamespace(latest=lambda: {"total_loss": (1.25, 0)}),
    )
    DatasetCatalog.remove("three_hundred_images")


def run(trainer, seconds_of_step, monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    bar = progress.ProgressBar()
    bar.trainer = trainer
    bar.before_train()
    for step in range(trainer.start_iter, trainer.max_iter):
        trainer.iter = step
        now += seconds_of_step(step)
        bar.after_step()
    bar.after_train()


def test_the_estimate_ignores_the_first_steps(trainer, monkeypatch, capsys):
    """Let steps 22 to 25 take 3 s each. 74 steps are left, and the images cost 300 / 4 / 2 more."""
    run(trainer, lambda step: 50.0 if step < 22 else 3.0, monkeypatch)
    first, *others = capsys.readouterr().out.splitlines()
    minutes = (74 + 37.5) * 3.0 / 60
    assert first == (
        f"This takes about {minutes:.0f} minutes on this machine (cpu): 74 more steps of 3.00 s, "
        "then an evaluation on 300 images."
    )
    assert others == []


def test_the_bar_ends_full_and_shows_the_loss(trainer, monkeypatch, capsys):
    run(trainer, lambda step: 2.0, monkeypatch)
    end = capsys.readouterr().err.splitlines()[-1]
    assert "Evaluating: 100%" in end
    assert "100/100" in end
    assert "loss=1.25" in end


def test_a_training_that_ends_at_once_has_no_bar(trainer, monkeypatch, capsys):
    trainer.max_iter = trainer.start_iter + 3
    run(trainer, lambda step: 2.0, monkeypatch)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2, "10 seconds"), (86, "90 seconds"), (91, "2 minutes"), (5500, "1.5 hours")],
)
def test_times_in_words(seconds, words):
    assert progress._in_words(seconds) == words
