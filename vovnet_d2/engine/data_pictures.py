# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a data set: its annotations, what training makes of them, and results on it."""

from __future__ import annotations

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
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Boxes, BoxMode
from detectron2.utils.visualizer import VisImage, Visualizer
from numpy.typing import NDArray
from PIL import Image

from ..checkpoint.atomic import atomic_write
from ..data.check.files import resolve_inside
from ..data.image_file import read_image
from ..data.label_colors import with_stuff_colors
from ..data.unreadable import image_roots
from ..made import note_made, refuse_foreign
from .checks import load_records
from .pictures import drawable, enlargement
from .plain_text import plain_text
from .trainer import Trainer

__all__ = [
    "Drawn",
    "draw_annotations",
    "draw_results",
    "draw_training_samples",
    "write_contact_sheet",
    "write_pictures",
]

logger = logging.getLogger(__name__)

_COLUMNS = 4
_SHEET_WIDTH = 16.0  # inches
_TALLEST = 4.0  # height over width of the place of a picture
_MAX_UNREADABLE = 1000


class Drawn(NamedTuple):
    """
    Attributes:
        name: what the picture is of: a file's name.
        pixels: (H, W, 3), uint8, RGB.
    """

    name: str
    pixels: NDArray[np.uint8]


def draw_annotations(name: str, *, number: int) -> Iterator[Drawn]:
    """
    Args:
        name: a registered data set.
        number: how many images, spread evenly over the set; those that cannot be read are named in
            the log and skipped.
    """
    metadata = MetadataCatalog.get(name)
    for record, image in _read(name, _spread(load_records(name), number)):
        yield Drawn(record["file_name"], _draw_record(record, image, metadata))


def draw_training_samples(cfg: CfgNode, *, number: int) -> Iterator[Drawn]:
    """The first samples of a training, as the Trainer's loader gives them to the network: cropped,
    resized, flipped, ..., with what is left of the annotations."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.MAX_UNREADABLE = _MAX_UNREADABLE
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    samples = (sample for batch in Trainer.build_train_loader(cfg) for sample in batch)
    for sample in islice(samples, number):
        pixels = sample["image"].permute(1, 2, 0).numpy()
        image = convert_image_to_rgb(pixels, cfg.INPUT.FORMAT)
        yield Drawn(sample["file_name"], _draw_sample(sample, image, metadata))


def draw_results(name: str, file: Path, *, number: int, min_score: float) -> Iterator[Drawn]:
    """What is annotated, and to the right of it what was found.

    Args:
        name: a registered data set.
        file: results in COCO's format on it, such as
            ``OUTPUT_DIR/inference/coco_instances_results.json``.
        number: as in :func:`draw_annotations`, of the images that have results.
        min_score: least score of what is drawn.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not that, or its images or categories are not the data set's.
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
    for record, image in _read(name, _spread([records[i] for i in sorted(by_image)], number)):
        truth = _draw_record(record, image, metadata)
        results = _draw_found(by_image[record["image_id"]], _canvas(image, metadata), metadata)
        yield Drawn(record["file_name"], np.concatenate([truth, results], axis=1))


def _spread(records: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    count = min(number, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _read(
    name: str, records: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], NDArray[np.uint8]]]:
    """Records of a data set with their images, RGB."""
    for record in records:
        try:
            for root in image_roots([name]):
                resolve_inside(root, os.path.abspath(record["file_name"]))
            image = read_image(record["file_name"], "RGB")
            found = drawable(record, image), image
        except (FileNotFoundError, ValueError) as error:
            logger.warning("Skipped: %s", error)
        else:
            yield found


def _canvas(image: NDArray[np.uint8], metadata: Metadata) -> Visualizer:
    return Visualizer(image, with_stuff_colors(metadata), scale=enlargement(image))


def _pixels(drawn: VisImage) -> NDArray[np.uint8]:
    return np.asarray(drawn.get_image()[:, :, :3])


# What is drawn


@plain_text()
def _draw_record(
    record: dict[str, Any], image: NDArray[np.uint8], metadata: Metadata
) -> NDArray[np.uint8]:
    return _pixels(_canvas(image, metadata).draw_dataset_dict(record))


@plain_text()
def _draw_sample(
    sample: dict[str, Any], image: NDArray[np.uint8], metadata: Metadata
) -> NDArray[np.uint8]:
    canvas = _canvas(image, metadata)
    if "sem_seg" in sample:
        canvas.draw_sem_seg(sample["sem_seg"], area_threshold=0, alpha=0.5)
    if "instances" in sample:
        fields = sample["instances"].get_fields()
        canvas.overlay_instances(
            labels=[metadata.thing_classes[number] for number in fields["gt_classes"].tolist()],
            boxes=fields["gt_boxes"],
            masks=fields.get("gt_masks"),
            keypoints=fields.get("gt_keypoints"),
        )
    return _pixels(canvas.get_output())


@plain_text()
def _draw_found(
    results: list[dict[str, Any]], canvas: Visualizer, metadata: Metadata
) -> NDArray[np.uint8]:
    boxes = [BoxMode.convert(r["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for r in results]
    labels = [f"{metadata.thing_classes[r['category_id']]} {r['score']:.0%}" for r in results]
    masks = [result.get("segmentation") for result in results]
    drawn = canvas.overlay_instances(
        labels=labels,
        boxes=Boxes(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
        masks=masks if results and all(masks) else None,
    )
    return _pixels(drawn)


def _read_results(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    keys = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(results, list) or not all(
        isinstance(result, dict) and keys <= result.keys() for result in results
    ):
        raise ValueError(
            f"{file} is not in COCO's results format: a list of objects with {sorted(keys)}."
        )
    return results


def _require_known(
    file: Path, name: str, key: str, results: list[dict[str, Any]], known: Any
) -> None:
    for result in results:
        if result[key] not in known:
            raise ValueError(
                f"{file} has {key} {result[key]!r}, which {name} does not have: the results are of "
                "another data set."
            )


# Where it goes


def write_pictures(folder: Path, drawn: Iterator[Drawn]) -> int:
    """One file for each picture, numbered in their order.

    Returns:
        how many.

    Raises:
        ValueError: a file exists, and this package did not make it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for count, (name, pixels) in enumerate(drawn, start=1):
        path = folder / f"{count:03d}_{Path(name).stem}.png"
        refuse_foreign([path])
        Image.fromarray(pixels).save(path)
        note_made(path)
    return count


def write_contact_sheet(file: Path, drawn: Iterator[Drawn]) -> int:
    """All pictures in one, with the names of the files.

    Returns:
        how many.

    Raises:
        ValueError: the file exists, and this package did not make it.
    """
    refuse_foreign([file])
    from matplotlib.figure import Figure  # draws without a display, unlike pyplot

    pictures = list(drawn)
    if not pictures:
        return 0
    ratio = float(np.mean([pixels.shape[0] / pixels.shape[1] for _, pixels in pictures]))
    ratio = min(ratio, _TALLEST)
    columns = max(1, round(_COLUMNS * min(1.0, ratio / 0.75)))  # fewer of two pictures side by side
    rows = -(-len(pictures) // columns)
    size = (_SHEET_WIDTH, rows * (_SHEET_WIDTH / columns * ratio + 0.3))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, (name, pixels) in zip(panels.flat, pictures, strict=False):
        panel.imshow(pixels)
        # Names of files may have bytes that are no character.
        title = Path(name).name.encode(errors="backslashreplace").decode()
        panel.set_title(title, fontsize=9, parse_math=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        figure.savefig(partial, dpi=120, format=file.suffix[1:].lower())
    return len(pictures)
