# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A training or evaluation run, from its command line to its report."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.common.checkpoint import Checkpointer
from torch import nn
from torch.multiprocessing import ProcessExitedException

from ..checkpoint import VoVNetCheckpointer
from ..data import register_digits
from .checks import check_config, check_data, check_initialisation
from .config import argument_parser, find_config, load_config
from .evaluation import check_evaluators
from .report import write_report
from .scaling import scale_to_batch, warn_of_unscaled_batch
from .trainer import Trainer, report_loaded

__all__ = ["main", "run"]

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of ``tools/train_net.py``, in as many processes as it asks for.

    Raises:
        SystemExit: with status 2 after a mistake of the user, which is told in a sentence; with 1
            if the training diverged. Anything else that goes wrong keeps its traceback.
    """
    args = argument_parser().parse_args(argv)
    args.command = shlex.join(["python", *(sys.argv if argv is None else ["train_net.py", *argv])])
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > gpus:
        _exit(f"--num-gpus is {args.num_gpus}, but torch finds {gpus}.", 2)
    try:
        launch(
            _run_or_exit,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:  # a process of several, which has said why
        sys.exit(error.exit_code)


def _run_or_exit(args: argparse.Namespace) -> None:
    try:
        run(args)
    except FloatingPointError as error:
        _exit(str(error), 1)
    except (FileNotFoundError, KeyError, ValueError) as error:
        if not _raised_by_this_package(error):
            raise
        _exit(str(error.args[0]), 2)


def _exit(message: str, status: int) -> None:
    if comm.is_main_process():
        print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _raised_by_this_package(error: Exception) -> bool:
    """Whether an error is one of our own sentences, rather than a surprise from further below."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    return module.partition(".")[0] == __package__.partition(".")[0]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What each process does: train or only evaluate, then write the report.

    Args:
        args: of :func:`argument_parser`.

    Returns:
        the results of the last evaluation, as :meth:`Trainer.test` gives them.

    Raises:
        FloatingPointError: the training diverged.
        FileNotFoundError, KeyError, ValueError: arguments, config, data or weights do not fit.
    """
    start = time.perf_counter()
    register_digits()
    cfg = _set_up(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = VoVNetCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            allow_partial=args.allow_partial,
            allow_pickle=args.allow_pickle,
        )
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        report_loaded(checkpointer, cfg, resume=args.resume)
        results = Trainer.test_all(cfg, model)
    else:
        trainer = Trainer(cfg, allow_partial=args.allow_partial, allow_pickle=args.allow_pickle)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
        model = trainer.checkpointer.model  # without DistributedDataParallel around it
    if comm.is_main_process():
        seconds = time.perf_counter() - start
        write_report(cfg, model, results, args=args, seconds=seconds)
        verify_results(cfg, results)
    return results


def _set_up(args: argparse.Namespace) -> CfgNode:
    """The config of this run, checked and frozen; logging and seeds."""
    path = find_config(args.config_file) if args.config_file else ""
    written = load_config(path, allow_unsafe_yaml=args.allow_unsafe_yaml)
    cfg = load_config(path, args.opts, allow_unsafe_yaml=args.allow_unsafe_yaml)
    _start_logging(cfg.OUTPUT_DIR)
    if args.auto_scale_lr:
        cfg = scale_to_batch(written, args.opts)
    elif not args.eval_only:
        warn_of_unscaled_batch(written, cfg)
    _choose_device(cfg)

    training = not args.eval_only
    last = _find_last_checkpoint(cfg.OUTPUT_DIR)
    if training and last and not args.resume:
        logger.warning(
            "%s holds a run, up to %s: this one starts anew and overwrites its files. To go on "
            "with it instead, add --resume; to keep it, set another OUTPUT_DIR.",
            cfg.OUTPUT_DIR,
            os.path.basename(last),
        )
    check_config(cfg, training=training)
    check_initialisation(cfg, training=training, resuming=args.resume and bool(last))
    check_evaluators(cfg)
    check_data(cfg, training=training)
    cfg.freeze()
    default_setup(cfg, argparse.Namespace(**{**vars(args), "config_file": path}))
    return cfg


def _choose_device(cfg: CfgNode) -> None:
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is no device of torch: use cuda or cpu."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        logger.warning("torch finds no GPU: MODEL.DEVICE is set to cpu, which is slow.")
        cfg.MODEL.DEVICE = "cpu"


def _start_logging(output_dir: str) -> None:
    rank = comm.get_rank()
    setup_logger(output_dir, distributed_rank=rank)  # as default_setup does, and then no more
    setup_logger(output_dir, distributed_rank=rank, name="vovnet_d2")
    # Divergence is told in a sentence at the end, not by tracebacks on the way there.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_divergence)


def _is_no_divergence(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], FloatingPointError))


def _find_last_checkpoint(output_dir: str) -> str:
    return Checkpointer(nn.Identity(), output_dir).get_checkpoint_file()
