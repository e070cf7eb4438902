# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of weights inside a zip archive, as osmr/imgclsmob publishes them (.pth.zip)."""

import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from ..errors import UserValueError

_SUFFIXES = (".pth", ".pt", ".bin", ".pkl")
_TORCH_RECORDS = ("data.pkl", "constants.pkl")  # PyTorch's own files are zip archives, too

# Trained weights hardly compress. Deflate reaches a ratio of 1000 on bytes that are all alike.
_MAX_RATIO = 100
_HARMLESS_SIZE = 2**28  # bytes, whatever the ratio


def find_weights(path: str) -> zipfile.ZipInfo | None:
    """Find the file of weights in a zip archive that holds nothing else.

    Returns:
        the archive's entry for it; None if ``path`` is no zip archive, is PyTorch's own, is too
        damaged to tell, or holds nothing with the name of a file of weights.

    Raises:
        ValueError: the archive holds other files too, is encrypted, or unpacks to an absurd size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
    except Exception:  # zipfile raises what comes to it
        return None
    entries = [e for e in entries if not e.filename.startswith("__MACOSX/")]
    names = [PurePosixPath(e.filename).name for e in entries]
    if any(name in _TORCH_RECORDS for name in names):
        return None
    if not any(name.endswith(_SUFFIXES) for name in names):
        return None
    if len(entries) > 1:
        raise UserValueError(
            f"{path} is a zip archive of {len(names)} files ({', '.join(map(repr, names[:3]))}"
            f"{', ...' if len(names) > 3 else ''}): unpack it and give the file of weights inside."
        )
    (entry,) = entries
    if entry.flag_bits & 1:
        raise UserValueError(f"{path} is an encrypted zip archive: unpack it first.")
    ratio = entry.file_size / max(entry.compress_size, 1)
    if entry.file_size > _HARMLESS_SIZE and ratio > _MAX_RATIO:
        raise UserValueError(
            f"{path} is refused: {names[0]!r} in it would unpack to {entry.file_size} bytes, "
            f"{ratio:.0f} times the size of the archive, which no weights do."
        )
    return entry


def unpacked(path: str, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield the content of a file in an archive, in pieces of at most a megabyte. Raise ValueError
    if the archive is damaged."""
    try:
        # Not more bytes come out than the entry promises, and their checksum is compared.
        with zipfile.ZipFile(path) as archive, archive.open(entry) as source:
            while chunk := source.read(2**20):
                yield chunk
    except Exception as error:  # zipfile raises what comes to it, OSError included
        raise UserValueError(
            f"{path} is damaged or truncated: download or copy it again."
        ) from error
