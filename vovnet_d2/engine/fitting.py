# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The values of a config that follow from the data of a training.

``OUTPUT_DIR/fitted.json`` keeps the values that a training was fitted to. So a resumed training has
the same schedule and anchors, even if the data have changed or ``--epochs`` is not repeated.
"""

import argparse
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.utils import comm

from ..atomic import write_text
from ..data.mapper import build_mapper
from ..errors import UserValueError
from ..made import is_made_here
from ..words import counted
from .anchors import Anchors, collect_boxes, fit_anchors, read_anchors
from .config import set_value
from .initial_weights import is_pretrained
from .quiet import errors_only
from .schedule import Row, fit_schedule, format_rows
from .written import COMMAND_LINE, Written

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Show = Callable[[Row], Row]

ANCHOR_KEYS = ("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS")
_FILE = "fitted.json"


class TrainingData(NamedTuple):
    """The data that a training is fitted to. Each function loads its part when it is needed.

    Attributes:
        load: returns the images that the training draws from.
        augment: returns the augmentations of these images.
        anchors: returns the anchors that the network has without the data.
    """

    load: Callable[[], list[Record]]
    augment: Callable[[], T.AugmentationList]
    anchors: Callable[[], Anchors]


def add_fitting_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--epochs`` and ``--fit-anchors``."""
    group = parser.add_argument_group(
        "a training fitted to the data",
        "For a custom data set, schedule, warm-up, learning rate and periods follow from\n"
        "the batch and the number of images. A table at the start gives the reasons.\n"
        "Values that you set on the command line or in your config file stay.",
    )
    group.add_argument(
        "--epochs",
        type=_parse_epochs,
        metavar="N",
        help="length of the training in epochs, which may be a fraction, instead of iterations. "
        "Steps, warm-up, learning rate and periods follow from it",
    )
    group.add_argument(
        "--fit-anchors",
        action="store_true",
        help="fit the sizes and ratios of the anchors to the boxes by k-means (scikit-learn). "
        "Evaluation and prediction then need OUTPUT_DIR/config.yaml, which has the anchors",
    )


