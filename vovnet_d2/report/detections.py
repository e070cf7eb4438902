# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The predictions of an evaluation, and the annotations that they are compared with."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pycocotools.coco import COCO

from ..data.own import match_categories
from ..errors import UserFileNotFoundError, UserValueError, describe
from ..words import suggest_path
from .run_folder import MissingPart, RunFolder, read_run


@dataclass(frozen=True)
class Detections:
    """Holds the predictions of a run, with the annotations of the same images.

    Attributes:
        truth: the annotations.
        predictions: in COCO's results format, with the categories of the annotations.
        image_files: path by image id.
    """

    truth: COCO
    predictions: list[dict[str, Any]]
    image_files: dict[int, str]

    @property
    def class_names(self) -> dict[int, str]:
        """Return the names of the classes by category id, in the order of the ids."""
        return {i: str(self.truth.cats[i]["name"]) for i in sorted(self.truth.cats)}

    @property
    def tasks(self) -> list[str]:
        """Return the tasks that can be evaluated: boxes, and masks and keypoints if they are
        predicted."""
        found = {"bbox": True}
        for prediction in self.predictions:
            found["segm"] = found.get("segm", False) or "segmentation" in prediction
            found["keypoints"] = found.get("keypoints", False) or "keypoints" in prediction
        return [task for task, there in found.items() if there]


def register_files(folder: Path, annotations: Path | None, images: Path | None) -> None:
    """Register files in the place of the data set that a run was evaluated on.

    Args:
        folder: ``OUTPUT_DIR`` of the run.
        annotations: a file in COCO's format.
        images: the folder of its images.

    Raises:
        FileNotFoundError: one of them does not exist.
        ValueError: one of them is not given or is no data set, or the run was not evaluated on
            exactly one.
    """
    if annotations is None or images is None:
        raise UserValueError("--annotations and --images go together: give both.")
    for path in (annotations, images):
        if not path.exists():
            raise UserFileNotFoundError(f"There is no {path}.{suggest_path(path)}")
    names = read_run(folder).test_sets
    if len(names) != 1:
        raise UserValueError(
            "--annotations and --images stand for one data set, but config.yaml in "
            f"{folder} has DATASETS.TEST {names}: register them in a script that calls "
            "vovnet_d2.report.write_page."
        )
    (name,) = names
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    register_coco_instances(name, {}, str(annotations), str(images))
    try:
        _find_images(name)
    except MissingPart as error:
        raise UserValueError(f"--annotations {annotations}: {error}") from error


def read_detections(run: RunFolder, dataset: str, suffix: str = "") -> Detections:
    """Read what a run predicted for a data set, which has to be registered.

    Args:
        suffix: "_TTA" for the evaluation with test-time augmentation, "_EMA" for the evaluation of
            the averaged weights.

    Raises:
        MissingPart: predictions or annotations are not there, or do not belong together.
    """
    path = run.predictions_file(dataset, suffix)
    predictions = _read_predictions(path, path.relative_to(run.path))
    image_files = _find_images(dataset)
    metadata = MetadataCatalog.get(dataset)
    # The evaluator converts a data set that has no such file.
    converted = path.parent / f"{dataset}_coco_format.json"
    truth = _read_truth(Path(metadata.get("json_file") or converted), dataset)
    match_categories(truth, metadata)
    if {p["image_id"] for p in predictions} - truth.imgs.keys() or (
        {p["category_id"] for p in predictions} - truth.cats.keys()
    ):
        raise MissingPart(
            f"{dataset} on this machine is not what was predicted: images or categories of the "
            "predictions are missing in it."
        )
    return Detections(truth, predictions, image_files)


def _read_predictions(path: Path, shown: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise MissingPart(
            f"There is no {shown}, which an evaluation in COCO's way leaves when a network detects "
            "objects."
        )
    try:
        predictions = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        predictions = None
    if not isinstance(predictions, list):
        raise MissingPart(f"{shown} cannot be read; it may be half written.")
    if not predictions:
        raise MissingPart(f"{shown} is empty: the network found nothing.")
    return predictions


def _find_images(dataset: str) -> dict[int, str]:
    if dataset not in DatasetCatalog:
        raise MissingPart(
            f"The data set {dataset} is not known here: name its files with --annotations and "
            "--images."
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            records = DatasetCatalog.get(dataset)
    except Exception as error:  # anybody may write the function of a data set
        raise MissingPart(
            f"The data set {dataset} cannot be read here ({describe(error)})."
        ) from error
    return {record["image_id"]: record["file_name"] for record in records}


def _read_truth(path: Path, dataset: str) -> COCO:
    if not path.is_file():
        raise MissingPart(f"The annotations of {dataset} are not here: there is no {path}.")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
    if not truth.dataset.get("annotations"):
        raise MissingPart(f"{dataset} has no annotations to compare the predictions with.")
    return truth
