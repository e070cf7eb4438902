# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The signals that end a run."""

import signal


def ending_signals() -> list[signal.Signals]:
    """Return the following signals, as far as the system has them. Windows has the first two.

    They are SIGTERM (preemption), SIGINT (Ctrl-C), SIGUSR1 (Slurm), and SIGHUP (the terminal is
    gone) unless it is ignored, as under nohup.
    """
    names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    if "SIGHUP" in names and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        names.remove("SIGHUP")
    return [signal.Signals[name] for name in names]
