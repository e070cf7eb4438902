# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Images are found in their folder, and annotation files are listed and read."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from ...errors import UserFileNotFoundError, UserValueError
from ...words import suggest_path
from ..check.names import NearNames
from ..image_file import read_header
from .labelled import LabelledImage
from .notes import read_each

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm")


class ImageFolder:
    """Finds images by their names in annotation files.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserFileNotFoundError(f"There is no folder of images {root}.{suggest_path(root)}")
        self.root = root
        self._near = NearNames(root)

    def find(self, *names: str) -> str | None:
        """Return the path of the first name that leads to a file, relative to the folder. The names
        may come from another operating system, or lack the suffix."""
        for name in filter(None, map(slashed, names)):
            if self._is_file(name):
                return name
            if near := self._near.find(name):
                return near
        return None

    def _is_file(self, name: str) -> bool:
        path = PurePosixPath(name)
        inside = not path.is_absolute() and ".." not in path.parts
        known = path.suffix.lower() in IMAGE_SUFFIXES
        return inside and known and (self.root / name).is_file()

    def sizes(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Read the width and height of images from the headers of their files. Raise ValueError if
        a file is no picture."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            started = [pool.submit(self._size, name) for name in names]
            return read_each(started, Future.result)

    def fill_sizes(self, images: Sequence[LabelledImage]) -> None:
        """Read the sizes of the images whose size is not known, (0, 0). See :meth:`sizes`."""
        missing = [image for image in images if not all(image.size)]
        found = self.sizes([image.file_name for image in missing])
        for image, size in zip(missing, found, strict=True):
            image.size = size

    def _size(self, name: str) -> tuple[int, int]:
        try:
            return read_header(self.root / name).size
        except (FileNotFoundError, ValueError) as error:
            raise UserValueError(
                f"{self.root / name} is not a picture that can be read: replace it, or remove it "
                "and its annotations."
            ) from error


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """List the files of some suffixes below a folder, in order, without hidden files.

    Symbolic links to folders are followed, but each folder is listed once.
    """
    found: list[Path] = []
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (n for n in files if not n.startswith(".") and n.lower().endswith(tuple(suffixes)))
        found += [Path(parent, name) for name in names]
    return sorted(found)


def read_text(path: Path) -> str:
    """Read a text file, with or without a byte order mark. Raise FileNotFoundError if the file
    cannot be read, and ValueError if the file is neither in UTF-8 nor in UTF-16 with a byte order
    mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserFileNotFoundError(f"{path} cannot be read: {error.strerror}.") from error
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserValueError(
            f"{path}, line {line}, is not in UTF-8 (byte {data[error.start]:#04x}): save the file "
            "as UTF-8."
        ) from error


def slashed(path: str) -> str:
    """Return a path of any system with slashes and without a leading "./"."""
    return path.strip().replace("\\", "/").removeprefix("./")


def last_part(path: str) -> str:
    """Return the name of a file at the end of a path of any system."""
    return slashed(path).rstrip("/").rpartition("/")[2]
