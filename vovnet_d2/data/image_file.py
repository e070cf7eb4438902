# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation, checks, pictures and prediction read image files in the same way.

These rules hold for every file:

- The picture is turned as its EXIF orientation says.
- 8 bits per channel are read as Detectron2 reads them. Transparency is dropped.
- Of 16 bits per channel the upper 8 are taken. Detectron2 clips grey values at 255 instead.
- 32 bits per pixel, whole or floating-point numbers, have no known range and are refused.
- A label map gives its numbers as they are stored: the indices of a palette, or grey values.
"""

import os
from dataclasses import dataclass

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image

from ..errors import UserFileNotFoundError, UserValueError, one_line

ORIENTATION = 274  # EXIF's tag
# For each EXIF orientation, the transposition that turns the stored picture upright. Orientation 1
# needs none.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Some versions of Pillow open 16-bit grey values of these formats as 32-bit numbers.
_NEVER_32_BITS = ("PNG", "PPM", "JPEG2000")
# The brands of HEIC in the first box of a file (ISO/IEC 23008-12), and the brands of the container,
# which AVIF has, too.
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_CONTAINER = {b"mif1", b"msf1"}
_MOST_BRANDS = 1000  # a limit for damaged files
_LABEL_MODES = ("1", "L", "P", "PA", "LA", "I")


@dataclass(frozen=True)
class ImageHeader:
    """The header of an image file.

    Attributes:
        stored_size: the width and height of the picture as the file stores it.
        orientation: the orientation of EXIF, 1 to 8; 1 if it is missing or another number.
        bits: the bits of a channel.
    """

    stored_size: tuple[int, int]
    orientation: int = 1
    bits: int = 8

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height of the picture as it is read: turned by its EXIF orientation."""
        width, height = self.stored_size
        return (height, width) if self.orientation >= 5 else (width, height)


def read_header(file: str | os.PathLike[str]) -> ImageHeader:
    """Read the size and orientation of a picture, without its pixels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture, or its header is damaged.
    """
    try:
        with Image.open(file) as picture:
            return _header_of(picture)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        raise _not_a_picture(file, error) from error


def read_image(file: str | os.PathLike[str], format: str = "BGR") -> NDArray[np.uint8]:
    """Read a picture by the rules of this module.

    Args:
        format: ``INPUT.FORMAT``: "BGR" or another that Detectron2 knows.

    Returns:
        (H, W, C), uint8; float64 for "YUV-BT.601".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture or is damaged, or the range of its values is not known.
    """
    path = _require_file(file)
    try:
        with PathManager.open(path, "rb") as stream, Image.open(stream) as picture:
            picture.load()  # first: a second attempt to load damaged pixels would not fail
            header = _header_of(picture)
            turned = _to_8_bits(_turn(picture, header.orientation)) if header.bits <= 16 else None
            pixels = None if turned is None else convert_PIL_to_numpy(turned, format)
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        raise _not_a_picture(path, error) from error
    if pixels is None:
        raise UserValueError(
            f"{path} has 32 bits per pixel, whose range is not known: convert it to 8 or 16."
        )
    return np.ascontiguousarray(pixels)


def _not_a_picture(file: str | os.PathLike[str], error: Exception) -> UserValueError:
    return UserValueError(f"{file} is not a picture that can be read ({_reason(file, error)}).")


def is_heic(file: str | os.PathLike[str]) -> bool:
    """Return whether a file begins as a HEIC picture, which phones write and Pillow does not
    read."""
    try:
        with PathManager.open(os.fspath(file), "rb") as stream:
            size, kind, major, _ = (stream.read(4) for _ in range(4))
            others = min(int.from_bytes(size, "big") // 4 - 4, _MOST_BRANDS)
            compatible = {stream.read(4) for _ in range(others)}
    except OSError:
        return False
    return kind == b"ftyp" and (
        major in _HEIC or (major in _CONTAINER and bool(_HEIC & compatible))
    )


def read_labels(file: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Return a label map (H, W) with the numbers that the file stores: a class for each pixel.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture or is damaged, or its pixels are colours and not numbers.
    """
    path = _require_file(file)
    try:
        with PathManager.open(path, "rb") as stream, Image.open(stream) as picture:
            picture.load()
            labels = _numbers_of(_turn(picture, _header_of(picture).orientation))
    except Exception as error:
        raise UserValueError(f"{path} is not a label map: {_reason(path, error)}.") from error
    return labels.astype(np.int64)


def why_unreadable(file: str | os.PathLike[str], *, labels: bool = False) -> str:
    """Return why :func:`read_image`, or :func:`read_labels`, refuses a file. Return an empty string
    if the file can be read."""
    try:
        (read_labels if labels else read_image)(file)
    except FileNotFoundError:
        return "there is no such file"
    except ValueError as error:
        if isinstance(error.__cause__, Exception):
            return _reason(file, error.__cause__)
        return "it " + str(error).removeprefix(f"{os.fspath(file)} ").rstrip(".")
    return ""


def _require_file(file: str | os.PathLike[str]) -> str:
    path = os.fspath(file)
    if not PathManager.exists(path):
        raise UserFileNotFoundError(f"There is no file {path}.")
    return path


def _header_of(picture: Image.Image) -> ImageHeader:
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # the picture can be read without its EXIF data
        orientation = 1
    bits = 8
    if picture.mode.startswith("I;16"):
        bits = 16
    elif picture.mode in ("I", "F"):
        bits = 16 if picture.format in _NEVER_32_BITS and picture.mode == "I" else 32
    return ImageHeader(picture.size, orientation if orientation in TURNS else 1, bits)


def _turn(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Return the upper 8 of 16 bits. A picture of 8 bits stays as it is."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.int64)
        return Image.fromarray((np.clip(values, 0, 0xFFFF) >> 8).astype(np.uint8))
    return picture


def _numbers_of(picture: Image.Image) -> NDArray[np.generic]:
    mode = picture.mode
    values = np.asarray(picture)
    if mode in _LABEL_MODES or mode.startswith("I;16"):
        return values if values.ndim == 2 else values[..., 0]
    if mode == "F" and np.array_equal(values, np.round(values)):
        return values
    if mode in ("RGB", "RGBA"):
        red, *others = (values[..., channel] for channel in range(3))
        if all(np.array_equal(red, other) for other in others):
            return red  # the file stores each grey value three times
        place = np.argwhere((red != others[0]) | (red != others[1]))[0]
        colours = len(np.unique(values[..., :3].reshape(-1, 3), axis=0))
        raise UserValueError(
            f"its pixels have {colours} colours, for example "
            f"{tuple(values[tuple(place)][:3].tolist())}, and not the numbers of classes: write a "
            "picture of one channel, or with a palette, whose values are the numbers"
        )
    raise UserValueError(f"its pixels are not whole numbers (Pillow's mode {mode})")


def _reason(file: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return (
            "it has more pixels than Pillow reads, as a guard against files that are made to fill "
            "the memory: make it smaller, or set PIL.Image.MAX_IMAGE_PIXELS = None if you trust it"
        )
    if is_heic(file):
        return (
            "it is HEIC, which Pillow does not read: convert it to JPEG or PNG, for example with "
            "ImageMagick or the Python package pillow-heif"
        )
    # Pillow's message for an unknown format names the file object, which says nothing to a user.
    known = {"UnidentifiedImageError": "of no known format"}
    return known.get(type(error).__name__) or one_line(error)
