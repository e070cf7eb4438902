# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed at any moment end with the same result as others."""

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from fault_runs import assert_equal, free_port, load, read_progress, start, wait_for

pytest_plugins = ["engine_fixtures"]

KILLS = {1: 12, 2: 6}  # numbers of kills by the number of processes
OPTIONS = [
    *["SOLVER.MAX_ITER", "150", "SOLVER.CHECKPOINT_PERIOD", "5", "SOLVER.CHECKPOINTS_KEPT", "3"],
    *["TEST.EVAL_PERIOD", "50", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SEED", "5"],
]


def start_all(root: Path, out: Path, options: list[str], world: int) -> list[BaseProcess]:
    port = free_port()
    return [start(root, out, options, rank=rank, world=world, port=port) for rank in range(world)]


def end_all(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(90)
    return [process.exitcode for process in processes]


def read_output(out: Path) -> str:
    return "".join(path.read_text() for path in sorted(out.glob("output.rank*")))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_training_ends_with_the_same_parameters(
    coco_root: Path, tmp_path: Path, world: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    reference = start_all(coco_root, whole, OPTIONS, world)

    rng = random.Random(world)
    saving = 0
    for kill in range(KILLS[world]):
        processes = start_all(coco_root, killed, OPTIONS, world)
        victim = rng.choice(processes)
        if kill % 6 == 0:  # while the training starts
            time.sleep(rng.uniform(0, 1.2))
        elif kill % 3 == 1:  # while the first process writes a checkpoint
            victim = processes[0]
            wait_until_it_saves(killed, processes)
        else:  # at any moment of training, saving and evaluation
            # Steps decide the moment, so that a fast machine is not finished before the last kill.
            wait_until_it_trains(killed, processes, steps=rng.randint(1, 6))
            time.sleep(rng.uniform(0, 0.15))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        saving += any(killed.glob("*.partial"))
        statuses = end_all(processes)  # other processes notice the lost one
        assert victim.exitcode == -signal.SIGKILL, read_output(killed)[-3000:]
        assert all(statuses), read_output(killed)[-3000:]
    assert saving > 0
    assert end_all(start_all(coco_root, killed, OPTIONS, world)) == [0] * world
    assert end_all(reference) == [0] * world

    assert len(read_progress(killed)) > 150  # some steps were repeated
    output = read_output(killed)
    assert "Removed what a killed run left half-written" in output
    for name in ("model_final.pth", "model_best.pth"):
        assert_equal(load(killed / name), load(whole / name), name)
    numbered = sorted(path.name for path in killed.glob("model_0*.pth"))
    assert numbered == ["model_0000139.pth", "model_0000144.pth", "model_0000149.pth"]
    assert not list(killed.glob("*.partial"))


def wait_until_it_trains(out: Path, processes: list[BaseProcess], *, steps: int) -> None:
    enough = len(read_progress(out)) + steps
    wait_for(lambda: len(read_progress(out)) >= enough or ended(processes), step=0.01)


def wait_until_it_saves(out: Path, processes: list[BaseProcess]) -> None:
    wait_for(lambda: any(out.glob("*.partial")) or ended(processes), step=0.0002)


def ended(processes: list[BaseProcess]) -> bool:
    return any(process.exitcode is not None for process in processes)
