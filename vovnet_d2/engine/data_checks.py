# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of the data sets of a run: they are there, and fit the network and each other."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.common import DatasetFromList
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.utils.file_io import PathManager

from ..data.check.values import is_number, is_text
from ..data.cityscapes import check_cityscapes
from ..data.oversampling import report_repeats
from ..data.record_files import check_files
from ..data.records import check_records
from ..data.stream import TrainingStream
from ..data.unreadable import image_roots
from ..data.voc import check_voc_set, is_voc_set
from ..errors import UserKeyError, UserValueError
from ..words import suggest
from .categories import first_difference
from .num_classes import check_num_classes, find_num_classes
from .registered_data import load_metadata
from .semantic_data import check_label_maps

logger = logging.getLogger(__name__)

_COCO_KEYPOINTS = 17
# An annotation file up to this size is read once more. Custom data sets have no larger files.
_MOST_BYTES = 200 << 20


def check_data(cfg: CfgNode, *, training: bool) -> None:
    """Look for the data sets of a run, and compare their categories with those of the network.

    Raises:
        FileNotFoundError: files of a data set are missing.
        KeyError: a data set is not registered.
        ValueError: there is no data set, a data set cannot be loaded, or categories do not fit.
    """
    names = {"DATASETS.TEST": cfg.DATASETS.TEST}
    if training:
        names = {"DATASETS.TRAIN": cfg.DATASETS.TRAIN, **names}
    for key, values in names.items():
        _check_names(key, values, required=key == "DATASETS.TRAIN" or not training)
    checked: dict[str, Metadata] = {}
    for key, values in names.items():
        for name in values:
            metadata = load_metadata(name, evaluated=key == "DATASETS.TEST")
            _check_data_set(cfg, key, name, metadata)
            for other, others_metadata in checked.items():
                _check_same_categories(name, metadata, other, others_metadata)
            checked[name] = metadata
    if cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.TEST:
        _check_keypoint_sigmas(cfg)
    if "stuff_classes" in find_num_classes(cfg):
        for name in checked:
            check_label_maps(cfg, name)


def _check_data_set(cfg: CfgNode, key: str, name: str, metadata: Metadata) -> None:
    """Compare a data set of ``cfg.DATASETS`` with the network, and look at its files."""
    if is_voc_set(name):  # the network need not have its classes
        check_voc_set(name)
    _check_cityscapes(name, metadata)
    check_num_classes(cfg, key, name, metadata)
    _check_category_names(name, metadata)
    _check_file(name, metadata)


def check_data_sets(cfg: CfgNode, key: str) -> None:
    """Check that the data sets of ``DATASETS.TRAIN`` or ``DATASETS.TEST``, as ``key`` says, are
    there, whatever the network is. For the errors see :func:`check_data`."""
    names = cfg.DATASETS[key]
    _check_names(f"DATASETS.{key}", names, required=True)
    for name in names:
        load_metadata(name, evaluated=False)


def check_stream(cfg: CfgNode, loader: Iterable[Any]) -> None:
    """Look once at the annotations and files of a training, if its loader has a list of them. Say
    which images are repeated. Raise ValueError, see :func:`check_records` and
    :func:`check_files`."""
    if isinstance(loader, TrainingStream) and isinstance(loader.dataset, DatasetFromList):
        name, classes = ", ".join(cfg.DATASETS.TRAIN), find_num_classes(cfg).get("thing_classes")
        records = (loader.dataset[index] for index in range(len(loader.dataset)))
        check_records(records, name, num_classes=classes, masks=cfg.MODEL.MASK_ON)
        check_files(
            loader.dataset,
            name,
            roots=image_roots(cfg.DATASETS.TRAIN),
            most_unusable=cfg.DATALOADER.MAX_UNREADABLE,
        )
        metadata = [MetadataCatalog.get(each) for each in cfg.DATASETS.TRAIN[:1]]
        names = [label for each in metadata for label in each.get("thing_classes", [])]
        report_repeats(cfg, loader.dataset, names)


