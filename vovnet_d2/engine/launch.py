# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes: one, several that this one starts, or one of those that torchrun started."""

from __future__ import annotations

import argparse
import dis
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

__all__ = ["launch_or_exit", "run_or_exit"]

Run = Callable[[argparse.Namespace], Any]


def launch_or_exit(run: Run, args: argparse.Namespace) -> None:
    """Call ``run(args)`` in each process of the command line or of torchrun.

    Args:
        run: what a process does.
        args: with Detectron2's ``num_gpus``, ``num_machines``, ``machine_rank`` and ``dist_url``.
            On a machine without GPUs ``num_gpus`` is the number of processes.

    Raises:
        SystemExit: with status 2 after a mistake of the user, which is told in a sentence; with 1
            if the training diverged. Anything else that goes wrong keeps its traceback.
    """
    if dist.is_torchelastic_launched():
        if args.num_gpus > 1 or args.num_machines > 1:
            _exit("torchrun says how many processes there are: leave out --num-gpus and the like.")
        _join_torchrun()
        try:
            run_or_exit(run, args)
        finally:
            dist.destroy_process_group()
        return
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > gpus:
        _exit(f"--num-gpus is {args.num_gpus}, but torch finds {gpus}.")
    try:
        launch(
            run_or_exit,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(run, args),
        )
    except ProcessExitedException as error:  # a process of several, which has said why
        sys.exit(error.exit_code)


def _join_torchrun() -> None:
    """What Detectron2's ``launch`` does in each process that it starts."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()


def run_or_exit(run: Run, args: argparse.Namespace) -> Any:
    """``run(args)`` in this process alone; raises what :func:`launch_or_exit` does."""
    try:
        return run(args)
    except FloatingPointError as error:
        _exit(str(error), status=1)
    except (FileNotFoundError, ImportError, KeyError, ValueError) as error:
        if not _is_sentence_of_ours(error):
            raise
        _exit(str(error.args[0]))


def _exit(message: str, *, status: int = 2) -> None:
    rank = f"[rank {comm.get_rank()}] " if comm.get_world_size() > 1 else ""
    print(f"{rank}error: {message}", file=sys.stderr)
    sys.exit(status)


def _is_sentence_of_ours(error: Exception) -> bool:
    """Whether this package raised an error on purpose, rather than ran into it or into a surprise
    from further below: those are bugs, and keep their tracebacks."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    frame = traceback.tb_frame
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    # The code and not its source, which may be gone or edited since.
    instruction = dis.opname[frame.f_code.co_code[traceback.tb_lasti]]
    return package == __package__.partition(".")[0] and instruction == "RAISE_VARARGS"
