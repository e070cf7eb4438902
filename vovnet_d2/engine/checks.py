# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks that find mistakes before a training starts, not hours later."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.common.registry import Registry
from torch import nn

from ..backends import check_backend
from ..checkpoint import VoVNetCheckpointer
from ..checkpoint.zoo import ZOO
from ..data.check.registered import find_foreign_file, states_categories
from ..data.check.values import is_number, is_text
from ..data.cityscapes import check_cityscapes
from ..data.voc import check_voc_set, is_voc_set
from ..errors import UserFileNotFoundError, UserKeyError, UserValueError, describe
from ..tiles import check_tiles
from ..words import suggest
from .compilation import check_compilation
from .loggers import check_loggers
from .main_process import in_main_process
from .other_projects import PARTS
from .precision import autocast_dtype
from .semantic_data import check_label_maps

__all__ = [
    "check_all_loaded",
    "check_config",
    "check_data",
    "check_data_sets",
    "check_initialisation",
    "check_network",
    "check_schedule",
    "choose_device",
    "find_num_classes",
    "instance_class_keys",
    "is_of_loader",
    "is_pretrained",
    "load_records",
    "parse_device",
]

logger = logging.getLogger(__name__)

# Meta-architecture to the keys that hold its numbers of classes, by the metadata that lists them.
_NUM_CLASSES = {
    "GeneralizedRCNN": {"thing_classes": "ROI_HEADS"},
    "RetinaNet": {"thing_classes": "RETINANET"},
    "FCOS": {"thing_classes": "FCOS"},
    "RefineDet": {"thing_classes": "SINGLE_SHOT"},
    "SingleShotDetector": {"thing_classes": "SINGLE_SHOT"},
    "SemanticSegmentor": {"stuff_classes": "SEM_SEG_HEAD"},
    "PanopticFPN": {"thing_classes": "ROI_HEADS", "stuff_classes": "SEM_SEG_HEAD"},
}
_COCO_KEYPOINTS = 17
_MOST_BYTES = (
    200 << 20
)  # of an annotation file that is read once more: larger ones are no custom sets


def check_config(cfg: CfgNode, *, training: bool) -> None:
    """Look at keys that must go together.

    Raises:
        ValueError: the network or its backbone is not registered, the processes cannot share the
            batch, keypoints are in another memory format than Detectron2 takes, the device lacks
            the precision, test-time augmentation is asked for where Detectron2 has none, tiles
            cannot be cut, or a backend cannot be used.
    """
    check_network(cfg)
    check_run(cfg, training=training)


def check_network(cfg: CfgNode) -> None:
    """Check the parts of a config that matter for every use of the network."""
    for key in ("META_ARCHITECTURE", "BACKBONE.NAME", *_used_parts(cfg)):
        node, _, name = key.rpartition(".")
        value = cfg.MODEL[node][name] if node else cfg.MODEL[name]
        _check_registered(f"MODEL.{key}", value, PARTS[key])


def _used_parts(cfg: CfgNode) -> Iterator[str]:
    """Yield the keys that name the parts of the network, for Detectron2's meta-architectures."""
    kind = cfg.MODEL.META_ARCHITECTURE
    if kind in ("SemanticSegmentor", "PanopticFPN"):
        yield "SEM_SEG_HEAD.NAME"
    if kind not in ("GeneralizedRCNN", "PanopticFPN", "ProposalNetwork"):
        return
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
        yield "PROPOSAL_GENERATOR.NAME"
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME in ("RPN", "RRPN"):
        yield "RPN.HEAD_NAME"
    if kind == "ProposalNetwork":
        return
    yield "ROI_HEADS.NAME"
    if cfg.MODEL.ROI_HEADS.NAME in ("StandardROIHeads", "CascadeROIHeads"):
        yield "ROI_BOX_HEAD.NAME"
        yield from ["ROI_MASK_HEAD.NAME"] * cfg.MODEL.MASK_ON
        yield from ["ROI_KEYPOINT_HEAD.NAME"] * cfg.MODEL.KEYPOINT_ON


