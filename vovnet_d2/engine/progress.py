# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A progress bar in the terminal in place of the log, for ``train_net.py --progress``."""

import logging
import time

from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from tqdm import tqdm

from ..words import counted
from .quiet import terminal_handlers

# The first steps are slower than the others: libraries choose their algorithms in them.
_WARMUP_STEPS = 2
_TIMED_STEPS = 4
# The time of an image at test over its time in training, which has a backward pass too.
_TEST_COST = 0.5


def shorten_log(logger_name: str) -> None:
    """Show only warnings and the results of a logger in the terminal.

    A warning with the attribute ``told_by_progress_bar`` is not shown, because the line of
    :class:`ProgressBar` says the same. The log file in ``OUTPUT_DIR`` keeps every line.
    """
    for handler in terminal_handlers(logger_name):
        handler.addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    if getattr(record, "told_by_progress_bar", False):
        return False
    return record.levelno >= logging.WARNING or record.name == "vovnet_d2.engine.report"


class ProgressBar(HookBase):
    """Say how long the training will take, then show a bar with the loss and the time left.

    The estimate follows from the first steps, so it holds for this machine under its present load.
    It covers the remaining steps and the evaluation after the last one.
    """

    _bar: tqdm | None = None  # another hook may end the training before its start

    def before_train(self) -> None:
        self._began = time.perf_counter()

    def after_step(self) -> None:
        step = self.trainer.iter + 1
        done = step - self.trainer.start_iter
        if done == _WARMUP_STEPS:
            self._began = time.perf_counter()
        if done == _WARMUP_STEPS + _TIMED_STEPS:
            self._announce((time.perf_counter() - self._began) / _TIMED_STEPS, step)
        elif self._bar is not None:
            self._bar.update()
            loss, _ = self.trainer.storage.latest()["total_loss"]
            self._bar.set_postfix(loss=f"{loss:.2f}")
            if step == self.trainer.max_iter:
                self._bar.set_description("Evaluating")

    def after_train(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _announce(self, seconds_per_step: float, step: int) -> None:
        cfg, left = self.trainer.cfg, self.trainer.max_iter - step
        images = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TEST)
        test_steps = images * _TEST_COST / cfg.SOLVER.IMS_PER_BATCH
        tqdm.write(
            f"This takes about {_in_words(seconds_per_step * (left + test_steps))} on this "
            f"machine ({cfg.MODEL.DEVICE}): {counted(left, 'more steps')} of "
            f"{seconds_per_step:.2f} s, then an evaluation on {counted(images, 'images')}."
        )
        self._bar = tqdm(initial=step, total=self.trainer.max_iter, unit="step", desc="Training")


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds / 10), 1) * 10} seconds"
    if seconds < 5400:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
