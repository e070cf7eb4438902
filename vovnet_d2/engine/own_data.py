# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Annotation files on the command line: the config for them."""

from __future__ import annotations

import argparse
import logging
import os
from difflib import get_close_matches
from itertools import chain, count

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data.own import OwnDataSet
from ..data.own_files import Contents, read_contents
from .checks import find_num_classes, instance_class_keys

__all__ = ["add_own_data_arguments", "use_own_data"]

logger = logging.getLogger(__name__)

_SPLITS = {"train": "own_train", "val": "own_val"}
_LEAST_EPOCHS, _MOST_EPOCHS = 1, 100


def add_own_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "data of your own",
        "annotations in COCO's format. The number of categories and their names come from the "
        "files, and OUTPUT_DIR/config.yaml has all of it: with that for --config-file, evaluation "
        "and prediction need none of these arguments. The training schedule stays the config's",
    )
    for split, use in (
        ("train", "train on"),
        ("val", "evaluate on; without, nothing is evaluated"),
    ):
        group.add_argument(f"--{split}-json", metavar="FILE", help=f"annotations to {use}")
        group.add_argument(
            f"--{split}-images",
            metavar="FOLDER",
            help="what the file names in them are relative to",
        )


def use_own_data(cfg: CfgNode, args: argparse.Namespace, *, training: bool) -> None:
    """Set the data sets and the number of categories of a config to those of annotation files.

    Categories to evaluate on are those of the training: of its file, or of what the config has in
    ``DATASETS.OWN`` from an earlier run; some may be missing in the file to evaluate on.

    Args:
        cfg: changed in place, if there are such files.
        args: with those of :func:`add_own_data_arguments`, and ``opts``.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: an argument is missing, or contradicts an option; the files are not in COCO's
            format, do not fit each other, or lack what the config's network learns from.
    """
    files = {split: found for split in _SPLITS if (found := _find_files(args, split))}
    if not files:
        return
    _refuse_clashes(args.opts, files)
    _require_detector(cfg)
    known = [OwnDataSet.from_config(entry) for entry in cfg.DATASETS.OWN]
    own = {data_set.name: data_set for data_set in known}
    if "train" in files:
        own.pop(_SPLITS["val"], None)
        contents = _read(cfg, "train", files["train"])
        _check_trainable(cfg, files["train"][0], contents, training=training)
        names, ids = tuple(contents.categories.values()), tuple(contents.categories)
        own[_SPLITS["train"]] = OwnDataSet(_SPLITS["train"], *files["train"], names, ids)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (_SPLITS["train"],), ()
    if "val" in files:
        contents = _read(cfg, "val", files["val"])
        names, ids = _match(files["val"][0], contents, own.get(_SPLITS["train"]))
        own[_SPLITS["val"]] = OwnDataSet(_SPLITS["val"], *files["val"], names, ids)
        cfg.DATASETS.TEST = (_SPLITS["val"],)
    elif training:
        logger.warning(
            "Nothing is evaluated, neither on the way nor at the end: there is no --val-json."
        )
    cfg.DATASETS.OWN = [data_set.to_config() for data_set in own.values()]
    logger.info("The categories are %s.", ", ".join(names))
    for key in instance_class_keys():
        cfg.merge_from_list([key, len(names)])
    if not find_num_classes(cfg):
        logger.warning(
            "MODEL.META_ARCHITECTURE %s is not known here: if its number of categories is not one "
            "of %s, set it to %d.",
            *(cfg.MODEL.META_ARCHITECTURE, ", ".join(instance_class_keys()), len(names)),
        )


def _find_files(args: argparse.Namespace, split: str) -> tuple[str, str] | None:
    """Annotation file and folder of images, as paths that hold from any folder."""
    file, folder = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
    if not file and not folder:
        return None
    if not file or not folder:
        raise ValueError(f"--{split}-json and --{split}-images go together: give both.")
    return os.path.abspath(os.path.expanduser(file)), os.path.abspath(os.path.expanduser(folder))


def _refuse_clashes(options: list[str], files: dict[str, tuple[str, str]]) -> None:
    set_here = {"DATASETS.OWN", "DATASETS.TEST", *instance_class_keys()}
    if "train" in files:
        set_here.add("DATASETS.TRAIN")
    if clashes := sorted(set_here & set(options[::2])):
        raise ValueError(
            f"{clashes[0]} follows from --{'/'.join(files)}-json: leave one of the two out."
        )


def _require_detector(cfg: CfgNode) -> None:
    if "stuff_classes" in find_num_classes(cfg):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} learns from maps of labels, "
            "which COCO's annotation files do not have: register such data in a script that calls "
            "vovnet_d2.engine.main."
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise ValueError(
            "MODEL.KEYPOINT_ON needs to know which keypoints change places in a mirror, which "
            "COCO's annotation files do not say: register such data, with keypoint_names and "
            "keypoint_flip_map, in a script that calls vovnet_d2.engine.main."
        )