def check_run(cfg: CfgNode, *, training: bool) -> None:
    """Check the parts of a config that matter however the network is built."""
    batch, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if training and (batch < 1 or batch % processes):
        raise UserValueError(
            f"SOLVER.IMS_PER_BATCH is {batch}: it must be a multiple of the number of processes, "
            f"which is {processes}."
        )
    parts = cfg.SOLVER.ACCUMULATE
    if training and (parts < 1 or batch // processes % parts):
        raise UserValueError(
            f"SOLVER.ACCUMULATE is {parts}: it must divide the images of a process, which are "
            f"{batch // processes} (SOLVER.IMS_PER_BATCH {batch}, {processes} processes)."
        )
    if training:
        check_loggers(cfg)
        check_compilation(cfg)
    if cfg.TEST.AMP.ENABLED or (training and cfg.SOLVER.AMP.ENABLED):
        autocast_dtype(cfg)
    if cfg.MODEL.CHANNELS_LAST not in (None, True, False):
        raise UserValueError(
            f"MODEL.CHANNELS_LAST is {cfg.MODEL.CHANNELS_LAST!r}: choose True, False, or None for "
            "what is faster on this machine."
        )
    if cfg.MODEL.KEYPOINT_ON and cfg.MODEL.CHANNELS_LAST:
        raise UserValueError(
            "MODEL.KEYPOINT_ON needs MODEL.CHANNELS_LAST False: Detectron2's keypoint head takes "
            "contiguous maps only."
        )
    if training and cfg.INPUT.COPY_PASTE:
        _check_copy_paste(cfg)
    if not training:
        check_backend(cfg.TEST.BACKEND, torch.device(cfg.MODEL.DEVICE), int8=bool(cfg.TEST.INT8))
    if cfg.TEST.TILES:
        _check_tiles(cfg)
    is_rcnn = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    if cfg.TEST.AUG.ENABLED and (not is_rcnn or cfg.MODEL.KEYPOINT_ON):
        raise UserValueError(
            "Detectron2 has test-time augmentation for GeneralizedRCNN without keypoints only: set "
            "TEST.AUG.ENABLED False."
        )


def _check_copy_paste(cfg: CfgNode) -> None:
    has_labels = cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor")
    if not cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON or has_labels:
        raise UserValueError(
            f"INPUT.COPY_PASTE {cfg.INPUT.COPY_PASTE} pastes objects by their masks: it needs "
            "MODEL.MASK_ON True, and a network that learns no keypoints and no label maps. Set "
            "INPUT.COPY_PASTE 0 for others."
        )


def check_schedule(cfg: CfgNode) -> None:
    """Check the schedule of a training, and warn of a training that is all warm-up.

    Raises:
        ValueError: ``TEST.PATIENCE`` needs evaluations that the training does not have, or
            ``SOLVER.EMA`` is no decay of an average.
    """
    if not 0 <= cfg.SOLVER.EMA < 1:
        raise UserValueError(
            f"SOLVER.EMA is {cfg.SOLVER.EMA}: give the decay of the weights' average, below 1 "
            "(0.9998, or 0.99 for a short training), or 0 for no average."
        )
    if cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
        logger.warning(
            "SOLVER.WARMUP_ITERS %d is not below SOLVER.MAX_ITER %d: the learning rate never "
            "reaches SOLVER.BASE_LR.",
            cfg.SOLVER.WARMUP_ITERS,
            cfg.SOLVER.MAX_ITER,
        )
    patience = cfg.TEST.PATIENCE
    if patience < 0:
        raise UserValueError(f"TEST.PATIENCE is {patience}: give a number of evaluations, or 0.")
    if patience and not (cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST):
        raise UserValueError(
            f"TEST.PATIENCE is {patience}, and nothing is evaluated on the way: set "
            "TEST.EVAL_PERIOD and data to evaluate on (--val-annotations, DATASETS.TEST)."
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


def _check_tiles(cfg: CfgNode) -> None:
    check_tiles(cfg.TEST.TILES, cfg.TEST.TILE_OVERLAP)
    if cfg.TEST.AUG.ENABLED:
        raise UserValueError(
            "TEST.TILES and TEST.AUG.ENABLED cannot be combined: Detectron2's test-time "
            "augmentation takes whole images."
        )


def _check_registered(key: str, name: str, registry: Registry) -> None:
    if name not in registry:
        names = [known for known, _ in registry]
        raise UserValueError(
            f"{key} {name!r} is not registered.{suggest(name, names)} There are: "
            f"{', '.join(names)}."
        )


def choose_device(cfg: CfgNode) -> None:
    """Set ``MODEL.DEVICE`` to cpu, with a warning, where it is a GPU and torch finds none.

    Raises:
        ValueError: torch cannot use the device.
    """
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            message = "torch finds no GPU: MODEL.DEVICE is set to cpu, which is slow."
            logger.warning(message, extra={"told_by_progress_bar": True})
            cfg.MODEL.DEVICE = "cpu"
        else:
            torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UserValueError(
            f"MODEL.DEVICE {name!r} is no device that torch can use here: choose cuda or cpu."
        ) from error


def parse_device(text: str) -> torch.device:
    """Read the value of ``--device``: the CPU, or a GPU that torch finds.

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    choices = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if text not in choices:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device that torch finds here: choose from {', '.join(choices)}"
        )
    return torch.device(text)


# Data


def check_data(cfg: CfgNode, *, training: bool) -> None:
    """Look for the data sets of a run, and compare their categories with the network's.

    Raises:
        FileNotFoundError: files of a data set are missing.
        KeyError: a data set is not registered.
        ValueError: no data set, one that cannot be loaded, or categories that do not fit.
    """
    names = {"DATASETS.TEST": cfg.DATASETS.TEST}
    if training:
        names = {"DATASETS.TRAIN": cfg.DATASETS.TRAIN, **names}
    for key, values in names.items():
        _check_names(key, values, required=key == "DATASETS.TRAIN" or not training)
    checked: list[tuple[str, Metadata]] = []
    for key, values in names.items():
        for name in values:
            metadata = _load_metadata(name, evaluated=key == "DATASETS.TEST")
            if is_voc_set(name):  # whose classes the network need not have
                check_voc_set(name)
            _check_cityscapes(name, metadata)
            _check_num_classes(cfg, key, name, metadata)
            _check_category_names(name, metadata)
            _check_file(name, metadata)
            for other, others_metadata in checked:
                _check_same_categories(name, metadata, other, others_metadata)
            checked.append((name, metadata))
    if cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.TEST:
        _check_keypoint_sigmas(cfg)
    if "stuff_classes" in find_num_classes(cfg):
        for name in dict.fromkeys(name for name, _ in checked):
            check_label_maps(cfg, name)


def check_data_sets(cfg: CfgNode, key: str) -> None:
    """Check the data sets of a config, whatever the network is.

    Args:
        key: "TRAIN" or "TEST", whose data sets are to be there.
    """
    names = cfg.DATASETS[key]
    _check_names(f"DATASETS.{key}", names, required=True)
    for name in names:
        _load_metadata(name, evaluated=False)


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


def _load_metadata(name: str, *, evaluated: bool) -> Metadata:
    """Return the metadata of a data set. Some data sets have their categories only once they are
    loaded.
    """
    metadata = MetadataCatalog.get(name)
    known = metadata.get("thing_classes") or metadata.get("stuff_classes")
    failure: Exception | None = None
    if not known or _find_missing(metadata, evaluated):
        try:
            DatasetCatalog.get(name)  # some are built by this
        except Exception as error:
            if not _is_of_data(error):
                raise
            failure = error
    if missing := _find_missing(metadata, evaluated):
        raise UserFileNotFoundError(_describe_missing(name, missing)) from failure
    if failure:
        raise _loading_error(name, failure, evaluated=evaluated) from failure
    if known and states_categories(name):
        _require_named_file(name, "val" if evaluated else "train")
    return metadata


def _require_named_file(name: str, split: str) -> None:
    """Refuse a file in the place of another data set; the main process reads it for all."""
    if found := in_main_process(lambda: find_foreign_file(name)):
        metadata = MetadataCatalog.get(name)
        file, folder = metadata.get("json_file", "FILE"), metadata.get("image_root", "FOLDER")
        raise UserValueError(
            f"Data set {name} is not what it is registered as: {found}. If these are data of your "
            f"own, leave the name out and give --{split}-annotations {file} --{split}-images "
            f"{folder}."
        )


def load_records(name: str) -> list[dict[str, Any]]:
    """Load a registered data set in Detectron2's format.

    Raises:
        ValueError: its files cannot be used.
    """
    try:
        return DatasetCatalog.get(name)
    except Exception as error:
        if not _is_of_data(error):
            raise
        raise _loading_error(name, error, evaluated=False) from error


def _is_of_data(error: Exception) -> bool:
    """Return True if an error says that files cannot be used. Other errors are bugs of the
    function."""
    return isinstance(error, AssertionError | KeyError | OSError | ValueError) or is_of_loader(
        error
    )


def is_of_loader(error: Exception) -> bool:
    """Return whether an error comes from Detectron2's own loaders of data sets.

    They run into errors of all kinds where a file holds something unexpected.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return any(module.startswith("detectron2.data.datasets.") for module in modules)


def _loading_error(name: str, error: Exception, *, evaluated: bool) -> UserValueError:
    metadata = MetadataCatalog.get(name)
    source = next(iter(_paths(metadata, evaluated)), "the function that is registered for it")
    hint = " tools/check_dataset.py lists all that is wrong with it." * bool(
        metadata.get("json_file")
    )
    return UserValueError(
        f"Data set {name} cannot be loaded from {source}: {describe(error)}.{hint}"
    )


def _find_missing(metadata: Metadata, evaluated: bool) -> list[str]:
    return [path for path in _paths(metadata, evaluated) if not os.path.exists(path)]


def _paths(metadata: Metadata, evaluated: bool) -> list[str]:
    keys = ["json_file", "image_root", "image_dir", "gt_dir", "dirname", "sem_seg_root"]
    if evaluated and importlib.util.find_spec("panopticapi"):  # see _panoptic in evaluation.py
        keys += ["panoptic_root", "panoptic_json"]
    return [metadata.get(key) for key in keys if metadata.get(key)]


def _describe_missing(name: str, missing: Sequence[str]) -> str:
    what = ", ".join(map(os.path.abspath, missing))
    if MetadataCatalog.get(name).get("own_data_set"):
        return (
            f"Data set {name} is not where DATASETS.OWN has it; missing: {what}. Say where it is "
            "now with --train-annotations and --train-images, or --val-annotations and "
            "--val-images."
        )
    root = os.environ.get("DETECTRON2_DATASETS")
    where = f"which is {root}" if root else f"unset, so {os.path.abspath('datasets')}"
    return (
        f"Data set {name} is not complete; missing: {what}. Detectron2's own data sets are looked "
        f"for in DETECTRON2_DATASETS ({where}): `export DETECTRON2_DATASETS=FOLDER`, the folder "
        "that holds coco/, VOC2007/ and so on."
    )


def find_num_classes(cfg: CfgNode) -> dict[str, int]:
    """Return the number of classes of the network, by the metadata that lists their names.

    The result is empty for a meta-architecture whose keys are not known here.
    """
    nodes = _NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE, {})
    return {kind: cfg.MODEL[node].NUM_CLASSES for kind, node in nodes.items()}


def instance_class_keys() -> list[str]:
    """Return the config keys with the number of categories, for all heads that detect objects."""
    nodes = {kinds["thing_classes"] for kinds in _NUM_CLASSES.values() if "thing_classes" in kinds}
    return [f"MODEL.{node}.NUM_CLASSES" for node in sorted(nodes)]


def _check_num_classes(cfg: CfgNode, key: str, name: str, metadata: Metadata) -> None:
    for kind, node in _NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE, {}).items():
        classes = metadata.get(kind)
        if classes and len(classes) != cfg.MODEL[node].NUM_CLASSES:
            raise UserValueError(
                f"Data set {name} of {key} has {len(classes)} categories and the network "
                f"{cfg.MODEL[node].NUM_CLASSES}: set MODEL.{node}.NUM_CLASSES {len(classes)}."
            )


