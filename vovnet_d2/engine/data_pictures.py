# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a data set: its annotations, what training makes of them, and results on it."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from numpy.typing import NDArray
from PIL import Image

from ..data.check.files import resolve_inside
from ..data.image_file import read_image
from ..data.record_files import spread
from ..data.unreadable import image_roots
from ..drawing.artist import Artist
from ..drawing.sheet import enlargement, write_sheet
from ..drawing.shown import from_record, from_results, from_sample
from ..errors import UserFileNotFoundError, UserValueError
from ..made import note_made, refuse_foreign
from .registered_data import load_records
from .trainer import Trainer

logger = logging.getLogger(__name__)

_MAX_UNREADABLE = 1000


class Drawn(NamedTuple):
    """Holds a picture of an image with its annotations.

    Attributes:
        name: the name of the file that the picture shows.
        pixels: (H, W, 3), uint8, RGB.
    """

    name: str
    pixels: NDArray[np.uint8]


def draw_annotations(name: str, *, number: int) -> Iterator[Drawn]:
    """Draw the annotations of a number of images, spread evenly over a registered data set. Images
    that cannot be read are named in the log and skipped."""
    for record, _, drawn in _draw_records(name, spread(load_records(name), number)):
        yield Drawn(record["file_name"], drawn[:, :, ::-1])


def draw_training_samples(cfg: CfgNode, *, number: int) -> Iterator[Drawn]:
    """Draw the first samples of a training, as the network gets them from the loader.

    They are cropped, resized and flipped, with the annotations that are left.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.MAX_UNREADABLE = _MAX_UNREADABLE
    artist = Artist(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]))
    samples = (sample for batch in Trainer.build_train_loader(cfg) for sample in batch)
    for sample in islice(samples, number):
        pixels = sample["image"].permute(1, 2, 0).numpy()
        image = convert_image_to_rgb(pixels, cfg.INPUT.FORMAT)
        drawn = artist.draw(image[:, :, ::-1], from_sample(sample), scale=enlargement(image))
        yield Drawn(sample["file_name"], drawn[:, :, ::-1])


def draw_results(name: str, file: Path, *, number: int, min_score: float) -> Iterator[Drawn]:
    """Draw the annotations of images, and to the right of each the detections.

    Args:
        name: a registered data set.
        file: results in COCO's format on it, such as
            ``OUTPUT_DIR/inference/coco_instances_results.json``.
        number: the number of images, among those that have results; see :func:`draw_annotations`.
        min_score: the least score of the detections that are drawn.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another format, or its images or categories are not the data set's.
    """
    records = {record["image_id"]: record for record in load_records(name)}
    metadata = MetadataCatalog.get(name)
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {
        number: number for number in range(len(metadata.thing_classes))
    }
    found = _read_results(file)
    _require_known(file, name, "image_id", found, records)
    _require_known(file, name, "category_id", found, ids)
    by_image: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in found:
        shown = by_image[result["image_id"]]
        if result["score"] >= min_score:
            shown.append(result | {"category_id": ids[result["category_id"]]})
    artist = Artist(metadata)
    chosen = spread([records[i] for i in sorted(by_image)], number)
    for record, image, truth in _draw_records(name, chosen):
        results = from_results(by_image[record["image_id"]], image.shape[:2], metadata)
        drawn = artist.draw(image, results, scale=enlargement(image))
        yield Drawn(record["file_name"], np.concatenate([truth, drawn], axis=1)[:, :, ::-1])


def _draw_records(
    name: str, records: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield records of a data set, their images, and the images with the annotations drawn, in
    BGR."""
    metadata = MetadataCatalog.get(name)
    artist = Artist(metadata)
    for record in records:
        try:
            for root in image_roots([name]):
                resolve_inside(root, os.path.abspath(record["file_name"]))
            image = read_image(record["file_name"])
            shown = from_record(record, image.shape[:2], metadata)
        except (FileNotFoundError, ValueError) as error:
            logger.warning("Skipped: %s", error)
        else:
            yield record, image, artist.draw(image, shown, scale=enlargement(image))


def _read_results(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise UserFileNotFoundError(f"There is no file {file}.")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserValueError(f"{file} is not JSON: {error}.") from error
    keys = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(results, list) or not all(
        isinstance(result, dict) and keys <= result.keys() for result in results
    ):
        raise UserValueError(
            f"{file} is not in COCO's results format: a list of objects with {sorted(keys)}."
        )
    return results


def _require_known(
    file: Path, name: str, key: str, results: list[dict[str, Any]], known: Any
) -> None:
    for result in results:
        if result[key] not in known:
            raise UserValueError(
                f"{file} has {key} {result[key]!r}, which {name} does not have: the results are of "
                "another data set."
            )


# Output


def write_pictures(folder: Path, drawn: Iterator[Drawn]) -> int:
    """Write one file for each picture, numbered in their order, and return their number. Raise
    ValueError if a file exists and this package did not make it."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for count, (name, pixels) in enumerate(drawn, start=1):
        path = folder / f"{count:03d}_{Path(name).stem}.png"
        refuse_foreign([path])
        Image.fromarray(pixels).save(path)
        note_made(path)
    return count


def write_contact_sheet(file: Path, drawn: Iterator[Drawn]) -> int:
    """Write one picture with all pictures in it, and the names of the files. Return their number.
    Raise ValueError if the file exists and this package did not make it."""
    refuse_foreign([file])
    pictures = [(Path(name).name, pixels) for name, pixels in drawn]
    if pictures:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sheet(file, pictures)
    return len(pictures)
