# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Write drawn pictures to files, to a video or to a window."""

import logging
import os
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import cv2
import numpy as np

from ..errors import UserValueError
from ..folders import list_missing, remove_empty
from ..made import note_made, refuse_foreign
from .inputs import PICTURE_SUFFIXES, Frame, Picture

logger = logging.getLogger(__name__)

# The codecs for each suffix of a video. The first codec that OpenCV can write is taken. Browsers
# play avc1 (H.264), which many packages of OpenCV cannot write.
_H264 = ("avc1", "mp4v")
_CODECS = {".mp4": _H264, ".avi": ("MJPG",), ".mkv": _H264, ".mov": _H264, ".webm": ("VP80",)}


class Sink(AbstractContextManager["Sink"]):
    @abstractmethod
    def write(self, frame: Frame, drawn: np.ndarray) -> bool:
        """Take the drawn picture (H, W, 3), BGR, of a frame. Return False to stop the run."""


# Files to write


def plan_pictures(output: str, pictures: Sequence[Picture]) -> list[Path]:
    """Return the file for the result of each picture.

    Args:
        output: a file if there is one picture, or a folder.
        pictures: the inputs. In a folder they keep their names, and get .png in addition
            where they are of a kind that is not written; equal names get a number.

    Raises:
        ValueError: ``output`` is a file, and there are several pictures.
    """
    folder = Path(output)
    if folder.suffix.lower() in PICTURE_SUFFIXES and not folder.is_dir():
        if len(pictures) > 1:
            raise UserValueError(
                f"--output {output} is one picture and there are {len(pictures)} inputs: name a "
                "folder."
            )
        return [folder]
    targets: dict[Path, None] = {}
    for picture in pictures:
        target = folder / picture.relative
        if target.suffix.lower() not in PICTURE_SUFFIXES:
            target = target.with_name(target.name + ".png")
        stem, number = target.stem, 2
        while target in targets:
            target = target.with_name(f"{stem}_{number}{target.suffix}")
            number += 1
        targets[target] = None
    return list(targets)


def plan_video(output: str, name: str) -> Path:
    """Return the file for a video: ``output``, or ``name`` with .mp4 in that folder."""
    path = Path(output)
    if path.suffix.lower() in _CODECS and not path.is_dir():
        return path
    return path / f"{name}.mp4"


