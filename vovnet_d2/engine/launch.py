# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A run is started in one process, in several processes on this machine, or by torchrun.

The exit status of a run:

- 0: the run is complete.
- 1: the run failed: the training diverged, the disk or the memory of a GPU is full, another process
  or machine is lost, or an error ended it with a traceback.
- 2: a mistake of the user, told in a sentence (a :class:`~vovnet_d2.errors.UserError`).
- 75: SIGTERM, SIGUSR1, SIGHUP or Ctrl-C ended the run (EX_TEMPFAIL, "try again"). ``--resume``
  continues it.

torchrun itself ends with status 1 if any of its processes fails. It passes SIGTERM on to the
processes, and SIGUSR1 with its ``--signals-to-handle``.
"""

import argparse
import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from ..data.workers import is_silent_worker
from ..errors import UserError
from ..timing import command_line
from ..waits import longest_wait
from .interruption import (
    CTRL_C,
    INTERRUPTED,
    Interrupted,
    exit_on_signal,
    handle_signals,
    is_lost_connection,
)
from .quiet import escape_unwritable, hide_known_messages

Run = Callable[[Any], Any]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def launch_command(
    run: Run, parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> None:
    """Call :func:`launch_or_exit` with the arguments of a command line. By default these are the
    arguments of the running program, whose command line is then ``args.command``."""
    args = parser.parse_args(argv)
    if argv is None:
        args.command = command_line()
    launch_or_exit(run, args)


def launch_or_exit(run: Run, args: argparse.Namespace) -> None:
    """Call ``run(args)`` in each process of the command line or of torchrun.

    Args:
        run: the function that each process calls.
        args: has Detectron2's ``num_gpus``, ``num_machines``, ``machine_rank`` and ``dist_url``. On
            a machine without GPUs ``num_gpus`` is the number of processes.

    Raises:
        SystemExit: with one of the statuses above. An unknown error keeps its traceback.
    """
    run = partial(_end_on_signal, run)
    if dist.is_torchelastic_launched():
        if args.num_gpus > 1 or args.num_machines > 1:
            _exit("torchrun sets the number of processes: leave out --num-gpus and the like.")
        run_or_exit(partial(_run_in_torchrun, run), args)
        return
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > gpus:
        _exit(f"--num-gpus is {args.num_gpus}, but torch finds {gpus}.")
    signals: list[int] = []
    timeout = run_or_exit(lambda _: longest_wait(), args)
    try:
        with handle_signals(partial(_pass_on, signals)):
            launch(
                run_or_exit,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(run, args),
                timeout=timeout,
            )
    except ProcessExitedException as error:
        if error.exit_code > 0:  # one of several processes, which has printed the reason
            sys.exit(error.exit_code)
        if signals:  # they came before the process could handle them
            _exit("interrupted before the start.", status=INTERRUPTED)
        _exit(f"{error}. Start again with --resume.", status=1)


def _end_on_signal(run: Run, args: argparse.Namespace) -> Any:
    with exit_on_signal():
        _limit_waits()
        return run(args)


def _limit_waits() -> None:
    """Give the gloo group, which Detectron2 uses in addition to NCCL, the timeout of this run.

    Detectron2 leaves the timeout at torch's default of half an hour.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        group = dist.new_group(backend="gloo", timeout=longest_wait())
        comm._get_global_gloo_group = lambda: group


def _pass_on(signals: list[int], number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the processes that this process started. For Ctrl-C they get SIGTERM,
    because the terminal has sent them the Ctrl-C already."""
    signals.append(number)
    for process in multiprocessing.active_children():
        assert process.pid is not None  # it is started
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, signal.SIGTERM if number == signal.SIGINT else number)


def _run_in_torchrun(run: Run, args: argparse.Namespace) -> None:
    _join_torchrun()
    run(args)
    dist.destroy_process_group()


def _join_torchrun() -> None:
    """Set up a process that torchrun has started, as Detectron2's ``launch`` sets up its own."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = longest_wait()
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # After a restart by torchrun, its store may still hold the addresses of the earlier processes.
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()


def run_or_exit(run: Run, args: Any) -> Any:
    """Call ``run(args)`` in this process alone, and end with a sentence for a known error. For the
    statuses see :func:`launch_or_exit`."""
    escape_unwritable(sys.stdout, sys.stderr)
    hide_known_messages()
    try:
        return run(args)
    except Interrupted as error:
        _exit(error.message, status=INTERRUPTED)
    except KeyboardInterrupt:
        _exit("interrupted by Ctrl-C.", status=CTRL_C)
    except UserError as error:
        _exit(error.sentence, status=error.exit_status)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:  # for example, of a log file
            _exit(f"{error}. Free some space, and go on with --resume.", status=1)
        if is_silent_worker(error):
            _exit(
                f"{error}: a process that loads images does not answer. Its disk or network may "
                "hang. Start again with --resume. VOVNET_D2_TIMEOUT sets another limit in seconds.",
                status=1,
            )
        if not is_lost_connection(error):
            raise
        first_line = str(error).partition("\n")[0]
        _exit(
            f"the connection to another process is lost ({first_line}). If that process or its "
            "machine has failed, start all processes again with --resume.",
            status=1,
        )


def _exit(message: str, *, status: int = 2) -> None:
    rank = f"[rank {comm.get_rank()}] " if comm.get_world_size() > 1 else ""
    print(f"{rank}error: {message}", file=sys.stderr)
    sys.exit(status)
