# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure in fresh processes: the memory of a process, and the throughput of all cores."""

import gc
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ..errors import describe
from ..modeling.allocation import keep_freed_memory
from .limits import available_cores, available_memory

Call = Callable[[], object]
Loader = Callable[[], Call]
"""A function that can be pickled, and that loads a network. The function that it returns runs the
network once."""

_CALLS = 3  # for the peak of the memory: the first call prepares what later calls keep


def run_together(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call a function in a fresh process for each tuple of arguments, all at once.

    Args:
        function: takes a barrier of all these processes, then the arguments.

    Returns:
        the results, in the order of the arguments.

    Raises:
        RuntimeError: a call failed, or its process ended. The others are stopped.
        Exception: the function or an argument cannot be pickled.
    """
    context = get_context("spawn")  # a fork would have the memory of this process
    barrier = context.Barrier(len(arguments))
    processes: list[Any] = []
    places: dict[Any, int] = {}
    results: dict[int, Any] = {}
    try:
        for place, values in enumerate(arguments):
            receiver, sender = context.Pipe(duplex=False)
            task = (sender, function, barrier, *values)
            process = context.Process(target=_answer, args=task, daemon=True)
            process.start()
            processes.append(process)
            sender.close()  # so that the end of the process closes the pipe
            places[receiver] = place
        while waiting := [r for r, place in places.items() if place not in results]:
            for ready in wait(waiting):
                results[places[ready]] = _receive(ready)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[place] for place in range(len(arguments))]


def _receive(receiver: Any) -> Any:
    try:
        value, reason = receiver.recv()
    except EOFError:
        raise RuntimeError("a process ended early, perhaps for lack of memory") from None
    if reason:
        raise RuntimeError(reason)
    return value


def _answer(sender: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process after Ctrl-C
    try:
        sender.send((function(*arguments), ""))
    except Exception as error:  # networks of others may raise any error
        sender.send((None, describe(error)))


# Memory ------------------------------------------------------------------------------------------


def added_memory(preload: Call, load: Loader) -> int | None:
    """Return the bytes by which the resident memory of a fresh process grows at most while it loads
    a network and calls it. The process has as many threads as this one.

    Args:
        preload: a function that can be pickled, and that imports the packages of the network. Their
            memory is not counted.

    Returns:
        the bytes; None on systems other than Linux, and in a sandbox that hides them.
    """
    return run_together(_added_memory, [(preload, load, torch.get_num_threads())])[0]


def _added_memory(barrier: object, preload: Call, load: Loader, threads: int) -> int | None:
    torch.set_num_threads(threads)
    preload()
    gc.collect()
    keep_freed_memory()  # only now, otherwise the network would reuse freed memory of the imports
    before = _restart_peak()
    if before is None:
        return None
    call = load()
    for _ in range(_CALLS):
        call()
    return _peak() - before


def _restart_peak() -> int | None:
    """Let the peak of the resident memory begin at its present value, and return that value in
    bytes; None if the system cannot do so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak()
    except (OSError, StopIteration):
        return None


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# Throughput --------------------------------------------------------------------------------------


def calls_per_second(load: Loader, *, seconds: float, memory: int | None = None) -> float:
    """Return the calls per second of as many processes as there are cores for this process.

    Each process has one thread on its own core. All begin together, and run for at least
    ``seconds``.

    Args:
        memory: the bytes that each process needs, if they are known.

    Raises:
        RuntimeError: see :func:`run_together`; or the memory of all processes is not available.
    """
    cores, free = available_cores(), available_memory()
    if memory is not None and len(cores) * memory > free:
        raise RuntimeError(
            f"{len(cores)} processes at once need {len(cores) * memory / 1e9:.1f} GB of memory, "
            f"and {free / 1e9:.1f} GB are available"
        )
    return sum(run_together(_calls_per_second, [(load, core, seconds) for core in cores]))


def _calls_per_second(barrier: Any, load: Loader, core: int, seconds: float) -> float:
    if hasattr(os, "sched_setaffinity"):
        # Otherwise a backend that pins its threads might take the same core in each process.
        with suppress(OSError):
            os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()
    call = load()
    call()
    barrier.wait()
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        call()
        calls += 1
    return calls / elapsed
