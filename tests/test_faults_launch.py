# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Interruptions through the launchers, lost machines, and a long run."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fault_runs import assert_equal, free_port, load, make_steps, read_progress, start, wait_for

from vovnet_d2.engine.interruption import INTERRUPTED

pytest_plugins = ["engine_fixtures"]

TOOL = Path(__file__).parents[1] / "tools" / "pretrain_net.py"
TIMEOUT = 15  # seconds that processes wait for one that does not answer
THIN = [
    *["MODEL.VOVNET.STAGE_MID_CHANNELS", "(8,8,8,8)", "MODEL.VOVNET.STAGE_OUT_CHANNELS"],
    *["(8,8,8,8)", "MODEL.VOVNET.NORM", "GN", "TEST.EVAL_PERIOD", "0", "SEED", "3"],
    *["DATALOADER.NUM_WORKERS", "1", "SOLVER.IMS_PER_BATCH", "8", "PRETRAIN.IMAGE_SIZE", "32"],
    *["SOLVER.CHECKPOINT_PERIOD", "10", "SOLVER.CHECKPOINTS_KEPT", "2", "MODEL.DEVICE", "cpu"],
]


@contextmanager
def running(
    out: Path, iterations: int, *flags: str, launcher: tuple[str, ...] = (), log: str = "output"
) -> Iterator[subprocess.Popen]:
    """A training of the digits' classifier; what is left of it at the end is killed."""
    command = [sys.executable, *launcher, str(TOOL), "--resume", *flags]
    command += ["--config-file", "Classification/V_19_slim_eSE_digits.yaml", *THIN]
    command += ["SOLVER.MAX_ITER", str(iterations), "OUTPUT_DIR", str(out)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    environment["VOVNET_D2_TIMEOUT"] = str(TIMEOUT)
    out.mkdir(exist_ok=True)
    with (out / log).open("a") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for pid in descendants(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def descendants(pid: int) -> list[int]:
    """The process and all that it and they started."""
    found = [pid] if Path(f"/proc/{pid}").exists() else []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except FileNotFoundError:
            continue
        if int(parent) == pid:
            found += descendants(int(stat.parent.name))
    return found


def wait_for_checkpoint(
    out: Path, process: subprocess.Popen, log: Path | None = None, *, newer_than: str = ""
) -> None:
    log = log or out / "output"
    tag = out / "last_checkpoint"

    def saved() -> bool:
        return process.poll() is not None or (tag.exists() and tag.read_text() > newer_than)

    assert wait_for(saved, timeout=240, step=0.05), log.read_text()[-2000:]
    assert process.poll() is None, log.read_text()[-2000:]


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "to_all"),
    [("none", True), ("detectron2", False), ("detectron2", True), ("torchrun", False),
     ("torchrun", True)],
)  # fmt: skip
def test_a_signal_ends_with_a_checkpoint_and_a_status(
    tmp_path: Path, launcher: str, to_all: bool
) -> None:
    """Data loaders' workers are among all processes, as where Slurm sends a signal to a job."""
    flags = ("--num-gpus", "2") if launcher == "detectron2" else ()
    words = (*TORCHRUN, "--standalone") if launcher == "torchrun" else ()
    number = signal.SIGTERM if launcher == "torchrun" else signal.SIGUSR1
    with running(tmp_path, 10**6, *flags, launcher=words) as process:
        wait_for_checkpoint(tmp_path, process)
        first = (tmp_path / "last_checkpoint").read_text()
        for pid in descendants(process.pid) if to_all else [process.pid]:
            os.kill(pid, number)
        status = process.wait(120)
    output = (tmp_path / "output").read_text()
    assert status == (1 if launcher == "torchrun" else INTERRUPTED), output[-3000:]
    last = (tmp_path / "last_checkpoint").read_text()
    assert last > first
    assert f"error: interrupted by {number.name} after" in output
    assert f"go on with --resume from {tmp_path}/{last}." in output
    assert load(tmp_path / last)["iteration"] == int(last[6:13])
    assert "vovnet_d2/engine/trainer.py" not in output  # no traceback


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(tmp_path: Path) -> None:
    launcher = (*TORCHRUN, "--standalone", "--max-restarts", "1")
    with running(tmp_path, 60, launcher=launcher) as agent:
        wait_for_checkpoint(tmp_path, agent)
        workers = [pid for pid in descendants(agent.pid) if is_child(pid, agent.pid)]
        os.kill(workers[1], signal.SIGKILL)
        assert agent.wait(180) == 0, (tmp_path / "output").read_text()[-3000:]
    assert "Resumed from" in (tmp_path / "output").read_text()
    assert load(tmp_path / "model_final.pth")["iteration"] == 59


