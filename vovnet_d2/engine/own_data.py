# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The arguments for annotation files on a command line, and the config that they give."""

import argparse
import logging
import os
from collections.abc import Iterable
from filecmp import cmp
from itertools import chain, count
from json import loads
from pathlib import Path
from typing import Any, TypeVar

from detectron2.config import CfgNode

from ..data.check.reading import is_plain
from ..data.formats import describe_formats, read_annotations, recognise, write_coco
from ..data.own import OwnDataSet
from ..data.own_files import Contents, read_contents
from ..errors import UserValueError
from ..made import is_made_here
from ..words import counted, listed, suggest
from .main_process import in_main_process
from .num_classes import find_num_classes, instance_class_keys
from .own_keypoints import KEYPOINT_KEY, find_keypoints, refuse_idle_flips

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SPLITS = {"train": "own_train", "val": "own_val"}
_LEAST_MASKS = 10  # fewer masks may all be rectangles by chance


def add_own_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a custom data set",
        describe_formats("\n") + "\nThe number of categories and their names come from the files.\n"
        "OUTPUT_DIR/config.yaml keeps them: with that file for --config-file, evaluation\n"
        "and prediction need none of these arguments.",
    )
    for split, use in (
        ("train", "train on"),
        ("val", "evaluate on; without them nothing is evaluated"),
    ):
        add_annotation_arguments(group, split, f"annotations to {use}")
    group.add_argument(
        "--keypoint-flips",
        metavar="PAIRS",
        help="pairs of keypoints that are swapped in a mirrored picture, such as "
        "left_eye:right_eye,left_ear:right_ear, or none. By default the pairs are found by left "
        "and right in the names, and the log lists them",
    )


def add_annotation_arguments(
    group: argparse._ActionsContainer, split: str, use: str = "annotations"
) -> None:
    """Add the arguments for the annotations and images of a split, "train" or "val". ``use`` is the
    help text."""
    group.add_argument(
        f"--{split}-annotations",
        f"--{split}-json",
        metavar="PATH",
        help=f"{use}. From a data.yaml or VOC's ImageSets, the part {split!r} is used",
    )
    group.add_argument(
        f"--{split}-images",
        metavar="FOLDER",
        help="folder that the file names of the annotations are relative to. Leave it out if the "
        "annotations say where the images are (data.yaml, JPEGImages, Labelme)",
    )


def find_annotations(args: argparse.Namespace, split: str) -> tuple[Path, Path | None] | None:
    """Return the annotations and the folder of images that a command line gives for a split.

    Raises:
        FileNotFoundError: there are no such annotations.
        ValueError: one of the two arguments is missing and needed.
    """
    given = getattr(args, f"{split}_annotations"), getattr(args, f"{split}_images")
    path, folder = (Path(os.path.abspath(os.path.expanduser(p))) if p else None for p in given)
    if path and (folder or recognise(path) != "coco"):
        return path, folder
    if path or folder:
        raise UserValueError(
            f"--{split}-annotations and --{split}-images go together: give both, unless the "
            "annotations say where their images are."
        )
    return None


def use_own_data(
    cfg: CfgNode, args: argparse.Namespace, *, training: bool, folder: str = ""
) -> None:
    """Set the data sets and the number of categories of a config to those of annotation files.

    Annotations of other formats than COCO's are converted first.

    An evaluation has the categories of the training, from its file or from ``DATASETS.OWN`` in the
    config of an earlier run. The file for the evaluation may lack some of them.

    Args:
        cfg: the config, which is changed in place if annotation files are given.
        args: the arguments of :func:`add_own_data_arguments`, and ``opts``.
        folder: the folder for converted annotations; ``OUTPUT_DIR`` by default.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: an argument is missing or contradicts an option; the files have an unknown
            format, do not fit each other, or lack annotations that the config's network learns
            from.
    """
    given = {split: found for split in _SPLITS if (found := find_annotations(args, split))}
    refuse_idle_flips(cfg, args.keypoint_flips, trained_file="train" in given)
    if not given:
        return
    _refuse_clashes(args.opts, given)
    _require_detector(cfg)
    files = _all_to_coco(given, folder or cfg.OUTPUT_DIR)
    known = [OwnDataSet.from_config(entry) for entry in cfg.DATASETS.OWN]
    own = {data_set.name: data_set for data_set in known}
    if "train" in files:
        own.pop(_SPLITS["val"], None)
        contents = _read(cfg, "train", files["train"])
        _check_trainable(cfg, files["train"][0], contents, training=training)
        names, ids = tuple(contents.categories.values()), tuple(contents.categories)
        points = find_keypoints(cfg, files["train"][0], contents, flips=args.keypoint_flips)
        own[_SPLITS["train"]] = OwnDataSet(_SPLITS["train"], *files["train"], names, ids, *points)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (_SPLITS["train"],), ()
    if "val" in files:
        contents = _read(cfg, "val", files["val"])
        trained = own.get(_SPLITS["train"])
        names, ids = _match(files["val"][0], contents, trained)
        points = find_keypoints(cfg, files["val"][0], contents, trained=trained)
        own[_SPLITS["val"]] = OwnDataSet(_SPLITS["val"], *files["val"], names, ids, *points)
        cfg.DATASETS.TEST = (_SPLITS["val"],)
    elif training:
        logger.warning(
            "Nothing is evaluated, neither during the training nor at the end: there are no "
            "--val-annotations."
        )
    cfg.DATASETS.OWN = [data_set.to_config() for data_set in own.values()]
    logger.info("The categories are %s.", ", ".join(names))
    for key in instance_class_keys():
        cfg.merge_from_list([key, len(names)])
    if not find_num_classes(cfg):
        logger.warning(
            "MODEL.META_ARCHITECTURE %s is not known here: if its number of categories is not in "
            "one of %s, set its key to %d.",
            *(cfg.MODEL.META_ARCHITECTURE, ", ".join(instance_class_keys()), len(names)),
        )


