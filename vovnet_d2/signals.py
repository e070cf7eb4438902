# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The signals that end a run."""

from __future__ import annotations

import signal

__all__ = ["ending_signals"]


def ending_signals() -> list[signal.Signals]:
    """SIGTERM and SIGUSR1 (preemption, Slurm), SIGINT (Ctrl-C), and SIGHUP (the terminal is gone)
    unless it is ignored, as under nohup."""
    found = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found
