# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A training or evaluation run, from its config to its report."""

import argparse
import logging
import os
import time
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer
from omegaconf import DictConfig
from torch import nn

from ..atomic import remove_leftovers
from ..backends import AUTO, TORCH, rank_backends, use_backend
from ..checkpoint import VoVNetCheckpointer
from ..errors import UserValueError
from ..made import note_made, note_run
from ..modeling.inference import optimize_for_inference
from .categories import find_difference
from .config import find_config
from .devices import check_device
from .fitting import keep_record
from .gpu_memory import explain_lack_of_memory
from .initial_weights import check_all_loaded, report_loaded
from .main_process import in_main_process
from .output_folder import choose_folder, discard_on_mistake, keep_earlier_run, keep_foreign_config
from .precision import backend_dtype
from .progress import ProgressBar
from .report import write_report
from .run_checks import check_schedule
from .run_log import start_log
from .task import Task
from .trainer import Trainer

logger = logging.getLogger(__name__)


class _Outcome(NamedTuple):
    """The results of a run, and what its report says besides.

    Attributes:
        results: the results of the last evaluation, as :meth:`Trainer.test` gives them.
        model: the model at the end.
        earlier_seconds: wall time of the training before it was resumed.
        length: iterations and epochs of a training; empty for an evaluation.
    """

    results: dict[str, Any]
    model: nn.Module
    earlier_seconds: float = 0.0
    length: str = ""


def run_task(task: Task) -> dict[str, Any]:
    """Train, or only evaluate, in this process, then write the report.

    Args:
        task: the kind of the run, with the arguments of the command line.

    Returns:
        the results of the last evaluation, as :meth:`Trainer.test` gives them.

    Raises:
        TrainingDivergedError: a loss is NaN or infinite.
        GpuMemoryError: a GPU has too little memory.
        FileNotFoundError, KeyError, ValueError: arguments, config, data or weights do not fit.
        FileNotWrittenError: a file cannot be written, for example because the disk is full.
        Interrupted: a signal ended the run.
    """
    start = time.perf_counter()
    cfg = task.load()
    checkpoint_folder = cfg.OUTPUT_DIR  # an evaluation may write its results to another folder
    with task.translating_errors(cfg), discard_on_mistake(cfg):
        cfg = _set_up(task, cfg)
        with explain_lack_of_memory(cfg, training=task.training):
            if task.training:
                outcome = _train(task, cfg)
            else:
                outcome = _evaluate(task, cfg, checkpoint_folder)
    if comm.is_main_process():
        write_report(
            cfg,
            outcome.model,
            outcome.results,
            args=task.args,
            seconds=time.perf_counter() - start,
            earlier_seconds=outcome.earlier_seconds,
            length=outcome.length,
        )
        verify_results(cfg, outcome.results)
    return outcome.results


def _set_up(task: Task, cfg: CfgNode) -> CfgNode:
    """Return the config of a run, checked and frozen, and set up its folder, log and seeds."""
    checkpoint = _open_output_dir(cfg, task.args)
    resuming = task.args.resume and bool(checkpoint)
    cfg = Trainer.auto_scale_workers(cfg, comm.get_world_size())
    check_device(cfg)
    task.check(cfg, resuming=resuming)
    if task.training:
        task.fit(cfg, resuming=resuming)
        check_schedule(cfg)
    cfg.freeze()
    _set_up_with_detectron2(task.saved_config(cfg), cfg, task.args)
    return cfg


def _open_output_dir(cfg: CfgNode, args: argparse.Namespace) -> str:
    """Start the log in ``OUTPUT_DIR``, remove what a killed run left half-written, and return the
    last checkpoint in the folder; empty if there is none.

    If an evaluation would overwrite the report of a run, ``OUTPUT_DIR`` is changed to another
    folder. For the errors see :func:`choose_folder`.
    """
    folder = cfg.OUTPUT_DIR
    cfg.OUTPUT_DIR = choose_folder(folder, training=not args.eval_only, resume=args.resume)
    start_log(cfg.OUTPUT_DIR, progress=args.progress)
    if folder != cfg.OUTPUT_DIR:
        logger.info(
            "%s has a report already: this evaluation writes to %s.", folder, cfg.OUTPUT_DIR
        )
    if comm.is_main_process():
        note_run(cfg.OUTPUT_DIR)
        if leftovers := remove_leftovers(cfg.OUTPUT_DIR):
            logger.info("Removed what a killed run left half-written: %s.", ", ".join(leftovers))
    checkpoint = _last_checkpoint(folder)
    if args.resume and not checkpoint:
        logger.warning(
            "There is no checkpoint to resume from in %s, so --resume has no effect.",
            os.path.abspath(folder),
        )
    return checkpoint