def _read(cfg: CfgNode, split: str, files: tuple[str, str]) -> Contents:
    json, images = files
    contents = _read_once(json, images, evaluated=split == "val")
    logger.info(
        "%s: %d categories, %d images, %d annotations, of which %d are crowds.",
        *(json, len(contents.categories), contents.num_images, contents.num_annotations),
        contents.num_crowds,
    )
    if cfg.MODEL.MASK_ON and contents.num_without_mask:
        raise ValueError(
            f"{json} has {contents.num_without_mask} objects without a mask, and the config's "
            "network learns masks: choose a config of Faster R-CNN or RetinaNet, or set "
            "MODEL.MASK_ON False. If most have masks, tools/check_dataset.py lists the others."
        )
    return contents


def _read_once(json: str, images: str, *, evaluated: bool) -> Contents:
    """Read a file in the main process, for all processes: it may be large."""
    found: Contents | Exception | None = None
    if comm.is_main_process():
        try:
            found = read_contents(json, images, evaluated=evaluated)
        except (FileNotFoundError, ValueError) as error:
            found = error
    found = comm.all_gather(found)[0]
    if isinstance(found, Exception):
        raise found
    return found


def _check_trainable(cfg: CfgNode, json: str, contents: Contents, *, training: bool) -> None:
    if cfg.MODEL.MASK_ON and contents.num_encoded_masks and cfg.INPUT.MASK_FORMAT != "bitmask":
        raise ValueError(
            f"{json} has {contents.num_encoded_masks} masks that are not polygons but RLE: set "
            "INPUT.MASK_FORMAT bitmask."
        )
    if not contents.num_trainable:
        raise ValueError(f"{json} has no image with an object that is no crowd: nothing to train.")
    if not training:
        return
    num_images = contents.num_images
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        num_images = contents.num_trainable
        if left_out := contents.num_images - num_images:
            logger.info(
                "%d images without objects, or with crowds only, are left out of the training "
                "(DATALOADER.FILTER_EMPTY_ANNOTATIONS).",
                left_out,
            )
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / num_images
    unusual = not _LEAST_EPOCHS <= epochs <= _MOST_EPOCHS
    logger.log(
        logging.WARNING if unusual else logging.INFO,
        "%d iterations of %d images are %s epochs of the %d images.%s",
        *(cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, f"{epochs:,.1f}", num_images),
        " The schedule is the config's, made for other data: set SOLVER.MAX_ITER and SOLVER.STEPS "
        f"(COCO's 1x schedule is 12 epochs: {round(12 * num_images / cfg.SOLVER.IMS_PER_BATCH)} "
        "iterations here)."
        if unusual
        else "",
    )


def _match(
    json: str, contents: Contents, trained: OwnDataSet | None
) -> tuple[tuple[str, ...], tuple[int | str, ...]]:
    """Find the categories of the training by their names, whatever their ids are in this file.

    Returns:
        names in the order of the network's outputs, and their ids in this file. A name that the
        file lacks gets an id that the file does not have.
    """
    found = contents.categories
    if trained is None:
        return tuple(found.values()), tuple(found)
    extra = {number: name for number, name in found.items() if name not in trained.categories}
    if wrong := [number for number in extra if number in contents.used]:
        name = extra[wrong[0]]
        close = get_close_matches(name, trained.categories, n=1, cutoff=0.5)
        hint = f" Close to it: {close[0]!r}." if close else ""
        raise ValueError(
            f"{json} has objects of category {name!r} (id {wrong[0]!r}), and {trained.json}, which "
            f"the network is trained on, has no category of that name.{hint} Categories are "
            "matched by name; their ids may differ, and those that do not occur may be missing."
        )
    if not set(found.values()) & set(trained.categories):
        raise ValueError(f"{json} has no category with a name of those in {trained.json}.")
    by_name = {name: number for number, name in found.items()}
    as_text = any(isinstance(number, str) for number in found)
    taken: set[int | str] = set(found)
    ids: list[int | str] = []
    for name, number in zip(trained.categories, trained.category_ids, strict=True):
        if name in by_name:
            ids.append(by_name[name])
            continue
        choices = chain([number], count(1))  # the training's own, or the first that is free
        kinds = (str(choice) if as_text else choice for choice in choices)
        ids.append(next(kind for kind in kinds if kind not in taken))
        taken.add(ids[-1])
    if tuple(ids) != trained.category_ids:
        logger.info("%s has other category ids than the training: matched by name.", json)
    return trained.categories, tuple(ids)