def _all_to_coco(
    given: dict[str, tuple[Path, Path | None]], folder: str
) -> dict[str, tuple[str, str]]:
    files = {split: _to_coco(split, *paths, folder) for split, paths in given.items()}
    both = [file for file, _ in files.values()]
    if len(both) == 2 and in_main_process(lambda: cmp(both[0], both[1], shallow=False)):
        logger.warning(
            "The annotations to train on and to evaluate on are the same, so the results will say "
            "nothing about other images: give different parts (tools/convert_dataset.py --split)."
        )
    return files


def _to_coco(split: str, path: Path, images: Path | None, folder: str) -> tuple[str, str]:
    """Return the annotations as a file in COCO's format and in plain UTF-8, and their folder of
    images."""
    if images and recognise(path) == "coco" and is_plain(path):
        return str(path), str(images)
    return in_main_process(lambda: _convert(split, path, images, Path(os.path.abspath(folder))))


def _convert(split: str, path: Path, images: Path | None, folder: Path) -> tuple[str, str]:
    found = read_annotations(path, images, split)
    logger.info("%s: %s", path, found.describe())
    for note in found.notes:
        logger.warning("%s: %s", path, note)
    folder.mkdir(parents=True, exist_ok=True)
    file = _choose_file(folder, split, found.content)
    write_coco(found.content, file)
    return str(file), os.path.abspath(found.images)


def _choose_file(folder: Path, split: str, content: dict[str, Any]) -> Path:
    """Choose the file for converted annotations. A file with other annotations stays as it is if
    a config in this folder or in one below names the file."""
    for number in count(1):
        file = folder / f"annotations_{split}{f'_{number}' if number > 1 else ''}.json"
        if not os.path.lexists(file) or _holds(file, content) or _is_of_failed_run(file):
            break
    return file


def _is_of_failed_run(file: Path) -> bool:
    """Return True if this package wrote a file of annotations, and no config names it. A config may
    belong to a training whose other files are elsewhere."""
    configs = [*file.parent.glob("config.yaml"), *file.parent.glob("*/config.yaml")]
    return is_made_here(file) and not any(
        file.name in config.read_text(encoding="utf-8", errors="replace") for config in configs
    )


def _holds(file: Path, content: dict[str, Any]) -> bool:
    try:
        return loads(file.read_text(encoding="utf-8")) == content
    except (OSError, ValueError):
        return False


def _refuse_clashes(options: list[str], splits: Iterable[str]) -> None:
    set_here = {"DATASETS.OWN", "DATASETS.TEST", KEYPOINT_KEY, *instance_class_keys()}
    if "train" in splits:
        set_here.add("DATASETS.TRAIN")
    if clashes := sorted(set_here & set(options[::2])):
        files = " and ".join(f"--{split}-annotations" for split in splits)
        raise UserValueError(
            f"{clashes[0]} follows from the files of {files}: remove it from the command."
        )


def _require_detector(cfg: CfgNode) -> None:
    if "stuff_classes" in find_num_classes(cfg):
        raise UserValueError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} learns from label maps, "
            "which COCO's annotation files do not have: register such data in a script that calls "
            "vovnet_d2.engine.main."
        )


