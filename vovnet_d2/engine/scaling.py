# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The learning rate and the schedule are fitted to another batch than that of the config."""

import logging
import math
from fractions import Fraction

from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate

from ..errors import UserValueError
from .config import get_value

logger = logging.getLogger(__name__)

_SCALED = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.BASE_LR",
    "SOLVER.BASE_LR_END",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)


def scale_to_batch(written: CfgNode, options: list[str]) -> CfgNode:
    """Fit a config to the batch of its run, by the linear scaling rule (arXiv 1706.02677).

    The learning rates, first and last, grow with the batch; iterations, steps, warm-up and the
    periods of checkpoints and evaluation shrink with it, so that the number of images stays. If the
    options give ``SOLVER.MAX_ITER``, the other numbers of iterations keep their share of it
    instead.

    Args:
        written: the config as its file has it, for a batch of its ``SOLVER.IMS_PER_BATCH``.
        options: command-line options, ``[KEY, VALUE, ...]``. Scaling does not change these values.
            The options set the batch, or it follows from the number of processes if
            ``SOLVER.REFERENCE_WORLD_SIZE`` has the number for which the config was written.

    Returns:
        the config with the options merged.

    Raises:
        ValueError: the batch is not known, or below 1.
    """
    asked = written.clone()
    asked.merge_from_list(options)
    batch = asked.SOLVER.IMS_PER_BATCH
    reference = written.SOLVER.IMS_PER_BATCH
    processes = comm.get_world_size()
    if "SOLVER.IMS_PER_BATCH" not in options[::2]:
        if asked.SOLVER.REFERENCE_WORLD_SIZE < 1:
            raise UserValueError(
                "--auto-scale-lr does not know the batch: give SOLVER.IMS_PER_BATCH (the config's "
                f"is {reference}), or SOLVER.REFERENCE_WORLD_SIZE, the number of GPUs that the "
                "config was written for (8 in Detectron2's own)."
            )
        batch = max(1, round(reference * processes / asked.SOLVER.REFERENCE_WORLD_SIZE))
    if batch < 1:
        raise UserValueError(f"SOLVER.IMS_PER_BATCH must be at least 1, not {batch}.")
    max_iter = asked.SOLVER.MAX_ITER if "SOLVER.MAX_ITER" in options[::2] else None
    scaled = _scale(written, batch, max_iter)
    scaled.merge_from_list(options)
    scaled.SOLVER.IMS_PER_BATCH = batch
    scaled.SOLVER.REFERENCE_WORLD_SIZE = processes  # so that Detectron2 does not scale once more
    return scaled


def report_scaling(written: CfgNode, scaled: CfgNode) -> None:
    """Log the values that :func:`scale_to_batch` has changed."""
    batch, reference = scaled.SOLVER.IMS_PER_BATCH, written.SOLVER.IMS_PER_BATCH
    rows = [(key, get_value(written, key), get_value(scaled, key)) for key in _SCALED]
    table = tabulate(rows, headers=["key", "config file", "this run"], tablefmt="pipe")
    logger.info("--auto-scale-lr, for a batch of %d instead of %d:\n%s", batch, reference, table)


def _scale(cfg: CfgNode, batch: int, max_iter: int | None) -> CfgNode:
    """Scale the learning rates of a config by its batch, and all iterations by one factor.
    ``max_iter`` is the new ``SOLVER.MAX_ITER``; None for as many images as the config has."""
    scaled = cfg.clone()
    solver, reference = scaled.SOLVER, cfg.SOLVER.IMS_PER_BATCH
    solver.BASE_LR *= batch / reference
    solver.BASE_LR_END *= batch / reference
    if max_iter is None:
        factor = Fraction(reference, batch)
    else:
        factor = Fraction(max(1, max_iter), max(1, cfg.SOLVER.MAX_ITER))
    solver.MAX_ITER = max(1, round(cfg.SOLVER.MAX_ITER * factor))
    solver.STEPS = tuple(round(step * factor) for step in cfg.SOLVER.STEPS)
    solver.WARMUP_ITERS = round(cfg.SOLVER.WARMUP_ITERS * factor)
    # Periods are rounded up: 0 would switch off what a period paces, and one that is too short
    # would end just before the training does, whose end is evaluated and saved anyway.
    solver.CHECKPOINT_PERIOD = math.ceil(cfg.SOLVER.CHECKPOINT_PERIOD * factor)
    scaled.TEST.EVAL_PERIOD = math.ceil(cfg.TEST.EVAL_PERIOD * factor)
    return scaled


def warn_of_unscaled_batch(written: CfgNode, cfg: CfgNode) -> None:
    """Warn if the batch differs from that of the config file, and the learning rate does not."""
    reference, batch = written.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if batch != reference and cfg.SOLVER.BASE_LR == written.SOLVER.BASE_LR:
        logger.warning(
            "SOLVER.BASE_LR %g was written for a batch of %d and this run has %d: such training "
            "often diverges or lags. --auto-scale-lr would set it to %g and fit the schedule.",
            cfg.SOLVER.BASE_LR,
            reference,
            batch,
            cfg.SOLVER.BASE_LR * batch / reference,
        )
