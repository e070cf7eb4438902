# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The schedule of a training follows from the number of its images and the size of its batch."""

import logging
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from tabulate import tabulate

from ..words import counted
from .config import get_value, set_value

logger = logging.getLogger(__name__)

SCHEDULE_KEYS = (
    *("SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS"),
    *("SOLVER.BASE_LR", "SOLVER.BASE_LR_END", "TEST.EVAL_PERIOD", "SOLVER.CHECKPOINT_PERIOD"),
)

# The number of images with objects in COCO's train2017, and the epochs of its 1x schedule.
_COCO_IMAGES, _COCO_EPOCHS = 117_266, 12
_MOST_EPOCHS = 100
# A training from random weights takes three times as many epochs (arXiv 1811.08883, section 4).
_FROM_SCRATCH = 3
_LEAST_ITERATIONS = 1000
_WARMUP_SHARE = 4  # a warm-up takes at most a quarter of the iterations
_NUM_EVALUATIONS, _NUM_CHECKPOINTS = 20, 10
_AS_WRITTEN = "the config's"


class Row(NamedTuple):
    """Says which value a key of the config has in a run, and why.

    Attributes:
        key: a key of the config.
        before: the value of the key in the config.
        value: the value of the key in this run.
        reason: the reason for the value.
    """

    key: str
    before: Any
    value: Any
    reason: str


class _Table:
    """Sets keys of a config, and keeps a table of the values and the reasons.

    Attributes:
        cfg: the config of the run.
        base: the config whose schedule is used.
        given: keys whose values in ``cfg`` are kept, with the option or file that sets each.
        rows: a row for each value that was set or kept.
    """

    def __init__(self, cfg: CfgNode, base: CfgNode, given: Mapping[str, str]):
        self.cfg = cfg
        self.base = base
        self.given = given
        self.rows: list[Row] = []

    def put(self, key: str, value: Any, reason: str) -> None:
        if key in self.given:
            value, reason = get_value(self.cfg, key), self.given[key]
        set_value(self.cfg, key, value)
        self.rows.append(Row(key, get_value(self.base, key), value, reason))


def fit_schedule(
    cfg: CfgNode,
    base: CfgNode,
    given: Mapping[str, str],
    *,
    num_images: int,
    epochs: Fraction | None = None,
    pretrained: bool = True,
) -> list[Row]:
    """Set iterations, steps, warm-up, learning rate and periods of a config.

    Args:
        cfg: the config of the run with the batch of all processes. It is changed in place.
        base: the config whose schedule is used. The schedule is for the batch in ``base``.
        given: keys whose values in ``cfg`` are kept, with the origin of each, such as "set in
            FILE".
        num_images: the number of training images.
        epochs: the length of the training; by default it follows from ``num_images``.
        pretrained: True if the training starts from weights.

    Returns:
        a row for each key of the schedule, including the keys that are kept.
    """
    table = _Table(cfg, base, given)
    batch = cfg.SOLVER.IMS_PER_BATCH
    same = batch == base.SOLVER.IMS_PER_BATCH
    table.put("SOLVER.IMS_PER_BATCH", batch, _AS_WRITTEN if same else "of all processes")
    table.put("SOLVER.MAX_ITER", *_find_iterations(num_images, batch, epochs, pretrained))
    if "SOLVER.MAX_ITER" in given:
        _tell_epochs(table, num_images)
    _put_steps(table)
    _put_rate(table)
    _put_periods(table, num_images)
    return table.rows


def _tell_epochs(table: _Table, num_images: int) -> None:
    """Add the number of epochs to the row of ``SOLVER.MAX_ITER``, which the user has set."""
    row, solver = table.rows[-1], table.cfg.SOLVER
    seen = Fraction(solver.MAX_ITER * solver.IMS_PER_BATCH, num_images)
    table.rows[-1] = row._replace(reason=f"{row.reason}: {_epochs(seen)}")
    if not 1 <= seen <= _MOST_EPOCHS * _FROM_SCRATCH:
        logger.warning(
            "The number of iterations, %d (%s), makes %.3g epochs of %s. Leave it out, so "
            "that it follows from the data, or give --epochs.",
            *(row.value, row.reason, float(seen), counted(num_images, "images")),
        )


