# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of the launcher in separate processes, which tests kill. The processes are forked from a
server that has imported everything already, so a start takes one second instead of ten."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_coco
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from engine_runs import FASTER_RCNN, TINY, quick_set_up

from vovnet_d2.engine import Trainer, main
from vovnet_d2.engine.agreed_steps import AgreedSteps
from vovnet_d2.engine.nonfinite import NonFiniteLossError

TIMEOUT = 20  # seconds; how long processes wait for each other


def start(
    root: Path, out: Path, options: Sequence[str], *, rank: int = 0, world: int = 1, port: int = 0
) -> BaseProcess:
    """Start one process of a training with ``--resume``.

    Args:
        root: the folder that :func:`write_coco_tree` returned.
        options: keys and values of the config.
        rank: the rank of the process among the ``world`` processes that meet at ``port``, as
            torchrun starts them.
    """
    return fork(_train, root, out, list(options), rank, world, port)


def start_classifiers(out: Path, arguments: Sequence[str], timeout: int) -> list[BaseProcess]:
    """Start two processes of ``tools/pretrain_net.py``, as torchrun starts them.

    Args:
        arguments: the arguments of the tool.
        timeout: the time in seconds that the processes wait for each other.
    """
    port = free_port()
    return [fork(_classify, out, list(arguments), r, 2, port, timeout) for r in range(2)]


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that has imported everything.

    It is forked from a server, which the first call starts.
    """
    path = filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    environment = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_runs", "vovnet_d2.engine.pretrain"])
    process = context.Process(target=target, args=arguments)
    with mock.patch.dict(os.environ, environment, CUDA_VISIBLE_DEVICES=""):
        process.start()
    return process


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition: Callable[[], bool], *, timeout: float = 90, step: float = 0.002) -> bool:
    """Return True if the condition becomes true before the timeout."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(step)
    return True


def _train(root: Path, out: Path, options: list[str], rank: int, world: int, port: int) -> None:
    _set_up(out, rank, world, port, TIMEOUT)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    register_all_coco(str(root))
    build_hooks = Trainer.build_hooks
    Trainer.build_hooks = lambda self: [*build_hooks(self), Progress(out, rank)]
    sys.argv = ["train_net.py"]
    options = [*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(out), *options]
    with quick_set_up():
        main(["--config-file", FASTER_RCNN, "--resume", *options])


def _classify(
    out: Path, arguments: list[str], rank: int, world: int, port: int, timeout: int
) -> None:
    from vovnet_d2.engine import pretrain

    _set_up(out, rank, world, port, timeout)
    sys.argv = ["pretrain_net.py"]
    with quick_set_up():
        pretrain.main(arguments)


def _set_up(out: Path, rank: int, world: int, port: int, timeout: int) -> None:
    """Write what this process prints to a file, and set the variables that torchrun sets."""
    descriptor = os.open(out / f"output.rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    multiprocessing.set_start_method("fork", force=True)  # the usual start method of data loaders
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            **{"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"},
            **{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port)},
            **{"TORCHELASTIC_RUN_ID": "faults", "VOVNET_D2_TIMEOUT": str(timeout)},
        }


def make_steps(rank: int, world: int, port: int, results: Queue) -> None:
    """Make four training steps of a model with one parameter, as one process of several.

    In the process with the last rank, the loss of the second step is NaN, the third step raises an
    error, and a signal arrives in the fourth step. The function puts the rank into ``results``,
    together with the error, the signal and the parameter after each step.
    """
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    parameter = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(parameter.weight)

    class Model(torch.nn.Module):
        def forward(self, step: int) -> dict[str, torch.Tensor]:
            if step == 2 and rank == world - 1:
                raise FloatingPointError
            factor = float("nan") if step == 1 and rank == world - 1 else 1.0
            return {"loss": parameter.weight.sum() * factor}

    optimizer = torch.optim.SGD(parameter.parameters(), lr=0.25)
    trainer = AgreedSteps(Model(), range(4), optimizer)
    told = []
    with EventStorage():
        for trainer.iter in range(4):
            if trainer.iter == 3 and rank == world - 1:
                trainer.request.signal = "SIGTERM"
            error = ""
            try:
                trainer.run_step()
            except NonFiniteLossError as caught:
                error = str(caught)
            told.append((error, trainer.stop_signal, parameter.weight.item()))
    results.put((rank, told))


class Progress(HookBase):
    """Hook that adds a line to ``progress.rank<rank>`` after each step.

    The line has the iteration, the resident memory in bytes and the number of open files.
    """

    def __init__(self, out: Path, rank: int):
        self._path = out / f"progress.rank{rank}"

    def after_step(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        with self._path.open("a") as file:
            file.write(f"{self.trainer.iter} {pages * os.sysconf('SC_PAGESIZE')} {files}\n")


def read_progress(out: Path, rank: int = 0) -> list[list[int]]:
    path = out / f"progress.rank{rank}"
    if not path.exists():
        return []
    rows = [line.split() for line in path.read_text().splitlines()]
    return [[int(word) for word in row] for row in rows if len(row) == 3]


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Check that two values are equal bit for bit, also inside dicts and lists."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_equal(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected or (found != found and expected != expected), where


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint without the wall time, which differs between runs."""
    content = torch.load(path, weights_only=False)
    content.get("trainer", {}).pop("seconds", None)
    return content
