# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A LazyConfig that fits its data."""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from detectron2.data import transforms as T
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from omegaconf import DictConfig, OmegaConf

from ..errors import UserValueError
from .anchors import Anchors, per_level
from .config import find_config, get_value
from .fitting import ANCHOR_KEYS, TrainingData, fit_to_data, loading_data
from .lazy_config import instantiate, load_lazy_config, name_of_target, paths_of, to_cfg, write_back
from .schedule import SCHEDULE_KEYS, Row
from .written import COMMAND_LINE, Written, is_shipped

_WARMUP = "lr_multiplier.warmup_length"
# The schedules of this package's files, of which a user's file may import one.
_SCHEDULES = [
    f"lazy/COCO-Detection/{name}_V_39_eSE_FPN_{length}.py"
    for name in ("faster_rcnn", "retinanet")
    for length in ("1x", "3x")
]


def fit_lazy_config(
    config: DictConfig, cfg: Any, args: argparse.Namespace, *, resuming: bool
) -> None:
    """Fit a LazyConfig, and the ``cfg`` that :func:`to_cfg` makes of it, to its data. For the
    arguments and the errors see :func:`fit_to_data`."""
    paths = paths_of(cfg) | {"SOLVER.WARMUP_ITERS": _WARMUP}
    if generator := _find_generator(config):
        paths |= {key: f"{generator}.{name}" for key, name in _ANCHOR_NAMES.items()}

    def show(row: Row) -> Row:
        times = " × train.max_iter" if paths.get(row.key) == _WARMUP else ""
        return row._replace(key=paths.get(row.key, row.key) + times)

    data = TrainingData(
        load=lambda: _load_records(config),
        augment=lambda: _find_augmentations(config),
        anchors=lambda: _read_anchors(config),
    )
    written = partial(_find_written, args, paths)
    rows = fit_to_data(cfg, args, written, data, resuming=resuming, show=show)
    write_back(config, cfg, [row.key for row in rows])
    for row in rows:
        if row.key in ANCHOR_KEYS:
            OmegaConf.update(config, paths[row.key], row.value)
        if row.key == "SOLVER.WARMUP_ITERS" and OmegaConf.select(config, _WARMUP) is not None:
            OmegaConf.update(config, _WARMUP, min(1.0, row.value / cfg.SOLVER.MAX_ITER))


_ANCHOR_NAMES = dict(zip(ANCHOR_KEYS, ("sizes", "aspect_ratios"), strict=True))


def _load_records(config: DictConfig) -> list[dict[str, Any]]:
    with loading_data():
        return instantiate(config, "dataloader.train.dataset")


def _find_augmentations(config: DictConfig) -> T.AugmentationList:
    mapper = instantiate(config, "dataloader.train.mapper")
    if not isinstance(found := getattr(mapper, "augmentations", None), T.AugmentationList):
        raise UserValueError(
            "--fit-anchors needs to know what training does to its images, and "
            "dataloader.train.mapper has no `augmentations`: leave it out."
        )
    return found


def _read_anchors(config: DictConfig) -> Anchors:
    if not (path := _find_generator(config)):
        raise UserValueError(
            f"--fit-anchors is for the anchors of {DefaultAnchorGenerator.__name__}, which the "
            "model of this LazyConfig does not have: leave it out."
        )
    node: Any = OmegaConf.to_container(OmegaConf.select(config, path), resolve=True)
    strides = node["strides"]
    sizes, ratios = (per_level(node[name], strides) for name in ("sizes", "aspect_ratios"))
    return Anchors(sizes, ratios, strides, node.get("offset", 0.5))


def _find_generator(config: DictConfig) -> str:
    """Return where a LazyConfig has the generator of its anchors; empty if it has none."""
    return next(_find_nodes(config.model, "model", DefaultAnchorGenerator.__name__), "")


def _find_nodes(node: DictConfig, path: str, name: str) -> Iterator[str]:
    if name_of_target(node) == name:
        yield path
    for key in map(str, node):
        if isinstance(child := node._get_node(key), DictConfig):
            yield from _find_nodes(child, f"{path}.{key}", name)


# What the user has set


def _find_written(args: argparse.Namespace, paths: dict[str, str]) -> Written:
    """Tell a user's settings from those of the files that this package comes with.

    A config does not show what its file has imported. So in a user's file, a value counts as the
    user's if no schedule of this package has it.
    """
    path = find_config(args.config_file)
    options = {"allow_unsafe_yaml": args.allow_unsafe_yaml}
    base = to_cfg(load_lazy_config(path, **options))
    given: dict[str, str] = {}
    if not is_shipped(path):
        known = [to_cfg(load_lazy_config(name)) for name in _SCHEDULES]
        for key in SCHEDULE_KEYS:
            others = [get_value(each, key) for each in known]
            if not path.endswith(".py") or get_value(base, key) not in others:
                given[key] = f"set in {path}"
        if "SOLVER.IMS_PER_BATCH" in given and path.endswith(".py"):
            base.SOLVER.IMS_PER_BATCH = known[0].SOLVER.IMS_PER_BATCH
    return Written(base, given | _find_given(args.opts, paths))


def _find_given(overrides: Sequence[str], paths: dict[str, str]) -> dict[str, str]:
    """Return the keys of YAML files that overrides of a LazyConfig set."""
    set_here = [override.partition("=")[0].lstrip("+~") for override in overrides]
    places = {key: [path] for key, path in paths.items()}
    # train.max_iter is the last of them in this package's files.
    places.setdefault("SOLVER.MAX_ITER", []).append("lr_multiplier.scheduler.milestones")
    return {
        key: COMMAND_LINE
        for key, found in places.items()
        if any(_sets(name, path) for name in set_here for path in found)
    }


def _sets(name: str, path: str) -> bool:
    """Return True if an override of ``name`` sets ``path``, a part of it, or a node that has it."""
    return f"{name}.".startswith(f"{path}.") or f"{path}.".startswith(f"{name}.")