def _put_steps(table: _Table) -> None:
    solver, base = table.cfg.SOLVER, table.base.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and (base.STEPS or solver.STEPS):
        shares = [Fraction(step, base.MAX_ITER) for step in base.STEPS]
        told = ", ".join(f"{float(share):.0%}" for share in shares)
        table.put(
            "SOLVER.STEPS",
            # In a very short training, some steps coincide with each other or with its end.
            tuple(sorted({round(share * solver.MAX_ITER) for share in shares} - {solver.MAX_ITER})),
            f"after {told} of the iterations, as in the config",
        )
    warmup, most = base.WARMUP_ITERS, solver.MAX_ITER // _WARMUP_SHARE
    shorter = f"a quarter of the iterations, below {warmup}"
    table.put("SOLVER.WARMUP_ITERS", min(warmup, most), _AS_WRITTEN if warmup <= most else shorter)


def _put_rate(table: _Table) -> None:
    solver, base = table.cfg.SOLVER, table.base.SOLVER
    batch, reference = solver.IMS_PER_BATCH, base.IMS_PER_BATCH
    rule = f"in proportion to the batch: {base.BASE_LR:g} was for {reference} images"
    rate = base.BASE_LR * batch / reference
    table.put("SOLVER.BASE_LR", rate, _AS_WRITTEN if batch == reference else rule)
    if base.BASE_LR_END:
        end = base.BASE_LR_END * solver.BASE_LR / base.BASE_LR
        table.put("SOLVER.BASE_LR_END", end, "in proportion to SOLVER.BASE_LR")


def _put_periods(table: _Table, num_images: int) -> None:
    """Set the periods of evaluations and checkpoints. They are rounded up, because the end of a
    training is evaluated and saved anyway.
    """
    solver = table.cfg.SOLVER
    iterations, batch = solver.MAX_ITER, solver.IMS_PER_BATCH
    number = max(1, min(_NUM_EVALUATIONS, iterations * batch // num_images))
    period = math.ceil(iterations / number) if table.cfg.DATASETS.TEST else 0
    each = _epochs(Fraction(period * batch, num_images))
    often = f"{number} times, every {each}" if number > 1 else "at the end"
    told = often if period else "nothing to evaluate on"
    table.put("TEST.EVAL_PERIOD", period, told)
    written, tenth = table.base.SOLVER.CHECKPOINT_PERIOD, math.ceil(iterations / _NUM_CHECKPOINTS)
    told = _AS_WRITTEN if written <= tenth else "a tenth of the iterations"
    table.put("SOLVER.CHECKPOINT_PERIOD", min(written, tenth), told)


def _find_iterations(
    num_images: int, batch: int, epochs: Fraction | None, pretrained: bool
) -> tuple[int, str]:
    """Return the number of iterations and its reason. The last batch may be filled up with images
    of the next epoch."""
    if epochs is not None:
        return math.ceil(epochs * num_images / batch), f"{_epochs(epochs)} (--epochs)"
    factor = 1 if pretrained else _FROM_SCRATCH
    wanted = _COCO_EPOCHS * math.sqrt(_COCO_IMAGES / num_images)
    number = factor * round(min(max(wanted, _COCO_EPOCHS), _MOST_EPOCHS))
    iterations = math.ceil(number * num_images / batch)
    if iterations < _LEAST_ITERATIONS:
        told = _epochs(Fraction(_LEAST_ITERATIONS * batch, num_images))
        return _LEAST_ITERATIONS, f"{told}: the least number of iterations that new layers need"
    rule = f"COCO's {_COCO_EPOCHS} × √({_COCO_IMAGES} / {num_images} images)"
    bounds = f", at most {_MOST_EPOCHS}" if wanted > _MOST_EPOCHS else ""
    scratch = "" if pretrained else f"; × {_FROM_SCRATCH} from random weights"
    return iterations, f"{_epochs(Fraction(number))}: {rule}{bounds}{scratch}"


def _epochs(number: Fraction) -> str:
    return "1 epoch" if number == 1 else f"{float(number):,.4g} epochs"


def format_rows(rows: Sequence[Row]) -> str:
    """Return a table that fits a terminal."""
    cells = [(row.key, _text(row.before), _text(row.value), row.reason) for row in rows]
    return tabulate(
        cells,
        headers=["key", "package's value", "this run", "why"],
        tablefmt="simple",
        disable_numparse=True,
        maxcolwidths=[None, 30, 30, 60],
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        equal = len(value) > 1 and all(each == value[0] for each in value)
        shown = value[:1] if equal and isinstance(value[0], list) else value
        return f"[{', '.join(map(_text, shown))}]"
    return str(value)
