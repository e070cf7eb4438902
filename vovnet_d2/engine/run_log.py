# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The log of a run: its file, and what the terminal shows of it."""

import logging
import os

import torch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..data.workers import is_silent_worker
from ..errors import UserError
from .interruption import is_lost_connection
from .progress import shorten_log
from .quiet import colour_terminals_only, escape_unwritable, shorten_long_messages

_LOGGERS = ("detectron2", "fvcore", "vovnet_d2")


def start_log(output_dir: str, *, progress: bool) -> None:
    """Start the log of a run in ``log.txt``. With ``progress``, the terminal shows a progress bar
    instead."""
    rank = comm.get_rank()
    # These arguments equal those of default_setup, so that default_setup adds no handlers.
    setup_logger(output_dir, distributed_rank=rank)
    for name in ("fvcore", "vovnet_d2"):
        ours = setup_logger(output_dir, distributed_rank=rank, name=name)
    _open_removed_file(os.path.join(output_dir, "log.txt" + (f".rank{rank}" if rank else "")))
    # All loggers write to the file through one stream.
    escape_unwritable(*(getattr(handler, "stream", None) for handler in ours.handlers))
    for name in _LOGGERS:
        colour_terminals_only(name)
        shorten_long_messages(name, os.path.join(output_dir, "log.txt"))
        if progress:
            shorten_log(name)
    # If an error is told in one sentence, no traceback comes before the sentence.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_surprise)


def _open_removed_file(file: str) -> None:
    """Open a log file again that was removed since an earlier run in this process. Detectron2 opens
    each log file once in a process."""
    if os.path.exists(file):
        return
    os.makedirs(os.path.dirname(file), exist_ok=True)
    stream = open(file, "a")  # noqa: SIM115 (the process keeps it open)
    for handler in (handler for name in _LOGGERS for handler in logging.getLogger(name).handlers):
        if (
            isinstance(handler, logging.StreamHandler)
            and getattr(handler.stream, "name", "") == file
        ):
            handler.setStream(stream)


def _is_surprise(record: logging.LogRecord) -> bool:
    """Return False for the traceback of an error that is told in one sentence."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return True
    told = isinstance(error, UserError | torch.OutOfMemoryError)
    return not (told or is_lost_connection(error) or is_silent_worker(error))
