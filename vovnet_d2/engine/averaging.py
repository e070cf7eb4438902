# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average (EMA) of the weights of a training: ``SOLVER.EMA``."""

import logging
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

logger = logging.getLogger(__name__)

EMA_SUFFIX = "_EMA"
"""The suffix of a task's name in the results of the averaged weights."""


class WeightAverage(HookBase):
    """Keeps the exponential moving average of a model's parameters and buffers.

    The average begins with the weights after the first step. After each later step it becomes
    ``d * average + (1 - d) * weights``, where ``d`` is ``min(decay, (1 + n) / (10 + n))`` and ``n``
    counts the steps before this one. The second term keeps the average of a short training close to
    its weights (``num_updates`` of TensorFlow's ``ExponentialMovingAverage``).

    The average is in the checkpoints of the training, as the state of this hook. Each process keeps
    an average, as each process keeps the weights.

    Attributes:
        model: a copy of the network that has the averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        """Average a network that is trained, without DistributedDataParallel around it. ``decay``
        is above 0 and below 1."""

        def average(averaged: Any, current: Any, count: torch.Tensor | int) -> None:
            steps = int(self._average.n_averaged)  # on the CPU: a GPU is not waited for
            now = min(decay, (1 + steps) / (10 + steps))
            get_ema_multi_avg_fn(now)(averaged, current, count)

        self._source = model
        self._average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.model: nn.Module = self._average.module

    def before_train(self) -> None:
        if self._average.n_averaged > 0:
            return
        if self.trainer.start_iter > 0:
            logger.warning(
                "The checkpoint has no average of the weights (SOLVER.EMA): the average begins "
                "after iteration %d.",
                self.trainer.start_iter,
            )
        # There may be an evaluation before the first step.
        self.model.load_state_dict(self._source.state_dict())

    def after_step(self) -> None:
        self._average.update_parameters(self._source)

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._average.load_state_dict(state_dict)


def name_of_average(metric: str) -> str:
    """Return the name that a metric of the weights, ``"bbox/AP"``, has for their average,
    ``"bbox_EMA/AP"``."""
    task, slash, name = metric.rpartition("/")
    return f"{task}{EMA_SUFFIX}{slash}{name}"
