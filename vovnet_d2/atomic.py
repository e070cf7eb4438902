# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError
from .made import is_foreign, note_made, put_aside

logger = logging.getLogger(__name__)

_SUFFIX = ".vovnet_d2.partial"


class FileNotWrittenError(UserError, OSError):
    """A file could not be written, for example on a full disk. The earlier file of this name is
    still there.
    """

    exit_status = 1


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[str]:
    """Give ``path`` its new content at once, and only when all of it is on the disk.

    A file of that name which this package did not make is renamed, with a warning.

    Args:
        replace: replace such a file instead, because its user has said so.

    Yields:
        the name of a temporary file in the same folder, to be written and closed in the context.
        If that fails, the file at ``path``, if there is one, is left as it was.

    Raises:
        FileNotWrittenError: the file cannot be written, for example on a full disk.
    """
    path = os.fspath(path)
    partial = f"{path}.{os.getpid()}{_SUFFIX}"
    try:
        yield partial
        _flush_to_disk(partial, os.O_RDWR)  # Windows flushes what may be written alone
        if not replace and is_foreign(path):
            logger.warning("%s was not made by this package: it is now %s.", path, put_aside(path))
        note_made(path, content=partial)  # first, for a kill in between
        os.replace(partial, path)
        with suppress(OSError):  # some network file systems cannot do this for a folder
            _flush_to_disk(os.path.dirname(path) or ".", os.O_RDONLY)  # the new name
    except (OSError, RuntimeError) as error:
        if (reason := _why_not_written(error)) is None:
            raise
        raise FileNotWrittenError(f"{path} could not be written: {reason}.") from error
    finally:
        Path(partial).unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, see :func:`atomic_write`."""
    with atomic_write(path) as partial:
        Path(partial).write_text(text, encoding="utf-8")


def remove_leftovers(folder: str | os.PathLike[str]) -> list[str]:
    """Remove the temporary files that killed processes left. Return their names."""
    found = sorted(
        path
        for path in Path(folder).glob(f"*.*{_SUFFIX}")
        if path.name.removesuffix(_SUFFIX).split(".")[-1].isdigit()
    )
    for partial in found:
        partial.unlink(missing_ok=True)
    return [partial.name for partial in found]


def _flush_to_disk(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_not_written(error: BaseException | None) -> str | None:
    """Return the system's reason.

    PyTorch's writer reports that it stopped in an error of its own, during which the system's was
    raised.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return None if error is None else error.strerror or str(error)