def _check_names(key: str, names: Sequence[str], *, required: bool) -> None:
    if required and not names:
        raise UserValueError(
            f"{key} is empty: give --config-file, or {key} \"('name',)\", or files of your own "
            f"(--{'train' if key == 'DATASETS.TRAIN' else 'val'}-annotations, see --help)."
        )
    if isinstance(names, str):
        raise UserValueError(f"{key} must be a list of names: write {key} \"('{names}',)\".")
    for name in names:
        if name not in DatasetCatalog:
            hint = suggest(name, DatasetCatalog.list(), cutoff=0.4)
            raise UserKeyError(
                f"Data set {name!r} of {key} is not registered.{hint} Data of one's own "
                "are given with --train-annotations and the like, see --help, or registered by a "
                "script with detectron2.data.datasets.register_coco_instances."
            )


def _check_category_names(name: str, metadata: Metadata) -> None:
    """Refuse names that are no text, which Detectron2's loader cannot read, and text that no
    encoding can write.
    """
    for category in (*metadata.get("thing_classes", ()), *metadata.get("stuff_classes", ())):
        if not is_text(category):
            raise UserValueError(
                f"Data set {name} has a category with the name {category!r}, which must be text "
                "that can be written. (Of a file that is given with --train-annotations, numbers "
                "are taken as text.)"
            )


def _check_file(name: str, metadata: Metadata) -> None:
    """Check the ids of images and the areas of objects, which Detectron2's records do not have.

    If two images have one id, pycocotools and Detectron2's loader lose one of the images, and give
    its objects to the other. Areas that are no numbers make the AP of sizes wrong.
    """
    file = metadata.get("json_file")
    if not file or metadata.get("own_data_set") or os.path.getsize(file) > _MOST_BYTES:
        return
    try:
        with PathManager.open(file) as stream:
            content = json.load(stream)
        counts = Counter(image["id"] for image in content["images"])
        areas = (a["area"] for a in content.get("annotations", ()) if "area" in a)
        wrong = [area for area in areas if not is_number(area)]
    except (KeyError, OSError, TypeError, ValueError):  # loading the data set says what is wrong
        return
    hint = "tools/check_dataset.py lists all that is wrong with it, and writes a corrected copy."
    if twice := [number for number, count in counts.items() if count > 1]:
        raise UserValueError(
            f"Data set {name}: two images of {file} have the id {twice[0]!r}. {hint}"
        )
    if wrong:
        raise UserValueError(f"Data set {name}: {file} has the area {wrong[0]!r:.60}. {hint}")


def _check_cityscapes(name: str, metadata: Metadata) -> None:
    if metadata.get("evaluator_type") not in ("cityscapes_instance", "cityscapes_sem_seg"):
        return
    try:
        check_cityscapes(metadata.image_dir, metadata.gt_dir)
    except ValueError as error:
        raise UserValueError(f"Data set {name}: {error}") from error


def _check_same_categories(name: str, metadata: Metadata, other: str, others: Metadata) -> None:
    mine, theirs = metadata.get("thing_classes"), others.get("thing_classes")
    if not mine or not theirs:
        return
    if unequal := first_difference(theirs, mine):
        raise UserValueError(
            "Data sets {} and {} differ in their categories: number {} is {!r} in one and {!r} in "
            "the other. All data sets of a run must have the same, in the same order. (Given with "
            "--train-annotations and --val-annotations, they are matched by name.)".format(
                other, name, *unequal
            )
        )


def _check_keypoint_sigmas(cfg: CfgNode) -> None:
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    sigmas_given = len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    sigmas = sigmas_given or _COCO_KEYPOINTS
    if keypoints != sigmas:
        raise UserValueError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {keypoints}, and the evaluation has "
            f"{sigmas} sigmas: give one for each in TEST.KEYPOINT_OKS_SIGMAS (COCO's "
            f"{_COCO_KEYPOINTS} are there if that is empty), which says how far off a keypoint may "
            "be beside the size of its object; COCO's are 0.026 for an eye to 0.107 for a hip, so "
            f'"{[0.05] * keypoints}" is a start.'
        )
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("keypoint_names")
    if names and list(names) != list(COCO_PERSON_KEYPOINT_NAMES) and not sigmas_given:
        logger.warning(
            "The keypoints of %s are not COCO's, and the evaluation takes COCO's sigmas for them: "
            "give their own in TEST.KEYPOINT_OKS_SIGMAS.",
            cfg.DATASETS.TEST[0],
        )
