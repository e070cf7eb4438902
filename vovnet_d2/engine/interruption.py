# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Signals, and the loss of another process: events that end a run from outside."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist
from detectron2.utils import comm

from ..signals import ending_signals

INTERRUPTED = 75
"""Exit status of a run that a signal ended: EX_TEMPFAIL of sysexits.h, "try again later"."""

CTRL_C = 130
"""Exit status of a program that Ctrl-C ended at once, as shells report it."""

_SAME_CTRL_C = 1.0  # seconds; it may come from the terminal and from the launcher

_STOPPING = "\nStopping after this step, with a checkpoint. Another Ctrl-C stops at once.\n"

Handler = Callable[[int, FrameType | None], None]


class Interrupted(SystemExit):
    """A signal ended the run, and its checkpoint is saved."""

    def __init__(self, signal: str, message: str = ""):
        super().__init__(INTERRUPTED)
        self.signal = signal
        self.message = message or f"interrupted by {signal}."

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """Remember that a signal has asked the run to end. A training looks at it after each step.

    A second Ctrl-C, later than a second after the first, raises :class:`KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Let a signal in this context set :attr:`signal` instead of ending the process."""
        with handle_signals(self._handle):
            yield

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()
            if number == signal.SIGINT and comm.is_main_process():
                os.write(2, _STOPPING.encode())  # the signal may have come during a print
        elif number == signal.SIGINT and time.monotonic() - self._since > _SAME_CTRL_C:
            raise KeyboardInterrupt


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Let signals raise :class:`Interrupted`, in a context in which there is nothing to save."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    with handle_signals(handle):
        yield


@contextmanager
def handle_signals(handler: Handler) -> Iterator[None]:
    """Let ``handler`` handle the signals in this context. In other threads than the main thread
    this has no effect, as Python does not allow it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in ending_signals()}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def is_lost_connection(error: BaseException) -> bool:
    """Return True if an error means that another process, or its machine, is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
