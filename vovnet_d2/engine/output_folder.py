# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder that a run writes to: what is there already is kept."""

from __future__ import annotations

import logging
import os
from itertools import count
from pathlib import Path

from detectron2.utils import comm

from ..made import is_made_here, is_run, put_aside

__all__ = ["choose_folder", "keep_foreign_config"]

logger = logging.getLogger(__name__)

_TAG = "last_checkpoint"  # which --resume follows

# What a run leaves in its folder, by which the folder of a run is known: its report, its records
# and, of a training, its checkpoints.
_REPORT = (
    *("config.yaml", "results.json", "results.md", "loss_curve.png", "predictions.png"),
    *("inference", "metrics.json", _TAG, "checkpoints.json"),
)
_CHECKPOINTS = (
    *("model_final.pth", "model_best.pth", f"model_{'[0-9]' * 7}.pth"),
    *("nonfinite_*.json", "nonfinite_*.pth"),
)


def choose_folder(folder: str, *, training: bool, resume: bool) -> str:
    """Find the folder that a run writes to, the same for all processes.

    A training takes the folder as it is. An evaluation takes it too, unless there are files that
    it would overwrite: it then writes to ``evaluation`` below, with a number if need be.

    Args:
        folder: ``OUTPUT_DIR``.
        resume: whether the training that the folder has goes on, if there is one.

    Raises:
        ValueError: a training would overwrite files that no run of this package wrote, or the
            folder of an evaluation cannot be made.
    """
    chosen = refusal = ""
    if comm.is_main_process():
        try:
            if training and not (resume and os.path.isfile(os.path.join(folder, _TAG))):
                _refuse_foreign_run(Path(folder))
            chosen = folder if training else _choose_for_evaluation(folder)
        except ValueError as error:
            refusal = str(error)
    chosen, refusal = comm.all_gather((chosen, refusal))[0]
    if refusal:
        raise ValueError(refusal)
    return chosen


def _refuse_foreign_run(folder: Path) -> None:
    found = _find(folder, (*_REPORT, *_CHECKPOINTS))
    if found and not is_run(folder):
        raise ValueError(
            f"OUTPUT_DIR {folder} has {found[0]}, which no run of this package wrote, and which "
            "would be overwritten: name another folder, or move the file away. To go on with the "
            "run that is there, add --resume."
        )


def _choose_for_evaluation(folder: str) -> str:
    if not _find(Path(folder), _REPORT):
        return folder
    for number in count(1):
        chosen = os.path.join(folder, "evaluation" + (f"_{number}" if number > 1 else ""))
        try:
            os.mkdir(chosen)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(
                f"The folder {chosen} cannot be made ({error.strerror}): name another OUTPUT_DIR."
            ) from error
        break
    return chosen


def keep_foreign_config(folder: str) -> None:
    """Copy a ``config.yaml`` that somebody has written or changed, as Detectron2 overwrites it."""
    path = os.path.join(folder, "config.yaml")
    if os.path.isfile(path) and not is_made_here(path):
        # The file itself may be what the run is given as --config-file.
        text = Path(path).read_bytes()
        kept = put_aside(path)
        Path(path).write_bytes(text)
        logger.warning("%s was not written by this package as it is: a copy is %s.", path, kept)


def _find(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted(path.name for pattern in patterns for path in folder.glob(pattern))
