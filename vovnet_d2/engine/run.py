# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A training or evaluation run, from its arguments to its report."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..atomic import remove_leftovers
from ..backends import AUTO, TORCH, rank_backends, use_backend
from ..checkpoint import VoVNetCheckpointer
from ..data.workers import is_silent_worker
from ..errors import UserError, UserValueError
from ..made import note_made, note_run
from ..modeling.inference import optimize_for_inference
from .categories import find_difference
from .config import find_config, load_config
from .devices import check_device
from .fitting import keep_record
from .gpu_memory import explain_lack_of_memory
from .initial_weights import check_all_loaded, report_loaded
from .interruption import is_lost_connection
from .main_process import in_main_process
from .output_folder import choose_folder, keep_earlier_run, keep_foreign_config
from .progress import ProgressBar, shorten_log
from .quiet import escape_unwritable, shorten_long_messages
from .report import write_report
from .run_checks import check_config, check_schedule
from .scaling import report_scaling, scale_to_batch, warn_of_unscaled_batch
from .trainer import Trainer

__all__ = [
    "Task",
    "open_output_dir",
    "report",
    "run_task",
    "set_up_with_detectron2",
    "train_or_evaluate",
]

logger = logging.getLogger(__name__)


class _Check(Protocol):
    def __call__(self, cfg: CfgNode, *, training: bool, resuming: bool) -> None: ...


class _Fit(Protocol):
    def __call__(self, cfg: CfgNode, *, resuming: bool) -> bool: ...


class Task(NamedTuple):
    """A kind of training: its trainer, its checks and its config keys.

    Attributes:
        trainer: the class of the trainer.
        check: raises an error if the config cannot be run; may complete it from the data.
        add_config: adds keys to the config that this task has beyond Detectron2's and ours.
        fit: fits the schedule of a training to the data, or leaves it and returns False.
    """

    trainer: type[Trainer]
    check: _Check
    add_config: Callable[[CfgNode], None] | None = None
    fit: _Fit | None = None