def _set_up_with_detectron2(
    saved: CfgNode | DictConfig, cfg: CfgNode, args: argparse.Namespace
) -> None:
    """Call Detectron2's ``default_setup``, which writes ``saved`` to ``OUTPUT_DIR/config.yaml``.
    Before a new training, move the files of an earlier training in this folder aside."""
    folder = cfg.OUTPUT_DIR
    path = find_config(args.config_file) if args.config_file else ""
    if comm.is_main_process():
        anew = not args.eval_only and not (args.resume and _last_checkpoint(folder))
        if anew:
            # The weights may be a file of the earlier training.
            keep_earlier_run(folder, [path, cfg.MODEL.WEIGHTS.partition("?")[0]])
        keep_record(folder, getattr(args, "fitted", None), anew=anew)
        keep_foreign_config(folder)
    comm.synchronize()  # the others read and write there
    default_setup(saved, _Arguments(**{**vars(args), "config_file": path}))
    if comm.is_main_process():
        note_made(os.path.join(folder, "config.yaml"))


class _Arguments(argparse.Namespace):
    """The arguments of a command line, which Detectron2 logs by their ``repr``."""

    def __repr__(self) -> str:
        return getattr(self, "command", "") or super().__repr__()


def _last_checkpoint(folder: str) -> str:
    return Checkpointer(nn.Identity(), folder).get_checkpoint_file()


def _train(task: Task, cfg: CfgNode) -> _Outcome:
    args = task.args
    trainer = task.trainer(cfg, allow_partial=args.allow_partial, allow_pickle=args.allow_pickle)
    trainer.resume_or_load(resume=args.resume)
    if args.progress and comm.is_main_process():
        trainer.register_hooks([ProgressBar()])
    results = trainer.train()
    # The model without DistributedDataParallel around it.
    model, length = trainer.checkpointer.model, trainer.describe_length()
    return _Outcome(results, model, trainer.earlier_seconds, length)


def _evaluate(task: Task, cfg: CfgNode, checkpoint_folder: str) -> _Outcome:
    """Evaluate the weights that the config names, or the last weights in a folder."""
    args = task.args
    model = task.trainer.build_model(cfg)
    checkpointer = VoVNetCheckpointer(
        model,
        checkpoint_folder,
        allow_partial=args.allow_partial,
        allow_pickle=args.allow_pickle,
    )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    report_loaded(checkpointer, cfg, resume=args.resume)
    if not args.allow_partial:
        check_all_loaded(checkpointer, cfg.MODEL.WEIGHTS)
    _require_same_categories(checkpointer, cfg, allow_others=args.allow_partial)
    return _Outcome(task.trainer.test_all(cfg, _speed_up(model, cfg)), model)


def _speed_up(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Return the model in the backend of ``TEST.BACKEND``, or as ``TEST.OPTIMIZE`` asks for."""
    if cfg.TEST.BACKEND != TORCH:
        names = _rank_together(model, cfg) if cfg.TEST.BACKEND == AUTO else cfg.TEST.BACKEND
        evaluated = use_backend(model, names, int8=cfg.TEST.INT8, dtype=backend_dtype(cfg))
        logger.info("Evaluating with the backend %s.", cfg.TEST.BACKEND)
        return evaluated
    if cfg.TEST.OPTIMIZE:
        logger.info("Evaluating what vovnet_d2.optimize_for_inference makes of the model.")
        return optimize_for_inference(model)
    return model


def _rank_together(model: nn.Module, cfg: CfgNode) -> list[str]:
    """Return the backends that the first process finds, the fastest first.

    Only one process measures. Several processes would disturb each other, and could choose
    different backends.
    """
    return in_main_process(
        lambda: rank_backends(model, int8=cfg.TEST.INT8, dtype=backend_dtype(cfg))
    )


def _require_same_categories(
    checkpointer: VoVNetCheckpointer, cfg: CfgNode, *, allow_others: bool
) -> None:
    if not (difference := find_difference(cfg, cfg.DATASETS.TEST, checkpointer)):
        return
    if not allow_others:
        raise UserValueError(
            f"{difference} Evaluate with the config.yaml of the training that they are from. If "
            "the names mean the same, add --allow-partial."
        )
    logger.warning(difference)
