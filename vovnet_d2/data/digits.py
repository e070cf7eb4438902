# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The embedded digits data set is a small detection set in COCO's format that needs no download.

Real handwritten digits (scikit-learn's ``load_digits``: 1,797 scans of 8x8 cells) are enlarged
smoothly and written over crops of scikit-learn's two photographs. They have ten categories, boxes
and masks. Use the data set to check an installation, a recipe or a change of code within minutes.
Its scores say nothing about other photographs.

The annotations follow these rules:

* **Mask**: the filled outer contour of the glyph, with one polygon per connected part. COCO's
  polygons cannot hold holes, so the inside of a 0, 6, 8 or 9 belongs to the mask. The polygons run
  along the edges of pixels, so that pycocotools gives the mask back exactly.
* **Box**: ``XYWH``, tight around the mask, as ``pycocotools.mask.toBbox`` computes it.
* **Area**: the area of the box. A glyph fills about half of its box. By the area of its mask no
  digit would be "large" in COCO's sense, so one of the three APs by size would be missing.

Glyphs do not hide one another: every mask is visible as a whole.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ..errors import UserValueError
from .digit_images import GLYPH_MARGIN, Digit, Sources, load_sources, make_image
from .workers import attend_to_workers

CLASS_NAMES = tuple("0123456789")

# Raise this number with every change that alters a pixel or an annotation. Then the copies of users
# are built anew.
_VERSION = 1

_FOLDER = "vovnet_d2_digits"

_FEW_IMAGES = 100  # So few images are drawn before workers would have started.

_NUM_DIGITS = 1797  # in scikit-learn's load_digits
_NUM_VAL_DIGITS = 360

# The backgrounds of a split are cut from this part of the width of each photograph.
_PHOTO_PARTS = {"train": (0.0, 0.66), "val": (0.69, 1.0)}


def digit_split() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices into ``sklearn.datasets.load_digits`` of the training and the validation
    digits.

    The split is random and always the same, whatever the seed of a build. So a classifier that was
    trained on the first part has not seen a digit of the validation images.
    """
    order = np.random.default_rng(_NUM_DIGITS).permutation(_NUM_DIGITS)
    return np.sort(order[_NUM_VAL_DIGITS:]), np.sort(order[:_NUM_VAL_DIGITS])


def build_digits(
    root: str | os.PathLike[str],
    *,
    num_train: int = 1000,
    num_val: int = 200,
    image_size: int = 192,
    digits_per_image: tuple[int, int] = (2, 5),
    digit_size: tuple[int, int] = (16, 112),
    seed: int = 0,
) -> Path:
    """Make the data set under ``root/vovnet_d2_digits`` unless it is there already.

    It holds ``train/*.png``, ``val/*.png`` and ``annotations/instances_{train,val}.json``. The
    same arguments give the same pixels; image *i* of a split depends on neither the number of
    images nor the other images. A data set that was made with other arguments is replaced, unless
    somebody has changed it. Several processes may call this at once: one builds, the others wait.
    The folder appears under its name only when it is complete.

    Args:
        root: the folder of data sets. The folder is made if it is missing.
        num_train, num_val: the number of images per split.
        image_size: the side of the square images, in pixels.
        digits_per_image: the least and greatest number of digits in an image, drawn uniformly.
        digit_size: the least and greatest height of a glyph's box in pixels. The height is drawn
            log-uniformly, and the box is at most one pixel higher or lower.
        seed: the seed of everything but the split of the digits, see :func:`digit_split`.

    Returns:
        ``root/vovnet_d2_digits``.

    Raises:
        ValueError: an argument is out of range, the digits do not fit on the image, ``root``
            cannot be written to, or somebody has changed the folder.
    """
    layout: dict[str, Any] = {
        "image_size": image_size,
        "digits_per_image": list(digits_per_image),
        "digit_size": list(digit_size),
    }
    counts = {"train": num_train, "val": num_val}
    _check_arguments(counts, seed, **layout)
    recipe = {"version": _VERSION, "images": counts, "layout": layout, "seed": seed}
    target = Path(root) / _FOLDER
    if _is_current(target, recipe):
        return target
    from iopath.common.file_io import file_lock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(target)):
            if not _is_current(target, recipe):
                _replace(target, recipe)
    except OSError as error:
        raise UserValueError(
            f"Cannot write the digits data set to '{target}' ({error.strerror or error}): "
            "set DETECTRON2_DATASETS to a folder that can be written to."
        ) from error
    return target


def register_digits() -> None:
    """Register ``digits_train`` and ``digits_val`` with Detectron2; a second call does nothing.

    The data set lies under ``$DETECTRON2_DATASETS`` (by default ``./datasets``, as for Detectron2's
    data sets). It is built when one of the two is first loaded.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for split in _PHOTO_PARTS:
        name = f"digits_{split}"
        if name in DatasetCatalog:
            continue
        MetadataCatalog.get(name).set(
            thing_classes=list(CLASS_NAMES),
            # Otherwise the ids would be known only after loading, which builds the data set.
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASS_NAMES))},
            evaluator_type="coco",
            json_file=str(root / _FOLDER / "annotations" / f"instances_{split}.json"),
            image_root=str(root / _FOLDER / split),
        )
        DatasetCatalog.register(name, functools.partial(_load_registered, name, root))


def _load_registered(name: str, root: Path) -> list[dict[str, Any]]:
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    build_digits(root)
    metadata = MetadataCatalog.get(name)
    return load_coco_json(metadata.json_file, metadata.image_root, name)


def _check_arguments(
    counts: dict[str, int],
    seed: int,
    image_size: int,
    digits_per_image: list[int],
    digit_size: list[int],
) -> None:
    for split, count in counts.items():
        if count < 1:
            raise UserValueError(f"num_{split} must be at least 1, not {count}.")
    if seed < 0:
        raise UserValueError(f"seed must be at least 0, not {seed}.")
    fewest, most = digits_per_image
    if not 1 <= fewest <= most:
        raise UserValueError(
            "digits_per_image must be two numbers (least, greatest) of at least 1, "
            f"not ({fewest}, {most})."
        )
    smallest, largest = digit_size
    limit = image_size - 2 * GLYPH_MARGIN
    if not 8 <= smallest <= largest <= limit:
        raise UserValueError(
            f"digit_size must be two heights (least, greatest) from 8 to {limit} pixels on images "
            f"of {image_size} pixels, not ({smallest}, {largest})."
        )


def _is_current(target: Path, recipe: dict[str, Any]) -> bool:
    return _read_made(target).get("recipe") == recipe


def _read_made(folder: Path) -> dict[str, Any]:
    """Return the recipe and the digest that :func:`_write` left in a folder, or an empty dict."""
    try:
        made = json.loads((folder / "recipe.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}


def _digest(folder: Path) -> str:
    """Return a digest of the names and contents of all files in a folder except its recipe."""
    digest = hashlib.sha256()
    files = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    for path in files:
        if path != folder / "recipe.json":
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()


def _replace(target: Path, recipe: dict[str, Any]) -> None:
    """Build the data set in a folder next to ``target``, then rename this folder. The caller holds
    the lock."""
    if os.path.lexists(target):
        _require_unchanged(target)
    prefix = f".{_FOLDER}.build-"
    for leftover in target.parent.glob(f"{prefix}*"):  # what a killed build left behind
        shutil.rmtree(leftover, ignore_errors=True)
    workplace = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        _write(workplace / "new", recipe)
        if target.exists():
            target.rename(workplace / "old")
        (workplace / "new").rename(target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _require_unchanged(target: Path) -> None:
    if _read_made(target).get("digest") != _digest(target):
        raise UserValueError(
            f"{target} was changed after this package had made it. A digits data set with other "
            "arguments, or of another version of the package, would replace it: move the folder "
            "away, or set DETECTRON2_DATASETS to another one."
        )


class _Images(Dataset[tuple[NDArray[np.uint8], list[Digit]] | UserValueError]):
    """The images of a split, each drawn when it is asked for, from a seed of its own."""

    def __init__(self, split: str, sources: Sources, recipe: dict[str, Any]):
        self._part = _PHOTO_PARTS[split]
        number = list(_PHOTO_PARTS).index(split)
        self._digits = digit_split()[number]
        self._seed = [recipe["seed"], number]
        self._count = recipe["images"][split]
        self._layout = recipe["layout"]
        self._sources = sources

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], list[Digit]] | UserValueError:
        rng = np.random.default_rng([*self._seed, index])
        try:
            return make_image(self._sources, self._digits, self._part, rng, **self._layout)
        except UserValueError as error:
            return error  # raised in a worker, it would get the message of a traceback


def _write(folder: Path, recipe: dict[str, Any]) -> None:
    from PIL import Image
    from tqdm import tqdm

    sources = load_sources()
    (folder / "annotations").mkdir(parents=True)
    with tqdm(
        total=sum(recipe["images"].values()),
        desc="Building the digits data set",
        unit="image",
        delay=2,
        mininterval=1,
    ) as progress:
        for split in _PHOTO_PARTS:
            (folder / split).mkdir()
            contents = []
            for index, image in enumerate(_load(_Images(split, sources, recipe))):
                if isinstance(image, UserValueError):
                    raise image
                pixels, drawn = image
                # Stronger compression would take longer than everything else here.
                Image.fromarray(pixels).save(folder / split / _file_name(index), compress_level=1)
                contents.append(drawn)
                progress.update()
            path = folder / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(_to_coco(contents, recipe["layout"]["image_size"])))
    made = {"recipe": recipe, "digest": _digest(folder)}
    (folder / "recipe.json").write_text(json.dumps(made, indent=2) + "\n")


def _load(images: _Images) -> DataLoader[Any]:
    """Return the images in their order. Worker processes draw them if they are many."""
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=_count_workers(len(images)),
        generator=torch.Generator(),  # so that no random number of the caller is used up
    )
    return attend_to_workers(loader)


def _count_workers(images: int) -> int:
    """Return the number of workers. There are none where a worker would take long to start, or
    where Python forbids processes of a process."""
    method = multiprocessing.get_start_method(allow_none=True)
    if (method or multiprocessing.get_all_start_methods()[0]) != "fork":
        return 0
    if images <= _FEW_IMAGES or multiprocessing.current_process().daemon:
        return 0
    if hasattr(os, "sched_getaffinity"):
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)


def _unchanged(image: Any) -> Any:
    return image


def _file_name(index: int) -> str:
    return f"{index:06d}.png"


def _to_coco(contents: list[list[Digit]], image_size: int) -> dict[str, Any]:
    """Return the content of the annotation file of a split.

    All ids count from 1: pycocotools takes an annotation with id 0 for a missing one, and
    Detectron2 expects the first category to have id 1.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, digits in enumerate(contents):
        images.append(
            {
                "id": index + 1,
                "file_name": _file_name(index),
                "height": image_size,
                "width": image_size,
            }
        )
        for digit in digits:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": digit.label + 1,
                    "bbox": digit.box,
                    "area": digit.box[2] * digit.box[3],
                    "segmentation": digit.polygons,
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": "Handwritten digits on photographs"},
        "licenses": [],
        "categories": [
            {"id": label + 1, "name": name, "supercategory": "digit"}
            for label, name in enumerate(CLASS_NAMES)
        ],
        "images": images,
        "annotations": annotations,
    }
