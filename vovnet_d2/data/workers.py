# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The workers of data loaders end after the main process has saved its state, and not before."""

import atexit
import multiprocessing
import signal
import time
from typing import Any

from torch.utils.data import DataLoader

from ..signals import ending_signals
from ..waits import longest_wait

_FAREWELL = 300  # seconds for the current step to end
_LAST_FAREWELL = 1  # seconds for workers to end with the main process


def attend_to_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Let the workers of a loader run until they are dismissed, and return the loader. The loader
    waits at most :func:`longest_wait` for a worker that does not answer, for example because its
    disk hangs."""
    loader.worker_init_fn = stay_until_dismissed
    # Without SIGCHLD (Windows), torch notices that a worker has ended only if the loader has no
    # timeout.
    if loader.num_workers and hasattr(signal, "SIGCHLD"):
        loader.timeout = longest_wait().total_seconds()
    return loader


def is_silent_worker(error: BaseException) -> bool:
    """Return True if an error means that a worker of a data loader did not answer in time."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader timed out")


def stay_until_dismissed(worker: int) -> None:
    """Let a worker outlive the signals that end a job, by up to five minutes. If a worker ended at
    once, the main process would fail before it has saved its state."""
    if not hasattr(signal, "SIGALRM"):  # Windows, where a worker ends with the main process
        for number in ending_signals():
            signal.signal(number, signal.SIG_IGN)
        return
    for number in ending_signals():
        signal.signal(number, lambda *_: signal.alarm(_FAREWELL))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the worker if nothing has ended it before


@atexit.register
def dismiss_workers() -> None:
    """End the workers that are left when Python ends, for example after an error in an evaluation.
    Otherwise multiprocessing would wait for workers that do not end
    (:func:`stay_until_dismissed`)."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        # torch's handler would take the end of a worker for a failure.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.terminate()
    end = time.monotonic() + _LAST_FAREWELL
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
        worker.kill()
