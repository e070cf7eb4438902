# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Read images from files, a video or a camera."""

import glob
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from PIL import Image

from ..data.image_file import is_heic, read_image
from ..errors import UserFileNotFoundError, UserValueError
from ..words import counted, suggest_path

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
logger = logging.getLogger(__name__)

_FPS = 30.0  # if a camera does not say its rate
_NUM_NAMED = 5

Skip = Callable[[str], None]


class Frame(NamedTuple):
    """An image that the detector gets.

    Attributes:
        number: the number of the image in its source, from 1. Unreadable pictures count.
        name: the file or the camera of the image.
        pixels: (H, W, 3), uint8, BGR.
    """

    number: int
    name: str
    pixels: np.ndarray


class Source(Protocol):
    """Reads images one after the other, for the demo to run a detector on.

    Attributes:
        unit: the word for an image of the source.
        total: the number of images, or None if it is not known.
        files: the files that the source reads.
    """

    unit: str
    total: int | None
    files: list[Path]

    def frames(self, skip: Skip) -> Iterator[Frame]:
        """Return the images that can be read, and call ``skip`` for each image that cannot."""


class Picture(NamedTuple):
    """A picture file, with the name of its result in a folder of results."""

    path: Path
    relative: Path


class Pictures:
    """The pictures in files, in folders, and in files that match patterns, each once."""

    unit = "image"

    def __init__(self, inputs: Sequence[str], *, recursive: bool = False):
        """
        Args:
            inputs: names of files or folders, and patterns with ``*``, ``**`` or ``?``.
            recursive: also take the pictures in the folders of a folder.

        Raises:
            FileNotFoundError: there is no file at all.
        """
        found: dict[Path, Picture] = {}
        self._missing: list[str] = []  # sentences
        for name in inputs:
            if not (pictures := _find_pictures(name, recursive)):
                self._missing.append(_explain_missing(name, hint=not self._missing))
            for picture in pictures:
                found.setdefault(picture.path.resolve(), picture)
        self.pictures = list(found.values())
        if not self.pictures:
            raise UserFileNotFoundError(" ".join(self._missing))
        self.files = [picture.path for picture in self.pictures]
        self.total: int | None = len(self.files)

    def frames(self, skip: Skip) -> Iterator[Frame]:
        for sentence in self._missing:
            skip(sentence)
        for number, path in enumerate(self.files, start=1):
            try:
                pixels = read_image(path)
            except (FileNotFoundError, ValueError) as error:
                skip(str(error))
            else:
                yield Frame(number, str(path), pixels)


def _explain_missing(name: str, *, hint: bool) -> str:
    """Return a sentence on a missing input. With ``hint``, it names similar files: a search for
    each of many inputs would take long."""
    if os.path.isdir(name):
        return f"There is no picture in the folder {name}."
    is_folder = name.endswith(("/", os.sep))
    kind = "folder" if is_folder else "file" if Path(name).suffix else "file or folder"
    return f"There is no {kind} {name}.{suggest_path(name) if hint else ''}"


def _find_pictures(name: str, recursive: bool) -> list[Picture]:
    path = Path(name)
    if path.is_dir():
        paths = sorted(path.rglob("*") if recursive else path.iterdir())
        files = [Picture(p, p.relative_to(path)) for p in paths if not p.is_dir()]
        # Hidden files, which file managers leave, are not taken.
        files = [f for f in files if not any(part.startswith(".") for part in f.relative.parts)]
        return _leave_out_others(name, files)
    if path.exists():  # the name of a file may look like a pattern
        return [Picture(path, Path(path.name))]
    matches = map(Path, sorted(glob.glob(name, recursive=True)))
    return [Picture(match, Path(match.name)) for match in matches if not match.is_dir()]


def _leave_out_others(folder: str, files: list[Picture]) -> list[Picture]:
    """Leave out what is no picture, as a labels.txt or a Thumbs.db, and say so: it is no mistake,
    unlike a damaged picture."""
    pictures: list[Picture] = []
    others: list[str] = []
    for file in files:
        if _is_picture(file.path):
            pictures.append(file)
        else:
            others.append(str(file.relative))
    if others:
        names = ", ".join(others[:_NUM_NAMED]) + (", ..." if len(others) > _NUM_NAMED else "")
        logger.warning(
            "Skipped %s in %s, not a picture by name or content: %s.",
            *(counted(len(others), "files"), folder, names),
        )
    return pictures


def _is_picture(path: Path) -> bool:
    """Return whether a file is meant to be a picture, by its name or its first bytes."""
    if path.suffix.lower() in PICTURE_SUFFIXES or is_heic(path):
        return True
    try:
        Image.open(path).close()
    except (OSError, ValueError):  # such as UnidentifiedImageError
        return False
    return True


class Video:
    """All frames of a video file, in the order of the file."""

    unit = "frame"

    def __init__(self, path: str):
        """Open a video file. Raise FileNotFoundError if there is no such file."""
        if not os.path.isfile(path):
            raise UserFileNotFoundError(f"There is no file {path}.{suggest_path(path)}")
        self.files = [Path(path)]
        self._capture = cv2.VideoCapture(path)
        announced = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.total: int | None = int(announced) if announced > 0 else None
        self.fps = _find_fps(self._capture)

    def frames(self, skip: Skip) -> Iterator[Frame]:
        (path,) = self.files
        count = 0
        for frame in _read_frames(self._capture, str(path)):
            count = frame.number
            yield frame
        if not count:
            skip(f"{path} is not a video that can be read.")
        elif self.total and count < self.total - self.fps:  # the number may be an estimate
            skip(f"{path} ends after {count} of the {self.total} frames that it announces.")


class Camera:
    """The frames of a camera. They end when it is unplugged or the run is interrupted."""

    unit = "frame"
    total: int | None = None

    def __init__(self, index: int):
        """Open a camera. Raise ValueError if it cannot be opened."""
        self._capture = cv2.VideoCapture(index)
        if not self._capture.isOpened():
            raise UserValueError(
                f"Camera {index} cannot be opened: it is missing, in use or not ours."
            )
        self.files: list[Path] = []
        self.fps = _find_fps(self._capture)
        self._name = f"camera {index}"

    def frames(self, skip: Skip) -> Iterator[Frame]:
        yield from _read_frames(self._capture, self._name)
        skip(f"{self._name} gives no more images.")


def _find_fps(capture: cv2.VideoCapture) -> float:
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if math.isfinite(fps) and fps > 0 else _FPS


def _read_frames(capture: cv2.VideoCapture, name: str) -> Iterator[Frame]:
    try:
        for number in itertools.count(1):
            read, pixels = capture.read()
            if not read:
                return
            yield Frame(number, name, pixels)
    finally:
        capture.release()