def refuse_overwriting(targets: Sequence[Path], inputs: Iterable[Path]) -> None:
    """Raise ValueError if a target is one of the inputs, also under another name, or another file
    that this package did not make.
    """
    read = {_identity(path) for path in inputs if path.exists()}
    for target in targets:
        if target.exists() and _identity(target) in read:
            raise UserValueError(
                f"{target} is an input, and would be overwritten: name another file."
            )
    refuse_foreign(targets)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _make_folder(path: Path) -> list[Path]:
    """Make a folder. Return the folders that did not exist before, the deepest first."""
    missing = list_missing(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_empty(missing)
        raise UserValueError(f"The folder {path} cannot be made ({error.strerror}).") from error
    return missing


# Sinks


class PictureFiles(Sink):
    """Writes one file for each picture."""

    def __init__(self, targets: Sequence[Path]):
        """Make the folders of the files, which are in the order of the inputs. Raise ValueError if
        a folder cannot be made."""
        self._targets, self._made = targets, list[Path]()
        try:
            for folder in dict.fromkeys(target.parent for target in targets):
                self._made = [*_make_folder(folder), *self._made]
        except UserValueError:
            remove_empty(self._made)
            raise

    def __exit__(self, *error: object) -> None:
        """Remove the folders that got no file. The files are complete already."""
        remove_empty(self._made)

    def write(self, frame: Frame, drawn: np.ndarray) -> bool:
        """Write a picture. Raise ValueError if the file cannot be written."""
        target = self._targets[frame.number - 1]
        if not cv2.imwrite(str(target), drawn):
            raise UserValueError(f"{target} cannot be written.")
        note_made(target)
        return True


class VideoFile(Sink):
    """Writes a video, which is complete as soon as it is closed."""

    def __init__(self, path: Path, *, fps: float, codec: str | None = None):
        """
        Args:
            path: the file; its suffix names the container.
            fps: frames per second.
            codec: four characters; by default the best codec of the container that works here.

        Raises:
            ValueError: the codec has not four characters, or the folder cannot be made.
        """
        codecs = (codec,) if codec else _CODECS[path.suffix.lower()]
        if len(codecs[0]) != 4:
            raise UserValueError(
                f"--codec {codec!r} must be four characters, such as mp4v or MJPG."
            )
        self._made = _make_folder(path.parent)
        self._path, self._fps, self._codecs = path, fps, codecs
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def __exit__(self, *error: object) -> None:
        if self._writer:
            self._writer.release()
            note_made(self._path)
        remove_empty(self._made)

    def write(self, frame: Frame, drawn: np.ndarray) -> bool:
        """Write a frame. Raise ValueError if the video cannot be written."""
        if self._writer is None:
            height, width = drawn.shape[:2]
            self._size = (width, height)
            self._writer = self._open()
        width, height = self._size
        if drawn.shape[:2] != (height, width):  # some cameras and streams change their size
            drawn = cv2.resize(drawn, self._size)
        # OpenCV's writer would leave out the last row or column of an odd number.
        drawn = cv2.copyMakeBorder(drawn, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        self._writer.write(drawn)
        return True

    def _open(self) -> cv2.VideoWriter:
        width, height = self._size
        even = (width + width % 2, height + height % 2)
        if even != self._size:
            logger.warning(
                "Codecs want even numbers of pixels: the video is %dx%d, not %dx%d, with its last "
                "column or row repeated.",
                *(*even, *self._size),
            )
        *better, last = self._codecs
        for codec in better:
            with _quiet_opencv():
                writer = self._try(codec, even)
            if writer.isOpened():
                return writer
            logger.warning(
                "%s is written with codec %s, as this OpenCV cannot write H.264. Browsers do not "
                "play it: for them, name a .webm file.",
                *(self._path, last),
            )
        writer = self._try(last, even)
        if not writer.isOpened():
            raise UserValueError(
                f"OpenCV cannot write {self._path} with codec {last}: choose --codec mp4v for "
                ".mp4, or MJPG for .avi."
            )
        return writer

    def _try(self, codec: str, size: tuple[int, int]) -> cv2.VideoWriter:
        return cv2.VideoWriter(str(self._path), cv2.VideoWriter.fourcc(*codec), self._fps, size)


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Keep OpenCV from logging an error that is expected."""
    log = getattr(cv2.utils, "logging", None)
    if log is None:  # in OpenCV 4
        yield
        return
    before = log.getLogLevel()
    log.setLogLevel(log.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        log.setLogLevel(before)


class Window(Sink):
    """Shows one picture after the other; q or Escape ends the run."""

    def __init__(self, *, wait: bool):
        """Open a window. With ``wait``, each picture is shown until a key is pressed. Raise
        ValueError if there is no screen, or if OpenCV was built without windows."""
        self._wait = wait
        self._title = "vovnet_d2"
        # OpenCV aborts the process where there is no display.
        displays = ("DISPLAY", "WAYLAND_DISPLAY")
        if sys.platform.startswith("linux") and not any(map(os.environ.get, displays)):
            raise UserValueError("--show needs a screen, and there is none here: name an --output.")
        try:
            cv2.namedWindow(self._title, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise UserValueError(
                "--show needs an OpenCV that can open windows: pip install opencv-python in the "
                "place of opencv-python-headless, or name an --output."
            ) from error

    def __exit__(self, *error: object) -> None:
        cv2.destroyWindow(self._title)

    def write(self, frame: Frame, drawn: np.ndarray) -> bool:
        cv2.imshow(self._title, drawn)
        return cv2.waitKey(0 if self._wait else 1) & 0xFF not in (27, ord("q"))
