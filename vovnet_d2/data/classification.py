# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets for classifiers: folders of images, CIFAR-10 in a folder, and the embedded digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import find_classes

from ..errors import UserFileNotFoundError, UserValueError
from .digit_images import load_sources
from .digits import CLASS_NAMES, digit_split
from .image_file import read_image

SPLITS = ("train", "val")

Transform = Callable[[Image.Image], Any]


def class_names(data: str, split: str) -> list[str]:
    """Return the names of the classes, in the order of their numbers. For the arguments and the
    errors see :func:`build_classification_dataset`."""
    kind = _kind(data, split)
    if kind == "digits":
        return list(CLASS_NAMES)
    if kind == "cifar10":
        return list(_open_cifar10(data, "val").classes)  # the smaller split
    return find_classes(_split_folder(data, split))[0]


def build_classification_dataset(
    data: str, split: str, transform: Transform | None = None, *, image_size: int = 64
) -> Dataset:
    """Build a data set of images and classes for torch's loaders.

    Args:
        data: "digits", or a folder. The folder holds a folder for each split, which holds a folder
            of images for each class (ImageNet's layout), or it holds ``cifar-10-batches-py``.
        split: "train" or "val"; in ImageNet's layout the name of a folder.
        transform: the function that is applied to each image, an RGB image of Pillow.
        image_size: the side of the digits' images in pixels.

    Returns:
        pairs of an image and the number of its class. The attribute ``classes`` has the names.

    Raises:
        FileNotFoundError: the folder or what it should hold is missing.
        ValueError: there is no such split.
    """
    kind = _kind(data, split)
    if kind == "digits":
        return _Digits(split, transform, image_size)
    if kind == "cifar10":
        return _open_cifar10(data, split, transform)
    folder = _split_folder(data, split)
    try:
        return ImageFolder(folder, transform, loader=_read_image)
    except FileNotFoundError as error:
        raise UserFileNotFoundError(f"{folder}: {error}") from error


def _kind(data: str, split: str) -> str:
    if data != "digits" and not (Path(data) / CIFAR10.base_folder).is_dir():
        return "folders"
    if split not in SPLITS:
        raise UserValueError(f"{data} has no split {split!r}: choose from {', '.join(SPLITS)}.")
    return "digits" if data == "digits" else "cifar10"


def _open_cifar10(data: str, split: str, transform: Transform | None = None) -> CIFAR10:
    try:
        return CIFAR10(data, train=split == "train", transform=transform)
    except RuntimeError as error:
        raise UserFileNotFoundError(
            f"{data}/{CIFAR10.base_folder} is incomplete or damaged: unpack "
            f"{CIFAR10.filename} there again."
        ) from error


def _split_folder(data: str, split: str) -> Path:
    folder = Path(data) / split
    if not Path(data).is_dir():
        raise UserFileNotFoundError(
            f"There is no folder {Path(data).absolute()}: give a folder of images, or 'digits' for "
            "the embedded data."
        )
    if not folder.is_dir():
        inside = sorted(path.name for path in Path(data).iterdir())
        raise UserFileNotFoundError(
            f"{data} has no folder {split!r}, but {', '.join(inside[:5]) or 'nothing'}. It should "
            "hold train and val with a folder of images for each class, as ImageNet's does, or "
            f"{CIFAR10.base_folder}, which CIFAR-10's archive unpacks to."
        )
    if not any(path.is_dir() for path in folder.iterdir()):
        raise UserFileNotFoundError(
            f"{folder} has no folders: it must hold a folder of images for each class, as train "
            "does."
        )
    return folder


def _read_image(path: str) -> Image.Image:
    try:
        return Image.fromarray(read_image(path, "RGB"))
    except (OSError, ValueError) as error:
        raise UserValueError(f"{path} cannot be read as an image: delete it. {error}") from error


class _Digits(Dataset):
    """The digits of scikit-learn, enlarged, in the same split as in the detection data set."""

    classes = CLASS_NAMES

    def __init__(self, split: str, transform: Transform | None, image_size: int):
        sources = load_sources()
        indices = digit_split()[SPLITS.index(split)]
        self.images = [_enlarge(scan, image_size) for scan in sources.scans[indices]]
        self.targets = [int(label) for label in sources.labels[indices]]
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return self.transform(image) if self.transform else image, self.targets[index]

    def __len__(self) -> int:
        return len(self.images)


def _enlarge(scan: NDArray[np.float64], image_size: int) -> Image.Image:
    """Return a scan (8, 8) in [0, 1] as a square image, bright on black, with an empty border."""
    cells = np.rint(255 * np.pad(scan, 1)).astype(np.uint8)
    image = Image.fromarray(cells).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return image.convert("RGB")