def _parse_epochs(text: str) -> Fraction:
    with suppress(ValueError, ZeroDivisionError):
        if (number := Fraction(text)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, such as 12 or 0.5")


def refuse_to_fit(args: argparse.Namespace) -> None:
    """Raise ValueError if ``--epochs`` or ``--fit-anchors`` is given with ``--eval-only``."""
    if args.eval_only and args.epochs is not None:
        raise UserValueError("--epochs is for a training: leave it out with --eval-only.")
    if args.eval_only and args.fit_anchors:
        raise UserValueError(
            "--fit-anchors is for a training: with --eval-only give the config.yaml of that "
            "training, which has its anchors."
        )


def fit_to_data(
    cfg: CfgNode,
    args: argparse.Namespace,
    find_written: Callable[[], Written],
    data: TrainingData,
    *,
    resuming: bool,
    show: Show = lambda row: row,
) -> list[Row]:
    """Fit the config of a training to its data: the schedule if the data are a custom set or
    ``--epochs`` is given, the anchors if ``--fit-anchors`` is.

    Args:
        cfg: the config with the data sets and the batch of the run; it is changed in place.
        args: the arguments of :func:`add_fitting_arguments`. ``args.fitted`` is set to the record
            for :func:`keep_record`.
        find_written: returns what the user has set.
        data: the data that the config is fitted to.
        resuming: True if a training in ``OUTPUT_DIR`` is resumed.
        show: returns a row of the table with the name that the user's config has for its key.

    Returns:
        a row for each key that was fitted or that stays, with the reason.

    Raises:
        ImportError: scikit-learn is needed and not installed.
        ValueError: an argument contradicts an option or the training that is resumed.
    """
    earlier = comm.all_gather(_read(cfg.OUTPUT_DIR) if resuming else {})[0]
    if resuming:
        _refuse_other_anchors(args, earlier, data)
    is_custom = any(MetadataCatalog.get(name).get("own_data_set") for name in cfg.DATASETS.TRAIN)
    schedule = args.epochs is not None or "epochs" in earlier or is_custom
    if not schedule and not args.fit_anchors:
        return []
    written = find_written()
    _refuse_clashes(args, written.given, show)
    epochs = _find_epochs(args, earlier, written.given)
    # A number of epochs replaces the config's number of iterations.
    dropped = "" if epochs is None else "SOLVER.MAX_ITER"
    given = {key: where for key, where in written.given.items() if key != dropped}
    records = data.load()
    facts = {"images": len(records)} | {k: v for k, v in earlier.items() if k != "epochs"}
    if epochs is not None:
        facts["epochs"] = str(epochs)
    if facts["images"] != len(records):
        logger.warning(
            "The training data have %s, and had %d when this training began. The fitted "
            "values stay (%s). To fit them to the present data, start without --resume.",
            *(
                counted(len(records), "images"),
                facts["images"],
                os.path.join(cfg.OUTPUT_DIR, _FILE),
            ),
        )
    rows: list[Row] = []
    if schedule:
        rows += fit_schedule(
            cfg,
            written.base,
            given,
            num_images=facts["images"],
            epochs=epochs,
            pretrained=is_pretrained(cfg),
        )
    if args.fit_anchors:
        anchors = data.anchors()
        if "anchors" not in facts:
            facts["anchors"] = _fit_anchors(anchors, records, data)
        rows += _set_anchors(cfg, anchors, facts["anchors"])
    table = format_rows([show(row) for row in rows])
    logger.info("Values fitted to the %d training images:\n%s", facts["images"], table)
    args.fitted = facts
    return rows


def _find_epochs(
    args: argparse.Namespace, earlier: dict[str, Any], given: dict[str, str]
) -> Fraction | None:
    """Return ``--epochs``, by default the epochs of the training that is resumed. Return None if
    the command line has a number of iterations."""
    asked = given.get("SOLVER.MAX_ITER") == COMMAND_LINE
    if args.epochs is not None or asked or "epochs" not in earlier:
        return args.epochs
    return Fraction(earlier["epochs"])


def _refuse_clashes(args: argparse.Namespace, given: dict[str, str], show: Show) -> None:
    """Refuse options of the command line that contradict each other."""
    asked = {key for key, where in given.items() if where == COMMAND_LINE}
    if args.epochs is not None and "SOLVER.MAX_ITER" in asked:
        raise UserValueError(
            "--epochs and SOLVER.MAX_ITER both say how long the training is: leave one out."
        )
    if args.fit_anchors and (clash := next((key for key in ANCHOR_KEYS if key in asked), "")):
        name = show(Row(clash, None, None, "")).key
        raise UserValueError(f"--fit-anchors and {name} both set the anchors: leave one out.")


def _refuse_other_anchors(
    args: argparse.Namespace, earlier: dict[str, Any], data: TrainingData
) -> None:
    """Refuse to resume a training with other anchors than those that its network has learned
    for."""
    known = earlier.get("anchors")
    if args.fit_anchors and known is None:
        began, now = "without", "leave it out"
    elif known and not args.fit_anchors and list(data.anchors()[:2]) != _shapes(known):
        began, now = "with", "add it again"
    else:
        return
    raise UserValueError(
        f"The training that --resume continues began {began} --fit-anchors, and its network has "
        f"learned for those anchors: {now}, or start without --resume."
    )


def _shapes(known: dict[str, Any]) -> list[list[list[float]]]:
    return [known["sizes"], known["ratios"]]


def _fit_anchors(anchors: Anchors, records: list[Record], data: TrainingData) -> dict[str, Any]:
    """Fit anchors. All processes take those of the first process, as machines may round
    differently."""
    found = fit_anchors(anchors, collect_boxes(records, data.augment()))
    levels = [*zip(found.anchors.sizes, anchors.sizes, strict=True)]
    kept = len([*takewhile(lambda level: level[0] == level[1], reversed(levels))])
    note = (
        f"; the earlier sizes, which fit better, stay for the coarsest {kept} of {len(levels)} "
        "feature maps"
    )
    return comm.all_gather(
        {
            "sizes": found.anchors.sizes,
            "ratios": found.anchors.ratios,
            "reason": f"k-means over {found.num_boxes:,} boxes as training resizes them: mean best "
            f"IoU {found.before:.3f} before, {found.after:.3f} after; all classes count alike"
            + (note if kept else ""),
        }
    )[0]


def _set_anchors(cfg: CfgNode, anchors: Anchors, fitted: dict[str, Any]) -> list[Row]:
    rows = zip(
        ANCHOR_KEYS, anchors[:2], _shapes(fitted), (fitted["reason"], "likewise"), strict=True
    )
    found = [Row(*row) for row in rows]
    for row in found:
        set_value(cfg, row.key, row.value)
    return found


def data_of(cfg: CfgNode) -> TrainingData:
    """Return the data that the training of a YAML config is fitted to."""
    return TrainingData(
        load=lambda: _load_records(cfg),
        augment=lambda: build_mapper(cfg, is_train=True).augmentations,
        anchors=lambda: read_anchors(cfg),
    )


def _load_records(cfg: CfgNode) -> list[Record]:
    """Load the images that a config trains on, without the images that the config leaves out."""
    with loading_data():
        return get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            check_consistency=False,
        )


@contextmanager
def loading_data() -> Iterator[None]:
    """Hide the messages of loading in the context. The training loads the data again and shows
    them. Raise ValueError if no image is left."""
    try:
        with errors_only("detectron2.data", "vovnet_d2.data"):
            yield
    except AssertionError as error:  # Detectron2 raises it
        raise UserValueError(f"{' '.join(str(error).split())} See DATASETS.TRAIN.") from error


def keep_record(folder: str, facts: dict[str, Any] | None, *, anew: bool) -> None:
    """Write the facts that a training is fitted to, ``args.fitted`` of :func:`fit_to_data`, into
    its folder. If there are none and the training starts ``anew``, remove the file of an earlier
    training."""
    path = os.path.join(folder, _FILE)
    if facts:
        write_text(path, json.dumps(facts) + "\n")
    elif anew and is_made_here(path):
        os.remove(path)


def _read(folder: str) -> dict[str, Any]:
    """Return the facts that the training in a folder was fitted to, or an empty dict."""
    path = Path(folder, _FILE)
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["images"] > 0 and Fraction(facts.get("epochs", 1)) > 0:
            return facts
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        pass
    raise UserValueError(
        f"{path} does not say how many images the training was fitted to. Write "
        '{"images": N} to it, with the number above the table in log.txt, or start anew without '
        "--resume."
    )
