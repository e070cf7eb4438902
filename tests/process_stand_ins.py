# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for networks, with known time and memory, that other processes load."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_kept: list[np.ndarray] = []


@dataclass(frozen=True)
class Sleeping:
    """Network whose call takes a known time. Each process notes the start and the end of its calls
    in a file of its own."""

    folder: Path
    seconds: float

    def load(self) -> Callable[[], object]:
        note = self.folder / str(os.getpid())
        if any(self.folder.iterdir()):
            time.sleep(0.5)  # this process is later than the other
        note.touch()

        def call() -> None:
            start = time.monotonic()
            time.sleep(self.seconds)
            with note.open("a") as file:
                file.write(f"{start} {time.monotonic()} {torch.get_num_threads()}\n")

        return call


@dataclass(frozen=True)
class Holding:
    """Network that holds some bytes, and takes others in each call."""

    held: int
    taken: int
    imported: int

    def preload(self) -> None:
        """Take bytes for a moment, as imports do, and keep some of them."""
        _kept.append(np.ones(self.imported, np.uint8))
        np.ones(3 * self.imported, np.uint8)

    def load(self) -> Callable[[], object]:
        weights = np.ones(self.held, np.uint8)
        return lambda: (weights, np.ones(self.taken, np.uint8))


def fail_beside_one_that_waits(barrier: Any, fails: bool) -> None:
    if fails:
        raise ValueError("no such kernel")
    barrier.wait()


def end(barrier: Any) -> None:
    os._exit(1)
