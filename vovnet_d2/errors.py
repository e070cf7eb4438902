# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix. Command lines show the message alone, without a traceback."""


class UserError(Exception):
    """The user can fix this, and the message says how.

    Each subclass is also the built-in error that fits, so that ``except ValueError`` catches it.

    Attributes:
        exit_status: the status that a command line ends with; see :mod:`vovnet_d2.engine.launch`.
    """

    exit_status = 2

    # KeyError would put the message in quotation marks.
    __str__ = Exception.__str__

    @property
    def sentence(self) -> str:
        """Return the message alone. The message of an error from a worker of a data loader, as
        torch raises it again, begins with the worker's traceback.
        """
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return str(self).rpartition(f"\n{kind}: ")[2].strip()


class UserValueError(UserError, ValueError):
    """A value, or the content of a file, cannot be used."""


class UserKeyError(UserError, KeyError):
    """A name or key does not exist."""


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file or folder does not exist."""


class UserImportError(UserError, ModuleNotFoundError):
    """A package is needed and cannot be imported."""


def one_line(error: BaseException) -> str:
    """Return the message of any error in one line without a full stop, or its class if it has no
    message.
    """
    # str() puts the text of a KeyError in quotation marks.
    message = error.args[0] if isinstance(error, KeyError) and len(error.args) == 1 else error
    return " ".join(str(message).split()).rstrip(".") or type(error).__name__


def describe(error: BaseException) -> str:
    """Return the class and the message of an error in one line. A :class:`UserError` needs no
    class.
    """
    kind, message = type(error).__name__, one_line(error)
    return message if isinstance(error, UserError) or message == kind else f"{kind}: {message}"
