# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run. Files that are there already are kept."""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..errors import UserError, UserValueError
from ..folders import list_missing, remove_empty
from ..made import LIST_NAME, count_runs, is_made_here, is_run, put_aside
from .main_process import in_main_process

logger = logging.getLogger(__name__)

_TAG = "last_checkpoint"  # which --resume follows

# The files by which the folder of a run is recognised: its report, its records, and the checkpoints
# of a training.
_REPORT = (
    *("config.yaml", "results.json", "results.md", "loss_curve.png", "predictions.png"),
    *("inference", "metrics.json", _TAG, "checkpoints.json"),
)
_CHECKPOINTS = (
    *("model_final.pth", "model_final_ema.pth", "model_best.pth", "model_best_ema.pth"),
    *(f"model_{'[0-9]' * 7}.pth", "nonfinite_*.json", "nonfinite_*.pth"),
)
_BESIDES = (
    "inference_*",
    "evaluation",
    "evaluation_[0-9]*",
    "report.html",
    "fitted.json",
    "loggers.json",
    "events.out.tfevents.*",
)
_EARLIER = "earlier"

# The files that a run begins with. The log and the list grow, the next files are in the list as
# they are, and the last files are empty before the first iteration.
_GROWING = re.compile(r"log\.txt(\.rank\d+)?|" + re.escape(LIST_NAME))
_LISTED = re.compile(r"config\.yaml|fitted\.json|annotations_.*\.json")
_EMPTY = re.compile(r"metrics\.json|events\.out\.tfevents\..*")


def choose_folder(folder: str, *, training: bool, resume: bool) -> str:
    """Return the folder that all processes of a run write to.

    A training takes the folder, see :func:`keep_earlier_run`. An evaluation takes it too, unless
    there are files that it would overwrite: it then writes to ``evaluation`` below, with a number
    if need be.

    Args:
        folder: ``OUTPUT_DIR``.
        resume: True if the training in the folder is resumed, if there is one.

    Raises:
        ValueError: a training would overwrite files that no run of this package wrote, or the
            folder of an evaluation cannot be made.
    """

    def choose() -> str:
        if training and not (resume and os.path.isfile(os.path.join(folder, _TAG))):
            _refuse_foreign_run(Path(folder))
        chosen = folder if training else _choose_for_evaluation(folder)
        _put_foreign_logs_aside(Path(chosen))
        return chosen

    return in_main_process(choose)


def _put_foreign_logs_aside(folder: Path) -> None:
    """Rename the logs that no run wrote: a run appends only to the log of a run."""
    if not is_run(folder):
        for log in _find(folder, ("log.txt", "log.txt.rank[0-9]*")):
            kept = put_aside(folder / log)
            logger.warning("%s/%s was not made by this package: it is now %s.", folder, log, kept)


def _refuse_foreign_run(folder: Path) -> None:
    found = _find(folder, (*_REPORT, *_CHECKPOINTS))
    if found and not is_run(folder):
        raise UserValueError(
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
            raise UserValueError(
                f"The folder {chosen} cannot be made ({error.strerror}): name another OUTPUT_DIR."
            ) from error
        break
    return chosen


@contextmanager
def discard_on_mistake(cfg: CfgNode) -> Iterator[None]:
    """Remove the output folder that a run makes in this context, if a mistake of the user ends the
    run before its first result. The folder then holds no more than a log, the config and converted
    annotations.

    Args:
        cfg: the config, whose ``OUTPUT_DIR`` may change in the context, see :func:`choose_folder`.
    """
    folder = cfg.OUTPUT_DIR
    missing = list_missing(Path(folder))
    try:
        yield
    except UserError as error:
        made = missing if folder == cfg.OUTPUT_DIR else [Path(cfg.OUTPUT_DIR)]
        if made and error.exit_status == 2 and comm.is_main_process():
            with suppress(OSError):  # the mistake is what the user has to know
                _remove_begun(made[0])
            remove_empty(made)
        raise


def _remove_begun(folder: Path) -> None:
    """Remove the files of a run, unless there are others than a run begins with, or another run
    has begun in the same folder since."""
    files = [*folder.iterdir()]
    if count_runs(folder) <= 1 and all(map(_is_begun, files)):
        for file in files:
            file.unlink(missing_ok=True)


def _is_begun(file: Path) -> bool:
    """Return whether a file is what a run leaves that has not come to its first iteration."""
    if _LISTED.fullmatch(file.name):
        return is_made_here(file)
    is_empty = bool(_EMPTY.fullmatch(file.name)) and file.is_file() and not file.stat().st_size
    return is_empty or bool(_GROWING.fullmatch(file.name))


def keep_earlier_run(folder: str, inputs: Sequence[str] = ()) -> str:
    """Move the files of an earlier run in a folder to ``earlier`` below, with a number if need be.
    A training that starts anew in the folder calls this function after all checks.

    Args:
        inputs: files that the training reads. They stay, and the earlier run gets a copy.

    Returns:
        the folder that holds the earlier run now; empty if there was no earlier run.
    """
    here = Path(folder)
    if not _has_run(here):
        return ""
    earlier = here / _EARLIER
    for number in count(2):
        if not os.path.lexists(earlier):
            break
        earlier = here / f"{_EARLIER}_{number}"
    earlier.mkdir()
    read = [Path(file).resolve() for file in inputs if file]
    for name in _find(here, (*_REPORT, *_CHECKPOINTS, *_BESIDES)):
        path = here / name
        if not any(file.is_relative_to(path.resolve()) for file in read):
            path.rename(earlier / name)
        elif path.is_dir():
            shutil.copytree(path, earlier / name)
        else:
            shutil.copy2(path, earlier / name)
    # The list of the package's files, and the log, to which the training appends.
    for name in _find(here, (LIST_NAME, "log.txt*")):
        shutil.copy2(here / name, earlier / name)
    logger.warning(
        "%s held an earlier run: it is now %s. To go on with that one instead, give the same "
        "command with this folder for its output, and --resume.",
        *(here, earlier),
    )
    return str(earlier)


def _has_run(folder: Path) -> bool:
    """Return whether a folder has files of a run. A ``config.yaml`` alone is no run, because that
    run had not begun."""
    return bool({*_find(folder, (*_REPORT, *_CHECKPOINTS))} - {"config.yaml"})


def keep_foreign_config(folder: str) -> None:
    """Copy a ``config.yaml`` that somebody has written or changed, because Detectron2 overwrites
    it."""
    path = os.path.join(folder, "config.yaml")
    if os.path.isfile(path) and not is_made_here(path):
        # The file itself may be what the run is given as --config-file.
        text = Path(path).read_bytes()
        kept = put_aside(path)
        Path(path).write_bytes(text)
        logger.warning("%s was not written by this package as it is: a copy is %s.", path, kept)


def _find(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted(path.name for pattern in patterns for path in folder.glob(pattern))
