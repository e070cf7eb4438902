# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes: one, several that this one starts, or one of those that torchrun started.

How a run ends, by its exit status:

- 0: all is done.
- 1: it failed on the way: the training diverged, the disk or a GPU's memory is full, another
  process or machine is lost; an error with a traceback.
- 2: a mistake of the user, told in a sentence.
- 75: SIGTERM, SIGUSR1, SIGHUP or Ctrl-C ended it (EX_TEMPFAIL, "try again"); ``--resume`` goes on.

torchrun gives its own status, 1, whatever that of its processes was. It passes SIGTERM on to them,
and SIGUSR1 with its ``--signals-to-handle``.
"""

from __future__ import annotations

import argparse
import dis
import errno
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from ..checkpoint.atomic import FileNotWrittenError
from ..data.unreadable import UnreadableImageError
from .gpu_memory import GpuMemoryError
from .interruption import (
    INTERRUPTED,
    Interrupted,
    exit_on_signal,
    handle_signals,
    is_lost_connection,
)
from .quiet import escape_unwritable, hide_known_messages

__all__ = ["launch_command", "launch_or_exit", "run_or_exit"]

Run = Callable[[Any], Any]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def launch_command(
    run: Run, parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> None:
    """:func:`launch_or_exit` with the arguments of a command line.

    Args:
        run: what a process does.
        argv: the arguments, by default those of the program that is running, which is then
            ``args.command``.

    Raises:
        SystemExit: as :func:`launch_or_exit` does.
    """
    args = parser.parse_args(argv)
    if argv is None:
        args.command = shlex.join(["python", *sys.argv])
    launch_or_exit(run, args)


def launch_or_exit(run: Run, args: argparse.Namespace) -> None:
    """Call ``run(args)`` in each process of the command line or of torchrun.

    Args:
        run: what a process does.
        args: with Detectron2's ``num_gpus``, ``num_machines``, ``machine_rank`` and ``dist_url``.
            On a machine without GPUs ``num_gpus`` is the number of processes.

    Raises:
        SystemExit: with one of the statuses above. What is no known reason to fail keeps its
            traceback.
    """
    run = partial(_end_on_signal, run)
    if dist.is_torchelastic_launched():
        if args.num_gpus > 1 or args.num_machines > 1:
            _exit("torchrun says how many processes there are: leave out --num-gpus and the like.")
        run_or_exit(partial(_run_in_torchrun, run), args)
        return
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > gpus:
        _exit(f"--num-gpus is {args.num_gpus}, but torch finds {gpus}.")
    signals: list[int] = []
    try:
        with handle_signals(partial(_pass_on, signals)):
            launch(
                run_or_exit,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(run, args),
                timeout=_timeout(),
            )
    except ProcessExitedException as error:
        if error.exit_code > 0:  # a process of several, which has said why
            sys.exit(error.exit_code)
        if signals:  # before the process was ready for them
            _exit("interrupted before the start.", status=INTERRUPTED)
        _exit(f"{error}. Start again with --resume.", status=1)


def _end_on_signal(run: Run, args: argparse.Namespace) -> Any:
    with exit_on_signal():
        hide_known_messages()
        _limit_waits()
        return run(args)


def _limit_waits() -> None:
    """Beside NCCL's group Detectron2 has one of gloo for what is no tensor, which it leaves at
    torch's timeout of half an hour: give it ours."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        group = dist.new_group(backend="gloo", timeout=_timeout())
        comm._get_global_gloo_group = lambda: group


def _pass_on(signals: list[int], number: int, frame: FrameType | None) -> None:
    """Let the processes that this one started end. They have had a Ctrl-C from the terminal."""
    signals.append(number)
    for process in multiprocessing.active_children():
        assert process.pid is not None  # it is started
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, signal.SIGTERM if number == signal.SIGINT else number)


def _timeout() -> timedelta:
    """How long a process waits for another that does not answer: VOVNET_D2_TIMEOUT, in seconds,
    from the environment, or Detectron2's half an hour. One that has ended is noticed at once, but
    on GPUs perhaps by the launcher alone, which then ends the others."""
    value = os.environ.get("VOVNET_D2_TIMEOUT", "")
    if not value:
        return DEFAULT_TIMEOUT
    if not value.isdecimal() or int(value) == 0:
        _exit(f"VOVNET_D2_TIMEOUT is {value!r}: set it to a number of seconds, or not at all.")
    return timedelta(seconds=int(value))


def _run_in_torchrun(run: Run, args: argparse.Namespace) -> None:
    _join_torchrun()
    run(args)
    dist.destroy_process_group()


def _join_torchrun() -> None:
    """What Detectron2's ``launch`` does in each process that it starts."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = _timeout()
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # After a restart by torchrun, its store may still hold the addresses of those before.
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()


def run_or_exit(run: Run, args: Any) -> Any:
    """Call ``run(args)`` in this process alone, as every tool does that does not train.

    Raises:
        SystemExit: see :func:`launch_or_exit`.
    """
    escape_unwritable(sys.stdout, sys.stderr)
    try:
        return run(args)
    except Interrupted as error:
        _exit(error.message, status=INTERRUPTED)
    except (FileNotWrittenError, FloatingPointError, GpuMemoryError) as error:
        _exit(str(error), status=1)
    except UnreadableImageError as error:  # of a worker of the data loader, perhaps
        _exit(error.sentence)
    except (FileNotFoundError, ImportError, KeyError, ValueError) as error:
        if not _is_sentence_of_ours(error, getattr(run, "__module__", "")):
            raise
        _exit(str(error.args[0]))
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:  # not a file of ours: a log
            _exit(f"{error}. Make room, and go on with --resume.", status=1)
        if not is_lost_connection(error):
            raise
        first_line = str(error).partition("\n")[0]
        _exit(
            f"the connection to another process is lost ({first_line}). If it or its machine has "
            "failed, start all of them again with --resume.",
            status=1,
        )


def _exit(message: str, *, status: int = 2) -> None:
    rank = f"[rank {comm.get_rank()}] " if comm.get_world_size() > 1 else ""
    print(f"{rank}error: {message}", file=sys.stderr)
    sys.exit(status)


def _is_sentence_of_ours(error: Exception, tool: str = "") -> bool:
    """Whether this package, or the module of the tool, raised an error on purpose, rather than ran
    into it or into a surprise from further below: those are bugs, and keep their tracebacks."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    frame = traceback.tb_frame
    module = frame.f_globals.get("__name__", "")
    ours = module == tool or module.partition(".")[0] == __package__.partition(".")[0]
    # The code and not its source, which may be gone or edited since.
    instruction = dis.opname[frame.f_code.co_code[traceback.tb_lasti]]
    return ours and instruction == "RAISE_VARARGS"