def run_task(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Train, or only evaluate, in this process, then write the report.

    Args:
        args: the arguments, from :func:`argument_parser`.

    Returns:
        the results of the last evaluation, as :meth:`Trainer.test` gives them.

    Raises:
        TrainingDivergedError: a loss is NaN or infinite.
        GpuMemoryError: a GPU has too little memory.
        FileNotFoundError, KeyError, ValueError: arguments, config, data or weights do not fit.
        FileNotWrittenError: the disk is full, say.
        Interrupted: a signal ended it.
    """
    start = time.perf_counter()
    cfg = _set_up(task, args)
    with explain_lack_of_memory(cfg, training=not args.eval_only):
        outcome = train_or_evaluate(task.trainer, cfg, args)
    report(cfg, outcome, args, start)
    if comm.is_main_process():
        verify_results(cfg, outcome.results)
    return outcome.results


class Outcome(NamedTuple):
    """
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


def report(cfg: CfgNode, outcome: Outcome, args: argparse.Namespace, start: float) -> None:
    """Write the report of a run that began at ``start`` of :func:`time.perf_counter`."""
    if comm.is_main_process():
        write_report(
            cfg,
            outcome.model,
            outcome.results,
            args=args,
            seconds=time.perf_counter() - start,
            earlier_seconds=outcome.earlier_seconds,
            length=outcome.length,
        )


def train_or_evaluate(
    trainer_class: type[Trainer], cfg: CfgNode, args: argparse.Namespace
) -> Outcome:
    """
    Args:
        args: with ``eval_only``, ``resume``, ``run_dir``, ``allow_partial`` and
            ``allow_pickle``.

    Raises:
        see :func:`run_task`.
    """
    options = {"allow_partial": args.allow_partial, "allow_pickle": args.allow_pickle}
    if not args.eval_only:
        trainer = trainer_class(cfg, **options)
        trainer.resume_or_load(resume=args.resume)
        if args.progress and comm.is_main_process():
            trainer.register_hooks([ProgressBar()])
        results = trainer.train()
        # The model without DistributedDataParallel around it.
        model, length = trainer.checkpointer.model, trainer.describe_length()
        return Outcome(results, model, trainer.earlier_seconds, length)
    model = trainer_class.build_model(cfg)
    checkpointer = VoVNetCheckpointer(model, args.run_dir, **options)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    report_loaded(checkpointer, cfg, resume=args.resume)
    if not args.allow_partial:
        check_all_loaded(checkpointer, cfg.MODEL.WEIGHTS)
    _require_same_categories(checkpointer, cfg, allow_others=args.allow_partial)
    evaluated = model
    if cfg.TEST.BACKEND != TORCH:
        names = _rank_together(model, cfg) if cfg.TEST.BACKEND == AUTO else cfg.TEST.BACKEND
        evaluated = use_backend(model, names, int8=cfg.TEST.INT8)
        logger.info("Evaluating with the backend %s.", cfg.TEST.BACKEND)
    elif cfg.TEST.OPTIMIZE:
        logger.info("Evaluating what vovnet_d2.optimize_for_inference makes of the model.")
        evaluated = optimize_for_inference(model)
    return Outcome(trainer_class.test_all(cfg, evaluated), model)


def _rank_together(model: nn.Module, cfg: CfgNode) -> list[str]:
    """Return the backends that the first process finds, the fastest first.

    Processes that measured at the same time would disturb each other, and could choose differently.
    """
    return in_main_process(lambda: rank_backends(model, int8=cfg.TEST.INT8))


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


def open_output_dir(cfg: CfgNode, args: argparse.Namespace) -> str:
    """Start the log in ``OUTPUT_DIR``, and tidy up after a killed run.

    ``args.run_dir`` becomes the folder whose checkpoints ``--resume`` takes: ``OUTPUT_DIR``, which
    is changed to another folder if an evaluation would overwrite the report of a run.

    Returns:
        the last checkpoint there; empty if there is none.

    Raises:
        ValueError: see :func:`choose_folder`.
    """
    args.run_dir = cfg.OUTPUT_DIR
    training = not args.eval_only
    cfg.OUTPUT_DIR = choose_folder(cfg.OUTPUT_DIR, training=training, resume=args.resume)
    _start_logging(cfg.OUTPUT_DIR, progress=args.progress)
    if args.run_dir != cfg.OUTPUT_DIR:
        logger.info("%s has a report already: this one is %s.", args.run_dir, cfg.OUTPUT_DIR)
    if comm.is_main_process():
        note_run(cfg.OUTPUT_DIR)
        if leftovers := remove_leftovers(cfg.OUTPUT_DIR):
            logger.info("Removed what a killed run left half-written: %s.", ", ".join(leftovers))
    return _last_checkpoint(args.run_dir)


def set_up_with_detectron2(
    config: Any, folder: str, args: argparse.Namespace, *, weights: str
) -> None:
    """Call Detectron2's ``default_setup``, which writes ``config.yaml`` to a folder. A training
    that starts anew there first moves an earlier one aside.

    Args:
        weights: ``MODEL.WEIGHTS``, which may be a file of the earlier one.
    """
    path = find_config(args.config_file) if args.config_file else ""
    if comm.is_main_process():
        anew = not args.eval_only and not (args.resume and _last_checkpoint(folder))
        if anew:
            keep_earlier_run(folder, [path, weights.partition("?")[0]])
        keep_record(folder, getattr(args, "fitted", None), anew=anew)
        keep_foreign_config(folder)
    comm.synchronize()  # the others read and write there
    default_setup(config, argparse.Namespace(**{**vars(args), "config_file": path}))
    if comm.is_main_process():
        note_made(os.path.join(folder, "config.yaml"))


def _last_checkpoint(folder: str) -> str:
    return Checkpointer(nn.Identity(), folder).get_checkpoint_file()


def _set_up(task: Task, args: argparse.Namespace) -> CfgNode:
    """Return the config of this run, checked and frozen, and set up logging and seeds."""
    path = find_config(args.config_file) if args.config_file else ""
    load_args = {"allow_unsafe_yaml": args.allow_unsafe_yaml, "add_config": task.add_config}
    written = load_config(path, **load_args)
    cfg = load_config(path, args.opts, **load_args)
    last = open_output_dir(cfg, args)
    if args.auto_scale_lr:
        folder = cfg.OUTPUT_DIR  # perhaps not the one that the options name
        cfg = scale_to_batch(written, args.opts)
        cfg.OUTPUT_DIR = folder
    cfg = Trainer.auto_scale_workers(cfg, comm.get_world_size())
    check_device(cfg)
    training, resuming = not args.eval_only, args.resume and bool(last)
    check_config(cfg, training=training)
    task.check(cfg, training=training, resuming=resuming)
    if training:
        if not (task.fit and task.fit(cfg, resuming=resuming)):
            (report_scaling if args.auto_scale_lr else warn_of_unscaled_batch)(written, cfg)
        check_schedule(cfg)
    cfg.freeze()
    set_up_with_detectron2(cfg, cfg.OUTPUT_DIR, args, weights=cfg.MODEL.WEIGHTS)
    return cfg


def _start_logging(output_dir: str, *, progress: bool) -> None:
    rank = comm.get_rank()
    # With the arguments that default_setup gives, so that it adds no handlers of its own.
    setup_logger(output_dir, distributed_rank=rank)
    for name in ("fvcore", "vovnet_d2"):
        ours = setup_logger(output_dir, distributed_rank=rank, name=name)
    # One stream for the file of all loggers.
    escape_unwritable(*(getattr(handler, "stream", None) for handler in ours.handlers))
    for name in ("detectron2", "fvcore", "vovnet_d2"):
        shorten_long_messages(name, os.path.join(output_dir, "log.txt"))
        if progress:
            shorten_log(name)
    # An error that ends in one sentence has no traceback before it.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_surprise)


def _is_surprise(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return True
    told = isinstance(error, UserError | torch.OutOfMemoryError)
    return not (told or is_lost_connection(error) or is_silent_worker(error))
