# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The best weights of a training, kept over interruptions."""

from __future__ import annotations

import logging
import math
import os

import torch
from detectron2.engine import hooks
from torch import nn

from ..checkpoint import VoVNetCheckpointer

__all__ = ["BestCheckpointer"]

logger = logging.getLogger(__name__)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, but that it goes on from its file when a training is resumed, and that the
    file holds weights alone: it is there to be used, and ``--resume`` needs the newest."""

    def __init__(self, eval_period: int, model: nn.Module, save_dir: str, val_metric: str):
        """
        Args:
            eval_period: the period of ``EvalHook``, at least 1.
            val_metric: its result to compare, such as ``"bbox/AP"``; more is better.
        """
        super().__init__(eval_period, _WeightsCheckpointer(model, save_dir), val_metric)
        self._path = os.path.join(save_dir, f"{self._file_prefix}.pth")

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and os.path.isfile(self._path):
            saved = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
            if saved.get("metric") == self._val_metric:
                self.best_metric, self.best_iter = saved["value"], saved["iteration"]

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None or not math.isfinite(latest[0]):
            logger.warning("No %s in this evaluation: the best checkpoint stays.", self._val_metric)
            return
        value, iteration = latest
        if self.best_metric is not None and not self._compare(value, self.best_metric):
            logger.info(
                "%s is %.3f; the best stays %.3f after iteration %d.",
                self._val_metric,
                value,
                self.best_metric,
                self.best_iter,
            )
            return
        self.best_metric, self.best_iter = value, iteration
        logger.info("%s is %.3f, the best so far.", self._val_metric, value)
        self._checkpointer.save(
            self._file_prefix, metric=self._val_metric, value=value, iteration=iteration
        )


class _WeightsCheckpointer(VoVNetCheckpointer):
    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Leave the tag, which ``--resume`` follows, with the checkpoints that can be resumed."""
