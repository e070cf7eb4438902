# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Image files are found by their names, and read."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ...errors import UserValueError, one_line
from ..image_file import ImageHeader, read_header, read_image

_DARK = 16  # values of 12 bits are below this in the upper 8 of 16 bits
# Thumbnails of less contrast look alike, whatever they show.
_FLAT = 4.0


@dataclass(frozen=True)
class ImageFile(ImageHeader):
    """An image file whose pixels were read.

    Attributes:
        problem: why the file cannot be read; empty if it can.
        dark: True if a picture of 16 bits has only values of up to 12 bits.
        digest: the SHA-256 of the bytes.
        look: 256 bits as 4 words. Pictures that look alike have equal or almost equal bits. None
            for pictures without contrast.
    """

    problem: str = ""
    dark: bool = False
    digest: str = ""
    look: NDArray[np.uint64] | None = None


def resolve_inside(root: str | os.PathLike[str], name: str) -> str:
    """Return the file of an image by its ``file_name`` in an annotation file, relative to ``root``.

    Only the name is checked. A symbolic link may lead anywhere, as the user has made it: DVC,
    git-annex and shared folders of clusters do so.

    Raises:
        ValueError: the name leads out of ``root`` by ".." or as an absolute path, or is no path.
    """
    if "\0" in name:
        raise UserValueError(f"file_name {name!r} is no path.")
    folder, parts = os.path.realpath(root), Path(name).parts
    # The system resolves a link before it takes a ".." behind the link.
    resolved = 1 + max((index for index, part in enumerate(parts) if part == ".."), default=-1)
    head = os.path.join(folder, *parts[:resolved])
    path = Path(os.path.realpath(head) if resolved else head, *parts[resolved:])
    if not any(path.is_relative_to(inside) for inside in (folder, os.path.abspath(root))):
        raise UserValueError(
            f"file_name {name!r} leads out of the image folder {root}, to {path}: it is not read."
        )
    return str(path)


def inspect_files(paths: Iterable[str], title: str) -> Mapping[str, ImageFile]:
    """Read each file as training does, several at a time. A progress bar has the title."""
    unique = list(dict.fromkeys(paths))
    # Decoding and hashing let other threads run.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(_inspect, unique)
        progress = tqdm(found, title, len(unique), unit="image", delay=1, mininterval=1)
        return dict(zip(unique, progress, strict=True))


def _inspect(path: str) -> ImageFile:
    try:
        header = read_header(path)
        pixels = read_image(path, "RGB")
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        return ImageFile((0, 0), problem=one_line(error))
    dark = header.bits > 8 and is_dark(pixels)
    return ImageFile(**vars(header), dark=dark, digest=digest, look=_look(pixels))


def is_dark(pixels: NDArray[np.uint8]) -> bool:
    """Return True if the upper 8 of 16 bits are as dark as in a picture of 12-bit values."""
    return int(pixels.max()) < _DARK


def _look(pixels: NDArray[np.uint8]) -> NDArray[np.uint64] | None:
    """Return the signs of the horizontal differences in a thumbnail of 17 x 16 greys ("dHash")."""
    small = Image.fromarray(pixels).convert("L").resize((17, 16), Image.Resampling.BOX)
    greys = np.asarray(small, dtype=float)
    if greys.std() < _FLAT:
        return None
    return np.packbits(greys[:, 1:] > greys[:, :-1]).view(np.uint64)
