# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Messages of other packages that nobody who runs a command can do anything about."""

from __future__ import annotations

import logging
import warnings
from typing import Any

__all__ = ["escape_unwritable", "hide_known_messages"]

# The beginnings of warnings, as regular expressions.
_WARNINGS = (
    r"torch\.meshgrid: in an upcoming release",  # of Detectron2's call
    r"This DataLoader will create \d+ worker",  # Detectron2's default is 4, on any machine
    r"`torch\.jit\.\w+` is deprecated",  # of Detectron2's and fvcore's losses
    r"pkg_resources is deprecated",  # of detectron2.model_zoo
)
# Loggers, and what begins a message of theirs.
_RECORDS = {
    "torch.fx._symbolic_trace": "is_fx_tracing will return true",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def hide_known_messages() -> None:
    """Hide these messages in this process and in the data workers that it forks."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in _RECORDS:
        logging.getLogger(name).addFilter(_is_unknown)


def escape_unwritable(*streams: Any) -> None:
    """Let streams write characters that their encoding lacks as escapes. Names of files and of
    categories may have such, and would end a program, or its log, with an error."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _is_unknown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_RECORDS[record.name])
