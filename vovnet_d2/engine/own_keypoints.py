# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Keypoints of annotation files on the command line."""

import logging

from detectron2.config import CfgNode

from ..data.keypoints import Flips, derive_flips, parse_flips
from ..data.own import OwnDataSet
from ..data.own_files import Contents
from ..errors import UserValueError

logger = logging.getLogger(__name__)

KEYPOINT_KEY = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
_HINT = "tools/check_dataset.py lists all that is wrong with a file, and writes a corrected copy."


def refuse_idle_flips(cfg: CfgNode, flips: str | None, *, trained_file: bool) -> None:
    """Raise ValueError if ``--keypoint-flips`` has no effect: if ``trained_file`` is False, so that
    there are no annotations to train on, or if the network predicts no keypoints."""
    if flips is None:
        return
    if not cfg.MODEL.KEYPOINT_ON:
        raise UserValueError(
            "--keypoint-flips needs a config with MODEL.KEYPOINT_ON True: leave it out."
        )
    if not trained_file:
        raise UserValueError(
            "--keypoint-flips goes with annotations to train on: an evaluation mirrors nothing, so "
            "leave it out."
        )


def find_keypoints(
    cfg: CfgNode,
    json: str,
    contents: Contents,
    *,
    flips: str | None = None,
    trained: OwnDataSet | None = None,
) -> tuple[tuple[str, ...], Flips]:
    """Return the names of keypoints and the pairs that are swapped in a mirrored picture. Set the
    number of keypoints in the config. A network without keypoints has none.

    Args:
        json: the annotation file.
        contents: the content of the file.
        flips: ``--keypoint-flips``; None to derive the pairs from the names.
        trained: the data set of the training, which sets the keypoints.

    Raises:
        ValueError: the file has no usable keypoints, or other keypoints than the training; a name
            has no counterpart; ``flips`` does not fit the names.
    """
    if not cfg.MODEL.KEYPOINT_ON:
        return (), ()
    if contents.keypoint_problem:
        raise UserValueError(
            f"{json} cannot be used for keypoints: {contents.keypoint_problem}. {_HINT}"
        )
    names = contents.keypoints
    if trained is not None:
        if names != trained.keypoints:
            raise UserValueError(
                f"{json} has the keypoints {', '.join(names)}, and the network is trained on "
                f"{', '.join(trained.keypoints) or 'none'}: they must be the same, in one order."
            )
        return names, trained.keypoint_flips
    cfg.merge_from_list([KEYPOINT_KEY, len(names)])
    mirrored = cfg.INPUT.RANDOM_FLIP != "none"
    try:
        found = (
            derive_flips(names, mirrored=mirrored) if flips is None else parse_flips(flips, names)
        )
    except ValueError as error:
        raise UserValueError(f"{json}: {str(error).rstrip('.')}.") from error
    if mirrored:
        _tell(names, found, derived=flips is None)
    return names, found


def _tell(names: tuple[str, ...], flips: Flips, *, derived: bool) -> None:
    """Log which keypoints are swapped in a mirrored picture. A wrong pair spoils a training."""
    paired = {name for pair in flips for name in pair}
    staying = [name for name in names if name not in paired]
    source = "by their names; --keypoint-flips overrules this" if derived else "--keypoint-flips"
    if not flips:
        logger.log(
            logging.WARNING if derived else logging.INFO,
            "No keypoints are swapped in a mirrored picture (%s): all %d stay, %s.",
            *(source, len(names), ", ".join(names)),
        )
        return
    logger.info(
        "Keypoints that are swapped in a mirrored picture (%s): %s. Those that stay: %s.",
        *(source, ", ".join(f"{one} and {other}" for one, other in flips)),
        ", ".join(staying) or "none",
    )
