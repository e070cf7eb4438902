# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Hooks of a training that can be interrupted at any time and resumed exactly."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, get_event_storage
from torch import nn

from ..checkpoint import VoVNetCheckpointer
from ..checkpoint.reading import read_checkpoint
from ..data.copy_paste import CopyPaste
from ..data.stream import TrainingStream
from ..data.unreadable import ReadableOnly
from ..drawing.curves import read_metrics
from .compilation import run_eagerly
from .interruption import Interrupted

logger = logging.getLogger(__name__)


class Checkpointing(HookBase):
    """Save a checkpoint every ``period`` iterations, after the last one, and when a signal asks the
    training to end.

    After a signal, this hook also ends the training. All processes have the hook; the first process
    saves.
    """

    def __init__(
        self,
        checkpointer: VoVNetCheckpointer,
        period: int,
        averaged: WeightsCheckpointer | None = None,
    ):
        """Save by a checkpointer. ``averaged`` also saves the average of the weights after the last
        iteration."""
        self._checkpointer = checkpointer
        self._period = period
        self._averaged = averaged

    def before_train(self) -> None:
        self._done = self._saved = self.trainer.start_iter  # iterations

    def after_step(self) -> None:
        self._done = self.trainer.iter + 1
        if self._period > 0 and self._done % self._period == 0:
            self.save()
        if self._done >= self.trainer.max_iter:
            self.save_final()
        elif signal := self.trainer.stop_signal:
            self.end(signal)

    def save_final(self) -> None:
        """Save the final state of the training: the one after the current iteration."""
        self.trainer.gather_rank_states()
        if self._averaged:
            self._averaged.save("model_final_ema", iteration=self.trainer.iter)
        self._checkpointer.save("model_final", iteration=self.trainer.iter)
        self._saved = self.trainer.iter + 1

    def save(self) -> None:
        self.trainer.gather_rank_states()
        self._save()

    def end(self, signal: str) -> NoReturn:
        """Save, unless this iteration is saved, and end the training in all processes."""
        if self._saved < self._done:
            self.save()
        comm.synchronize()  # a launcher ends all processes when the first one ends
        raise self._interrupted(signal)

    def end_evaluation(self, signal: str) -> NoReturn:
        """Save and end as :meth:`end` does, but without waiting for the other processes.

        An evaluation uses this method, because its processes do not know how far the others are.
        """
        if self._saved < self._done:
            self._save()  # the state that was gathered before the evaluation is still right
        raise self._interrupted(signal)

    def _save(self) -> None:
        self._checkpointer.save(f"model_{self._done - 1:07d}", iteration=self._done - 1)
        self._saved = self._done

    def _interrupted(self, signal: str) -> Interrupted:
        message = (
            f"interrupted by {signal} after {self._done} of {self.trainer.max_iter} iterations. "
            "To go on, add --resume to the same command. The last checkpoint is "
            f"{self._checkpointer.get_checkpoint_file() or 'not there yet'}."
        )
        logger.warning(message)
        return Interrupted(signal, message)


class EvalHook(hooks.EvalHook):
    """Detectron2's hook, with two differences. If an interruption prevented an evaluation, the
    resumed training begins with this evaluation. A training that stops early is not evaluated
    twice."""

    def __init__(self, period: int, evaluate: Callable[[], Any], metric: str | None, folder: str):
        """Evaluate as Detectron2's hook does. The evaluation of an iteration is missing if
        ``folder/metrics.json`` lacks the result ``metric``. With None, no evaluation counts as
        missing."""
        super().__init__(period, evaluate)
        self._metric = metric
        self._folder = folder
        self._evaluated: int | None = None  # the iteration of the latest evaluation

    def _do_eval(self) -> None:
        super()._do_eval()
        self._evaluated = self.trainer.storage.iter

    def after_train(self) -> None:
        if self._evaluated == self.trainer.iter:
            del self._func  # as Detectron2's does, against a circular reference
        else:
            super().after_train()

    def before_train(self) -> None:
        done, total = self.trainer.start_iter, self.trainer.max_iter
        if self._period < 1 or done % self._period or not 0 < done < total:
            return
        if comm.all_gather(self._is_recorded(done - 1))[0]:
            return
        logger.info("The evaluation after iteration %d is missing and is run now.", done - 1)
        self.trainer.storage.iter = done - 1
        self._do_eval()
        self.trainer.storage.iter = done

    def _is_recorded(self, iteration: int) -> bool:
        path = os.path.join(self._folder, "metrics.json")
        if self._metric is None or not os.path.isfile(path):
            return self._metric is None
        return any(at == iteration for at, _ in read_metrics(path).get(self._metric, []))


