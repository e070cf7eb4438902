# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Remove the folders that a failed run has made, if nothing useful is in them."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def list_missing(folder: Path) -> list[Path]:
    """Return a folder that does not exist and the missing folders above it. The folder itself comes
    first. The list is empty if the folder exists.

    Before ``runs`` is made, the system does not find ``runs/../output``, even if ``output`` exists.
    So the paths are resolved.
    """
    paths = [Path(os.path.realpath(path)) for path in (folder, *folder.parents)]
    return [] if os.path.exists(paths[0]) else [path for path in paths if not os.path.exists(path)]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, in this order, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