def _read(cfg: CfgNode, split: str, files: tuple[str, str]) -> Contents:
    json, images = files
    contents = in_main_process(lambda: read_contents(json, images, evaluated=split == "val"))
    logger.info(
        "%s: %s, %s, %s.",
        json,
        counted(len(contents.categories), "categories"),
        counted(contents.num_images, "images"),
        counted(contents.num_annotations, "annotations"),
    )
    if contents.num_crowds:
        logger.info(
            "%s marks %s as crowds (iscrowd; the difficult objects of PASCAL VOC and the groups of "
            "Open Images are such): training leaves them out, and evaluation ignores detections "
            "there.",
            *(json, counted(contents.num_crowds, "annotations")),
        )
    if cfg.MODEL.MASK_ON and contents.num_without_mask:
        raise UserValueError(
            f"{json} has {counted(contents.num_without_mask, 'objects')} without a mask, and the "
            "config's network learns masks: choose a config of Faster R-CNN or RetinaNet, or set "
            "MODEL.MASK_ON False. If most have masks, tools/check_dataset.py lists the others."
        )
    _warn_of_contents(cfg, json, contents)
    return contents


def _warn_of_contents(cfg: CfgNode, json: str, contents: Contents) -> None:
    if contents.unused_supercategories:
        logger.warning(
            "%s has no object of %s, the supercategory of others (Roboflow writes it before the "
            "classes): it takes a class of the network. tools/check_dataset.py --fix drops it.",
            *(json, listed(contents.unused_supercategories)),
        )
    objects = contents.num_annotations - contents.num_crowds
    if cfg.MODEL.MASK_ON and _LEAST_MASKS <= objects == contents.num_box_masks:
        logger.warning(
            "The masks of all %d objects of %s are rectangles, no more than their boxes: a network "
            "that learns masks from them learns to draw boxes.",
            *(objects, json),
        )


def _check_trainable(cfg: CfgNode, json: str, contents: Contents, *, training: bool) -> None:
    if cfg.MODEL.MASK_ON and contents.num_encoded_masks and cfg.INPUT.MASK_FORMAT != "bitmask":
        raise UserValueError(
            f"{json} has {counted(contents.num_encoded_masks, 'masks')} as RLE, not as polygons: "
            "set INPUT.MASK_FORMAT bitmask."
        )
    if not contents.num_trainable:
        raise UserValueError(
            f"{json} has no image with an object that is no crowd, so there is nothing to learn."
        )
    if not training:
        return
    left_out = contents.num_images - contents.num_trainable
    if left_out and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        logger.info(
            "The training leaves out %s without objects or with crowds only "
            "(DATALOADER.FILTER_EMPTY_ANNOTATIONS).",
            counted(left_out, "images"),
        )


def _match(
    json: str, contents: Contents, trained: OwnDataSet | None
) -> tuple[tuple[str, ...], tuple[int | str, ...]]:
    """Find the categories of the training by their names, as their ids in this file may differ.
    Return the names in the order of the network's outputs, and their ids in this file. A name that
    the file lacks gets an id that the file does not have."""
    found = contents.categories
    if trained is None:
        return tuple(found.values()), tuple(found)
    extra = {number: name for number, name in found.items() if name not in trained.categories}
    if wrong := [number for number in extra if number in contents.used]:
        names = list(dict.fromkeys(extra[number] for number in wrong))
        hint = suggest(names[0], trained.categories, cutoff=0.5)
        raise UserValueError(
            f"{json} has objects of categories that {trained.json}, which the network is trained "
            f"on, does not have: {listed(names, most=10)}.{hint} Add pictures of them to the "
            "training, or remove these objects. Categories are matched by their names, whatever "
            "their ids are."
        )
    if not set(found.values()) & set(trained.categories):
        raise UserValueError(f"{json} and {trained.json} have no category name in common.")
    by_name = {name: number for number, name in found.items()}
    as_text = any(isinstance(number, str) for number in found)
    taken: set[int | str] = set(found)
    ids: list[int | str] = []
    for name, number in zip(trained.categories, trained.category_ids, strict=True):
        if name in by_name:
            ids.append(by_name[name])
            continue
        choices = chain([number], count(1))  # the id in the training, or the first free number
        kinds = (str(choice) if as_text else choice for choice in choices)
        ids.append(next(kind for kind in kinds if kind not in taken))
        taken.add(ids[-1])
    if tuple(ids) != trained.category_ids:
        logger.info("%s has other category ids than the training: matched by name.", json)
    return trained.categories, tuple(ids)
