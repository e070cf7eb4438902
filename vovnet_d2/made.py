# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""List the files that this package made. The package overwrites and removes no other files.

Each folder that the package writes to gets a hidden list with the name and a fingerprint of every
file that was written there. A file that is not in the list, or that somebody has changed since,
belongs to somebody else.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .errors import UserValueError

LIST_NAME = ".vovnet_d2_made.jsonl"

_RUN = (".", "run")  # the entry for a folder that a run writes to
_EDGE = 1 << 20  # the fingerprint of a file covers these bytes at each end


def note_made(path: str | os.PathLike[str], *, content: str | os.PathLike[str] = "") -> None:
    """Note that this package has just written a file, or is about to rename ``content`` to it. A
    list that cannot be written is no error. The file then counts as somebody else's."""
    path = Path(path)
    with suppress(OSError):
        _append(path.parent, path.name, _fingerprint(Path(content or path)))


def is_made_here(path: str | os.PathLike[str]) -> bool:
    """Return whether a file exists and is unchanged since this package wrote it."""
    path = Path(path)
    try:
        return _fingerprint(path) in _read_list(path.parent).get(path.name, ())
    except OSError:
        return False


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Return whether a file exists that this package did not make. A folder is not such a file,
    because the system never replaces a folder by a file."""
    return os.path.lexists(path) and not os.path.isdir(path) and not is_made_here(path)


def note_run(folder: str | os.PathLike[str]) -> None:
    """Note that a run of this package writes to a folder. Detectron2's files then count as ours."""
    with suppress(OSError):
        _append(Path(folder), *_RUN)


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Return whether :func:`note_run` has noted this folder."""
    return count_runs(folder) > 0


def count_runs(folder: str | os.PathLike[str]) -> int:
    """Return how often :func:`note_run` has noted this folder."""
    name, value = _RUN
    try:
        return _read_list(Path(folder)).get(name, []).count(value)
    except OSError:
        return 0


def refuse_foreign(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Raise ValueError if one of the files is there already and this package did not make it."""
    for path in map(Path, paths):
        if is_foreign(path):
            raise UserValueError(
                f"{path} exists, and is not as this package wrote it: it would be overwritten. "
                "Move it away, or choose another output."
            )


def put_aside(path: str | os.PathLike[str]) -> str:
    """Add ``.before``, and a number if necessary, to the name of a file. Return the new name."""
    path = os.fspath(path)
    name, number = f"{path}.before", 2
    while os.path.lexists(name):
        name, number = f"{path}.before{number}", number + 1
    os.rename(path, name)
    return name


def _append(folder: Path, name: str, made: str) -> None:
    # One write per line lets several processes write to the same list.
    with open(folder / LIST_NAME, "a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, "made": made}) + "\n")


def _read_list(folder: Path) -> dict[str, list[str]]:
    """Return all fingerprints that are listed for each file of a folder."""
    made: dict[str, list[str]] = {}
    for line in (folder / LIST_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):  # incomplete after a kill
            entry = json.loads(line)
            made.setdefault(entry["name"], []).append(entry["made"])
    return made


def _fingerprint(path: Path) -> str:
    """Describe a file by its size and its two ends."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()