def is_child(pid: int, parent: int) -> bool:
    return f"PPid:\t{parent}\n" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.slow
def test_processes_agree_on_each_step() -> None:
    """A fault in one process keeps all processes from changing the parameters."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_runs"])
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=make_steps, args=(r, 2, port, results)) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=90) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert found[0] == found[1]
    assert found[0] == [
        ("", None, 0.75),
        ("loss is nan.", None, 0.75),
        ("FloatingPointError.", None, 0.75),
        ("", "SIGTERM", 0.5),
    ]


@pytest.mark.slow
def test_two_machines_of_which_one_is_lost(tmp_path: Path) -> None:
    """Two of torchrun's agents. The processes of one are killed, and after a resume stopped, which
    is what a cut cable looks like; the other ends in time, and says why. Both resume."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    iterations = 150
    with running(whole, iterations, launcher=(*TORCHRUN, "--standalone")) as process:
        assert process.wait(400) == 0, (whole / "output").read_text()[-3000:]

    last = ""
    for number in (signal.SIGKILL, signal.SIGSTOP):
        log = cut / f"log of {number.name}"
        with two_machines(cut, iterations, log.name) as (first, second):
            wait_for_checkpoint(cut, first, log, newer_than=last)
            for pid in descendants(second.pid):
                os.kill(pid, number)
            told = wait_for(lambda log=log: "error:" in log.read_text(), timeout=TIMEOUT + 10)
            assert told, log.read_text()[-3000:]
            assert first.wait(60) != 0
        assert "error: the connection to another process is lost (" in log.read_text()
        assert "start all processes again with --resume." in log.read_text()
        last = (cut / "last_checkpoint").read_text()
    with two_machines(cut, iterations, "log") as machines:
        for machine in machines:
            assert machine.wait(400) == 0, (cut / "log").read_text()[-3000:]
    assert "Resumed from" in (cut / "log").read_text()
    assert_equal(load(cut / "model_final.pth"), load(whole / "model_final.pth"))


@contextmanager
def two_machines(
    out: Path, iterations: int, log: str
) -> Iterator[tuple[subprocess.Popen, subprocess.Popen]]:
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--nnodes", "2"]
    words += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank"]
    with (
        running(out, iterations, launcher=(*words, "0"), log=log) as first,
        running(out, iterations, launcher=(*words, "1"), log=f"{log} of the second") as second,
    ):
        yield first, second


@pytest.mark.slow
def test_memory_and_open_files_stay(
    coco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 steps with evaluation and checkpoints in between, and workers that load the data."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = ["SOLVER.MAX_ITER", "2000", "TEST.EVAL_PERIOD", "200", "SOLVER.CHECKPOINTS_KEPT", "2"]
    options += ["SOLVER.CHECKPOINT_PERIOD", "100", "DATALOADER.NUM_WORKERS", "1"]
    process = start(coco_root, tmp_path, [*options, "SOLVER.BASE_LR", "0.0001"])
    process.join(600)
    assert process.exitcode == 0, (tmp_path / "output.rank0").read_text()[-3000:]
    steps, memory, files = np.array(read_progress(tmp_path)).T
    assert steps.tolist() == list(range(2000))
    # Of hundreds of steps, as a single one's garbage is not collected at once.
    means = memory[200:].reshape(9, 200).mean(axis=1)
    print("resident MB by 200 steps:", (means / 1e6).round(1), "open files:", set(files[200:]))
    assert means.max() / means.min() < 1.02
    # A log or a checkpoint may be open at the moment of counting, and is not after the next steps.
    medians = np.median(files[200:].reshape(9, 200), axis=1)
    assert set(medians.tolist()) == {files.min()}
    assert files.max() - files.min() < 5