def _check_category_names(name: str, metadata: Metadata) -> None:
    """Refuse names that are no text, which Detectron2's loader stops at, or cannot be written."""
    for category in (*metadata.get("thing_classes", ()), *metadata.get("stuff_classes", ())):
        if not is_text(category):
            raise UserValueError(
                f"Data set {name} has a category with the name {category!r}, which must be text "
                "that can be written. (Of a file that is given with --train-annotations, numbers "
                "are taken as text.)"
            )


def _check_file(name: str, metadata: Metadata) -> None:
    """Look at what Detectron2's records do not have any more: the ids of images and the areas of
    objects. Of two images with one id pycocotools and Detectron2's loader lose one, and give its
    objects to the other; areas that are no numbers spoil the AP of sizes."""
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
    pairs = enumerate(zip_longest(theirs, mine, fillvalue="missing"))
    if unequal := next(((i, a, b) for i, (a, b) in pairs if a != b), None):
        raise UserValueError(
            "Data sets {} and {} differ in their categories: number {} is {!r} in one and {!r} in "
            "the other. All data sets of a run must have the same, in the same order. (Given with "
            "--train-annotations and --val-annotations, they are matched by name.)".format(
                other, name, *unequal
            )
        )


# Weights


def check_initialisation(
    cfg: CfgNode, *, training: bool, resuming: bool, backbone: nn.Module | None = None
) -> None:
    """Refuse to train what cannot learn without weights, and to evaluate what has none.

    Args:
        backbone: by default the one that the config describes.

    Raises:
        ValueError: there are no weights, and the run needs some.
    """
    if cfg.MODEL.WEIGHTS or resuming:
        return
    if not training:
        raise UserValueError(
            "There are no weights to evaluate: set MODEL.WEIGHTS to a file (a training writes "
            "OUTPUT_DIR/model_final.pth), or add --resume for the newest in OUTPUT_DIR."
        )
    if is_pretrained(cfg):
        return
    backbone = backbone or build_backbone(cfg)
    frozen = [n for n, m in backbone.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    frozen += [n for n, p in backbone.named_parameters() if not p.requires_grad]
    if frozen:
        raise UserValueError(
            f"MODEL.WEIGHTS is empty and parts of the backbone are frozen, {frozen[0]} for one: "
            "they would keep their random values, and the loss would diverge. Either give weights"
            f"{_suggest_weights(cfg)}, or train from scratch with "
            f"MODEL.{_backbone_node(cfg)}.NORM BN (or GN) and MODEL.BACKBONE.FREEZE_AT 0."
        )


def is_pretrained(cfg: CfgNode) -> bool:
    """Return whether a training with this config starts from weights, of the backbone at least."""
    backbone = cfg.MODEL.get(_backbone_node(cfg), {})
    return bool(cfg.MODEL.WEIGHTS or backbone.get("PRETRAINED", False))


def check_all_loaded(checkpointer: VoVNetCheckpointer, weights: str, *, part: str = "") -> None:
    """Refuse to infer with weights that leave parts of the network as they were initialised.

    Args:
        part: the beginning of the names of the tensors that are needed; by default all are.

    Raises:
        ValueError: the weights that ``checkpointer`` loaded last do not have all of them.
    """
    missing = [n for n in checkpointer.missing_outside_backbone if n.startswith(part)]
    if missing:
        raise UserValueError(
            f"{weights} has no weights for {len(missing)} tensors outside the backbone, "
            f"{missing[0]} for one, which would be left at random values. Train first, or give "
            "the weights of a whole model. To go on all the same, add --allow-partial (in code: "
            "allow_partial=True)."
        )


def _suggest_weights(cfg: CfgNode) -> str:
    names = [n for n, entry in ZOO.items() if entry.variant == cfg.MODEL.VOVNET.CONV_BODY]
    if "vovnet" not in cfg.MODEL.BACKBONE.NAME or not names:
        return " in MODEL.WEIGHTS"
    body = cfg.MODEL.VOVNET.CONV_BODY
    return f" (MODEL.WEIGHTS {' or '.join(names)}; see the config files of {body})"


def _backbone_node(cfg: CfgNode) -> str:
    """Return the part of ``cfg.MODEL`` that describes its backbone."""
    nodes = {"resnet": "RESNETS", "timm": "TIMM", "torchvision": "TORCHVISION"}
    nodes |= {"densenet67": "DENSENET67", "peleenet": "PELEENET"}
    found = [node for word, node in nodes.items() if word in cfg.MODEL.BACKBONE.NAME]
    return found[0] if found else "VOVNET"
