# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Fewer messages in the terminal: some known ones are hidden, and long ones are cut to a line."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The beginnings of warnings, as regular expressions.
_WARNINGS = (
    r"torch\.meshgrid: in an upcoming release",  # from a call in Detectron2
    r"This DataLoader will create \d+ worker",  # Detectron2's default is 4, on any machine
    r"`torch\.jit\.\w+` is deprecated",  # from losses of Detectron2 and fvcore
    r"pkg_resources is deprecated",  # from detectron2.model_zoo
)
# For each logger, a regular expression of the messages that are hidden.
_RECORDS = {
    "torch.fx._symbolic_trace": r"is_fx_tracing will return true",
    "torch.utils.cpp_extension": r"No CUDA runtime is found",
    # A config without VERSION is read as any other, more than once.
    "detectron2.config.compat": r"has no VERSION. Assuming it to be compatible with latest",
    # The attempts before a download succeeds or ends with a sentence of this package.
    "huggingface_hub.utils._http": r"thrown while requesting|^Retrying in",
}
# The loggers that print the environment, the config, the model and the counts of a data set.
_SET_UP = (
    *("detectron2", "detectron2.engine.defaults", "detectron2.data.build"),
    *("vovnet_d2.engine.classifier", "vovnet_d2.engine.lazy"),
)
_MOST_LINES = 10
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def hide_known_messages() -> None:
    """Hide known messages that help nobody, in this process and in the data workers that it
    forks."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in _RECORDS:
        logging.getLogger(name).addFilter(_is_unknown)


def escape_unwritable(*streams: Any) -> None:
    """Let streams write a character as an escape if their encoding lacks it. Names of files and of
    categories may have such characters, which would otherwise end a program or its log with an
    error."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _is_unknown(record: logging.LogRecord) -> bool:
    return not re.search(_RECORDS[record.name], record.getMessage())


@contextmanager
def errors_only(*logger_names: str) -> Iterator[None]:
    """Let loggers write nothing but errors in the context."""
    loggers = [logging.getLogger(name) for name in logger_names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def terminal_handlers(logger_name: str) -> list[logging.Handler]:
    """Return the handlers of a logger that write to the terminal."""
    handlers = logging.getLogger(logger_name).handlers
    return [h for h in handlers if getattr(h, "stream", None) is sys.stdout]


def shorten_long_messages(logger_name: str, file: str) -> None:
    """Show the first line of a long message about the set-up in the terminal, and name the log file
    that has all of it."""
    for handler in terminal_handlers(logger_name):
        handler.setFormatter(_FirstLine(_unwrap(handler, _FirstLine), file))


def colour_terminals_only(logger_name: str) -> None:
    """Remove the codes of colours from what a logger writes to files and pipes. Detectron2 colours
    the text of a config wherever it goes."""
    coloured = terminal_handlers(logger_name) if sys.stdout.isatty() else []
    for handler in logging.getLogger(logger_name).handlers:
        if handler not in coloured:
            handler.setFormatter(_Plain(_unwrap(handler, _Plain, _FirstLine)))


class _Wrapper(logging.Formatter):
    """Changes the text of another formatter."""

    def __init__(self, formatter: logging.Formatter):
        super().__init__()
        self.wrapped = formatter


def _unwrap(handler: logging.Handler, *kinds: type[_Wrapper]) -> logging.Formatter:
    """Return the formatter of a handler without the wrappers that an earlier run in this process
    has put around it."""
    formatter = handler.formatter or logging.Formatter()
    while isinstance(formatter, kinds):
        formatter = formatter.wrapped
    return formatter


class _Plain(_Wrapper):
    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", self.wrapped.format(record))


class _FirstLine(_Wrapper):
    def __init__(self, formatter: logging.Formatter, file: str):
        super().__init__(formatter)
        self._file = file

    def format(self, record: logging.LogRecord) -> str:
        is_of_set_up = record.name in _SET_UP  # Detectron2's formatter changes the name
        text = self.wrapped.format(record)
        first, *others = text.splitlines()
        if not is_of_set_up or len(others) < _MOST_LINES:
            return text
        return f"{first} ({len(others)} lines in {self._file})"
