# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Remove the folders that a failed run has made, if nothing useful is in them."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def list_missing(folder: Path) -> list[Path]:
    """Return a folder and the folders above it, as far as they do not exist. The folder itself
    comes first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, in this order, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
