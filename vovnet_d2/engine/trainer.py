# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's DefaultTrainer on GPUs and CPUs, in full and mixed precision."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import VoVNetCheckpointer, check_input_convention
from .evaluation import build_evaluator, main_metric
from .hooks import BestCheckpointer
from .precision import autocast, autocast_dtype

__all__ = ["MixedPrecisionTrainer", "Trainer"]

logger = logging.getLogger(__name__)

Results = dict[str, Any]


class MixedPrecisionTrainer(SimpleTrainer):
    """A :class:`SimpleTrainer` whose forward pass runs under autocast, on any device.

    float16 losses are scaled, so that small gradients do not vanish; bfloat16 needs no scaling.
    Detectron2's AMPTrainer does this on GPUs only.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        super().__init__(model, data_loader, optimizer)
        self.device = device
        self.dtype = dtype
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        with torch.autocast(self.device.type, self.dtype):
            losses = self.model(data)
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class Trainer(DefaultTrainer):
    """Trains and evaluates what a config describes.

    Beyond :class:`DefaultTrainer` it evaluates every kind of data set that Detectron2 has an
    evaluator for, keeps the best weights where ``TEST.EVAL_PERIOD`` is set, and runs on CPUs in
    mixed precision and several processes too.
    """

    def __init__(self, cfg: CfgNode, *, allow_partial: bool = False, allow_pickle: bool = False):
        """
        Args:
            cfg: a config with this package's keys.
            allow_partial: see :class:`VoVNetCheckpointer`; as is ``allow_pickle``.
        """
        # Not DefaultTrainer's constructor: it settles the parts that differ here.
        TrainerBase.__init__(self)
        for name in ("detectron2", "vovnet_d2"):  # default_setup knows the first only
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        device = torch.device(cfg.MODEL.DEVICE)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=[comm.get_local_rank()] if device.type == "cuda" else None,
        )
        if cfg.SOLVER.AMP.ENABLED:
            self._trainer: SimpleTrainer = MixedPrecisionTrainer(
                model, data_loader, optimizer, device=device, dtype=autocast_dtype(cfg)
            )
        else:
            self._trainer = SimpleTrainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = VoVNetCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            allow_partial=allow_partial,
            allow_pickle=allow_pickle,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: Results = {}
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's, and before its writers the last evaluations and the best checkpoint."""
        found = super().build_hooks()
        writers = [hook for hook in found if isinstance(hook, hooks.PeriodicWriter)]
        others = [hook for hook in found if not isinstance(hook, hooks.PeriodicWriter)]
        if self.cfg.TEST.AUG.ENABLED:
            others.append(hooks.EvalHook(0, self._test_with_tta_and_keep))
        metric = main_metric(self.cfg)
        period = self.cfg.TEST.EVAL_PERIOD
        if comm.is_main_process() and metric and period > 0:
            others.append(BestCheckpointer(period, self.model, self.cfg.OUTPUT_DIR, metric))
        return others + writers

    def _test_with_tta_and_keep(self) -> Results:
        results = self.test_with_tta(self.cfg, self.model)
        self._last_eval_results = _merge(self._last_eval_results, results)
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in ``OUTPUT_DIR``, or start from ``MODEL.WEIGHTS``.

        Args:
            resume: do the former, if there is such a checkpoint.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file does not fit the network.
        """
        super().resume_or_load(resume=resume)
        report_loaded(self.checkpointer, self.cfg, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            logger.info(
                "%d of %d iterations are done%s.",
                self.start_iter,
                self.max_iter,
                "" if self.start_iter < self.max_iter else ": nothing is left to train",
            )

    def train(self) -> Results:
        """
        Returns:
            the results of the last evaluation, as :meth:`test` gives them.

        Raises:
            FloatingPointError: a loss is infinite or not a number; the message names likely causes.
        """
        TrainerBase.train(self, self.start_iter, self.max_iter)
        return self._last_eval_results

    def run_step(self) -> None:
        try:
            super().run_step()
        except FloatingPointError as error:
            raise FloatingPointError(self._explain_divergence(error)) from error

    def _explain_divergence(self, error: FloatingPointError) -> str:
        solver = self.cfg.SOLVER
        rate = self.optimizer.param_groups[0]["lr"]
        losses = {k: round(v, 4) for k, (v, _) in self.storage.latest().items() if "loss" in k}
        causes = [
            f"a learning rate too high for the batch (now {rate:.3g} for {solver.IMS_PER_BATCH} "
            "images; --auto-scale-lr fits the config's)",
            f"a warm-up too short (SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS})",
        ]
        if not solver.CLIP_GRADIENTS.ENABLED:
            causes.append("no gradient clipping (SOLVER.CLIP_GRADIENTS.ENABLED True)")
        if solver.AMP.ENABLED and autocast_dtype(self.cfg) == torch.float16:
            causes.append("the range of float16 (SOLVER.AMP.DTYPE bfloat16)")
        causes.append("FrozenBN without weights that belong to the network")
        return (
            f"Training diverged at iteration {self.iter}. {error}\n"
            f"Losses of the iteration before: {losses or 'there was none'}.\n"
            f"Likely causes: {'; '.join(causes)}.\n"
            f"Last checkpoint: {self.checkpointer.get_checkpoint_file() or 'none was saved'}."
        )

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """
        Returns:
            the config for the batch of ``num_workers`` processes, where
            ``SOLVER.REFERENCE_WORLD_SIZE`` says for how many it was written.

        Raises:
            ValueError: the batch of the config is not for so many.
        """
        batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference < 0 or (reference and batch % reference):
            raise ValueError(
                f"SOLVER.REFERENCE_WORLD_SIZE is {reference}: it must divide SOLVER.IMS_PER_BATCH, "
                f"which is {batch}, or be 0 for no scaling."
            )
        return DefaultTrainer.auto_scale_workers(cfg, num_workers)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> Results:
        """
        Returns:
            on the main process, ``{task: {metric: value}}``, or this for each data set by name
            where ``DATASETS.TEST`` has several.
        """
        with autocast(cfg, enabled=cfg.TEST.AMP.ENABLED):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> Results:
        """As :meth:`test`, with the augmentation of ``TEST.AUG``; tasks end with ``_TTA``."""
        logger.info("Evaluating with test-time augmentation ...")
        evaluators = [build_evaluator(cfg, name, suffix="_TTA") for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        if len(cfg.DATASETS.TEST) == 1:
            return _rename(results)
        return {name: _rename(tasks) for name, tasks in results.items()}

    @classmethod
    def test_all(cls, cfg: CfgNode, model: nn.Module) -> Results:
        """:meth:`test`, and :meth:`test_with_tta` where ``TEST.AUG`` asks for it."""
        results = cls.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results = _merge(results, cls.test_with_tta(cfg, model))
        return results


def _rename(tasks: Results) -> Results:
    return {f"{task}_TTA": metrics for task, metrics in tasks.items()}


def _merge(results: Results, more: Results) -> Results:
    """The tasks of both, with one data set or several."""
    common = {key: results[key] | more[key] for key in results.keys() & more.keys()}
    return {**results, **more, **common}


def report_loaded(checkpointer: VoVNetCheckpointer, cfg: CfgNode, *, resume: bool) -> None:
    """Say where the weights come from, and whether they fit the config's input."""
    if resume and checkpointer.has_checkpoint():
        logger.info("Resumed from %s.", checkpointer.get_checkpoint_file())
    elif resume:
        logger.warning(
            "Nothing to resume in %s: started from %s.",
            os.path.abspath(cfg.OUTPUT_DIR),
            cfg.MODEL.WEIGHTS or "random weights",
        )
    if warning := check_input_convention(cfg, checkpointer.input_convention):
        logger.warning(warning)