class PreciseBN(hooks.PreciseBN):
    """Detectron2's hook, but with the same batches each time."""

    def update_stats(self) -> None:
        if isinstance(self._data_loader, TrainingStream):
            self._data_loader.place = replace(self._data_loader.place, seed=self.trainer.seed)
        self._data_iter = None
        with run_eagerly(self.trainer.cfg):
            super().update_stats()


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, with two differences. A resumed training reads the best metric from the
    file of the best weights. This file holds weights alone, because ``--resume`` needs the newest
    checkpoint."""

    def __init__(
        self,
        eval_period: int,
        model: nn.Module,
        save_dir: str,
        val_metric: str,
        *,
        file_prefix: str = "model_best",
        categories: Mapping[str, Sequence[str]] | None = None,
    ):
        """
        Args:
            eval_period: the period of ``EvalHook``, at least 1.
            val_metric: the result to compare, such as ``"bbox/AP"``; higher is better.
            file_prefix: the name of the file, without ``.pth``.
            categories: see :class:`VoVNetCheckpointer`.
        """
        checkpointer = WeightsCheckpointer(model, save_dir, categories=categories)
        super().__init__(eval_period, checkpointer, val_metric, file_prefix=file_prefix)
        self._path = os.path.join(save_dir, f"{self._file_prefix}.pth")
        self._checked: int | None = None  # the iteration of the latest evaluation

    def before_train(self) -> None:
        self._check_what_is_new()  # EvalHook may just have run a missing evaluation

    def after_train(self) -> None:
        if self._checked != self.trainer.iter:  # they are equal if the training stopped early
            super().after_train()
        # Another process may have ended in this evaluation. The writers, which come next, record
        # the results, so a resumed training does not repeat the evaluation.
        self._check_what_is_new()

    def _check_what_is_new(self) -> None:
        _, iteration = self.trainer.storage.latest().get(self._val_metric, (None, self._checked))
        if iteration != self._checked:
            self._best_checking()

    def _read_best(self) -> None:
        """Read the best metric from the file, if the training has been resumed."""
        if self.trainer.start_iter == 0 or not os.path.isfile(self._path):
            return
        try:
            saved = read_checkpoint(self._path)
        except ValueError as error:
            logger.warning("%s The search for the best checkpoint begins anew.", error)
            return
        if saved.get("metric") == self._val_metric:
            self.best_metric, self.best_iter = saved["value"], saved["iteration"]

    def _best_checking(self) -> None:
        if self._checked is None:
            self._read_best()
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, None))
        if iteration == self._checked or not math.isfinite(value):
            self._checked = iteration
            logger.warning("No %s in this evaluation: the best checkpoint stays.", self._val_metric)
            return
        if self.best_metric is not None and not self._compare(value, self.best_metric):
            self._checked = iteration
            logger.info(
                "%s is %.3f; the best stays %.3f after iteration %d.",
                self._val_metric,
                value,
                self.best_metric,
                self.best_iter,
            )
            return
        logger.info("%s is %.3f, the best so far.", self._val_metric, value)
        self._checkpointer.save(
            self._file_prefix, metric=self._val_metric, value=value, iteration=iteration
        )
        self.best_metric, self.best_iter, self._checked = value, iteration, iteration


class EndOfTraining(BaseException):
    """Raised to end the loop over the iterations early. It is no error."""


class EarlyStopping(HookBase):
    """End a training whose metric has not risen in ``patience`` evaluations.

    All processes have this hook as their last hook. A checkpoint has the evaluations before its
    iteration, so the hook decides the same if the training was interrupted.
    """

    def __init__(
        self,
        checkpointing: Checkpointing,
        period: int,
        metric: str,
        patience: int,
        folder: str,
        *,
        best: str = "model_best",
    ):
        """
        Args:
            checkpointing: the hook that saves the state in which the training ends.
            period: iterations from one evaluation to the next, at least 1.
            metric: the result to compare, such as ``"bbox/AP"``; higher is better.
            patience: a number of evaluations, at least 1.
            folder: ``OUTPUT_DIR``.
            best: the name of the file with the weights of the best evaluation, without ``.pth``.
        """
        self._checkpointing = checkpointing
        self._period = period
        self._metric = metric
        self._patience = patience
        self._folder = folder
        self._best = best
        # The metric by iteration, in the order of the evaluations, on the first process. After a
        # resumption with larger batches the iterations have lower numbers.
        self._values: dict[int, float] = {}

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if start == 0 or start >= self.trainer.max_iter:
            return
        path = os.path.join(self._folder, "metrics.json")
        if comm.is_main_process() and os.path.isfile(path):
            # The evaluation at the checkpoint, which EvalHook runs only if it is missing.
            recorded = read_metrics(path).get(self._metric, [])
            self._values |= {at: value for at, value in recorded if at == start - 1}
        self.trainer.iter = start - 1  # the training may have ended after this iteration
        self._end_if_vain()
        self.trainer.iter = start

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._period == 0:
            self._end_if_vain()

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self._metric, "values": dict(self._values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["metric"] == self._metric:  # not if other data are evaluated now
            self._values = dict(state_dict["values"])

    def _end_if_vain(self) -> None:
        """End the training in all processes, by EndOfTraining, if the metric has not risen for long
        enough."""
        message = ""
        if comm.is_main_process():
            value, at = self.trainer.storage.latest().get(self._metric, (math.nan, -1))
            if at == self.trainer.iter:
                self._values.pop(at, None)
                self._values[at] = value
            message = self._find_reason()
        if not (message := comm.all_gather(message)[0]):
            return
        logger.info("%s", message)
        self._checkpointing.save_final()
        self.trainer.max_iter = self.trainer.iter + 1
        raise EndOfTraining

    def _find_reason(self) -> str:
        """Return why the training ends, or an empty string if it goes on. If an evaluation lacks
        the metric, for example without predictions, the metric counts as not risen."""
        known = {at: value for at, value in self._values.items() if math.isfinite(value)}
        if not known:
            return ""
        best = max(known, key=known.__getitem__)  # the first if several are equal
        waited = len(self._values) - 1 - list(self._values).index(best)
        if waited < self._patience:
            return ""
        last = self._best.replace("best", "final")
        kept = os.path.isfile(os.path.join(self._folder, f"{self._best}.pth"))
        return (
            f"The training ends early, after {self.trainer.iter + 1} of {self.trainer.max_iter} "
            f"iterations: in {waited} evaluations {self._metric} has not risen above its value of "
            f"{known[best]:.3f} after iteration {best} (TEST.PATIENCE {self._patience})."
            + (f" {self._best}.pth has those weights, {last}.pth the last." if kept else "")
        )


class UnreadableCount(HookBase):
    """Log the number of training images that the workers of this process left out, if there are
    any.
    """

    def after_step(self) -> None:
        loader = self.trainer._trainer.data_loader
        mapper = loader.mapper if isinstance(loader, TrainingStream) else None
        if isinstance(mapper, CopyPaste):
            mapper = mapper.mapper
        if isinstance(mapper, ReadableOnly) and mapper.count:
            self.trainer.storage.put_scalar("unreadable_images", mapper.count, smoothing_hint=False)


class EpochCount(HookBase):
    """Log the epoch: the number of images seen, divided by the number of images."""

    def after_step(self) -> None:
        epochs = self.trainer.count_epochs(self.trainer.iter + 1)
        if epochs is not None:
            self.trainer.storage.put_scalar("epoch", epochs, smoothing_hint=False)


class EpochPrinter(CommonMetricPrinter):
    """Prints Detectron2's line of metrics, with the epoch at its start."""

    def __init__(self, max_iter: int):
        super().__init__(max_iter)
        self.logger: Any = _WithEpoch(logging.getLogger("detectron2.utils.events"), {})


class _WithEpoch(logging.LoggerAdapter):
    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        epoch, _ = get_event_storage().latest().get("epoch", (None, 0))
        return (msg if epoch is None else f" epoch: {epoch:.2f} {msg}"), kwargs


class WeightsCheckpointer(VoVNetCheckpointer):
    """A checkpointer for files of weights from which no training is resumed."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Do nothing, so that ``--resume`` follows the checkpoints that can be resumed."""
