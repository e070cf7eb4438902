# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""LazyConfigs are loaded from a file and overrides, and read under the keys of YAML files."""

import builtins
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.config import instantiate as detectron2_instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError, UserKeyError, UserValueError, one_line
from ..words import suggest
from .config import find_config, get_value, is_lazy_file, load_config, set_value

_SECTIONS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")

# The packages that the config.yaml of a training may call without --allow-unsafe-yaml.
_PLAIN_TARGETS = (
    *(f"detectron2.{name}." for name in ("layers", "modeling", "data", "solver", "evaluation")),
    *("vovnet_d2.", "torch.nn.", "torch.optim.", "torchvision.ops.", "fvcore.common."),
)

# The keys that the engine reads, each with its path in a LazyConfig. A config need not have all.
_KEYS = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "LOGGERS": "train.loggers",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "MODEL.CHANNELS_LAST": "train.channels_last",
    "MODEL.VOVNET.NORM": "model.backbone.bottom_up.norm",
    "MODEL.BACKBONE.FREEZE_AT": "model.backbone.bottom_up.freeze_at",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
    "INPUT.FORMAT": "model.input_format",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "INPUT.COPY_PASTE": "dataloader.train.copy_paste",
    "INPUT.MIN_SIZE_TEST": "dataloader.test.mapper.augmentations[0].short_edge_length",
    "INPUT.MAX_SIZE_TEST": "dataloader.test.mapper.augmentations[0].max_size",
    "DATASETS.OWN": "dataloader.own",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "dataloader.train.dataset.filter_empty",
    "DATALOADER.REPEAT_THRESHOLD": "dataloader.train.repeat_threshold",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "SOLVER.COMPILE.ENABLED": "train.compile.enabled",
    "SOLVER.COMPILE.MEMORY_BUDGET": "train.compile.memory_budget",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "train.clip_gradients.enabled",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "train.clip_gradients.clip_type",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "train.clip_gradients.clip_value",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "train.clip_gradients.norm_type",
    "SOLVER.ACCUMULATE": "train.accumulate",
    "SOLVER.EMA": "train.ema",
    "SOLVER.MAX_SKIPPED_STEPS": "train.max_skipped_steps",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.CHECKPOINTS_KEPT": "train.checkpointer.max_to_keep",
    "DISTILLATION.TEACHER": "train.distillation.teacher",
    "DISTILLATION.WEIGHTS": "train.distillation.weights",
    "DISTILLATION.LOSS_WEIGHT": "train.distillation.loss_weight",
    "DISTILLATION.IN_FEATURES": "train.distillation.in_features",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "TEST.PATIENCE": "train.patience",
    "TEST.BACKEND": "train.backend",
    "TEST.INT8": "train.int8",
}
# The keys of the heads in the same way, for the meta-architectures that have them.
_HEAD_KEYS = {
    "GeneralizedRCNN": {
        "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
        "TEST.DETECTIONS_PER_IMAGE": "model.roi_heads.box_predictor.test_topk_per_image",
    },
    "PanopticFPN": {
        "TEST.DETECTIONS_PER_IMAGE": "model.roi_heads.box_predictor.test_topk_per_image",
        "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "model.sem_seg_head.num_classes",
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": "model.sem_seg_head.ignore_value",
    },
    "SemanticSegmentor": {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "model.sem_seg_head.num_classes",
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": "model.sem_seg_head.ignore_value",
    },
    "RetinaNet": {
        "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
        "TEST.DETECTIONS_PER_IMAGE": "model.max_detections_per_image",
    },
    "FCOS": {
        "MODEL.FCOS.NUM_CLASSES": "model.num_classes",
        "TEST.DETECTIONS_PER_IMAGE": "model.max_detections_per_image",
    },
}


def load_lazy_config(
    config_file: str, overrides: Sequence[str] = (), *, allow_unsafe_yaml: bool = False
) -> DictConfig:
    """Load a LazyConfig, and change its values by overrides.

    Args:
        config_file: path of a Python file, its name among this package's files, or the config.yaml
            of a training. A Python file is run: load only files that you have read.
        overrides: ``["path.to.key=value", ...]`` in Hydra's grammar; ``+path.to.key=value`` for a
            key that is not there yet.
        allow_unsafe_yaml: let a config.yaml call functions of any package.

    Raises:
        FileNotFoundError: there is no such file.
        KeyError: a key does not exist.
        ValueError: the file is no LazyConfig, lacks a part, or a value does not fit its key.
    """
    if not config_file:
        raise UserValueError(
            "There is no config: give --config-file with a LazyConfig, a .py file."
        )
    path = find_config(config_file)
    if not is_lazy_file(path):
        raise UserValueError(
            f"{path} is no LazyConfig, which is a .py file: tools/train_net.py runs it."
        )
    is_code = path.endswith(".py")
    config = _load_file(path) if is_code else _load_saved(path, allow_unsafe_yaml)
    if missing := [name for name in _SECTIONS if name not in config]:
        raise UserValueError(
            f"LazyConfig {path} lacks {', '.join(missing)}: it needs {', '.join(_SECTIONS)}."
        )
    for override in overrides:
        _apply_override(config, override)
    return config


def _load_file(path: str) -> DictConfig:
    original = builtins.__import__
    try:
        return LazyConfig.load(path)
    except SyntaxError as error:
        reason = error.__cause__ or error
        raise UserValueError(f"LazyConfig {path} is not valid Python: {reason}.") from error
    except ImportError as error:
        raise UserValueError(f"LazyConfig {path} cannot be loaded: {error}") from error
    finally:
        builtins.__import__ = original  # Detectron2 leaves it replaced after an error


def _load_saved(path: str, allow_unsafe: bool) -> DictConfig:
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    strange = [t for t in _targets(content) if not str(t).startswith(_PLAIN_TARGETS)]
    if strange and not allow_unsafe:
        raise UserValueError(
            f"{path} calls {strange[0]}, which is not of Detectron2 or this package and could do "
            "anything. If you trust the file, add --allow-unsafe-yaml, or give the .py file that "
            "the training was started with."
        )
    return OmegaConf.create(content, flags={"allow_objects": True})


def _targets(node: Any) -> Iterator[Any]:
    """Yield everything that a LazyConfig calls."""
    if isinstance(node, dict) and "_target_" in node:
        yield node["_target_"]
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in values:
        yield from _targets(value)


def as_yaml_options(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that YAML files have a key for, as options for a YAML file."""
    keys = {path: key for key, path in _all_keys()}
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return [word for path, _, value in pairs if path in keys for word in (keys[path], value)]


def _all_keys() -> Iterator[tuple[str, str]]:
    """Yield the keys of YAML files, each with its path in a LazyConfig."""
    for known in (_KEYS, *_HEAD_KEYS.values()):
        yield from known.items()


def write_back(config: DictConfig, cfg: CfgNode, wanted: Sequence[str]) -> None:
    """Copy the values of some keys from a config to the LazyConfig."""
    for key, path in paths_of(cfg).items():
        if key in wanted:
            value = get_value(cfg, key)
            OmegaConf.update(config, path, list(value) if isinstance(value, tuple) else value)


def _apply_override(config: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals or override.startswith("-"):
        paths = [path for yaml_key, path in _all_keys() if yaml_key == key]
        hint = f" For {key}, write {' or '.join(f'{path}=VALUE' for path in paths)}." * bool(paths)
        raise UserValueError(
            f"{override!r} is no override of a LazyConfig: these are words such as "
            f"train.max_iter=1000, after all other arguments.{hint}"
        )
    adds, key = key.startswith("+"), key.lstrip("+")
    known = set(_leaves(config))
    if not adds and key not in known and _select(config, key) is None:  # may go through lists
        raise UserKeyError(
            f"The LazyConfig has no {key}.{suggest(key, known)} To give an argument that is not "
            f"there, write +{key}=..."
        )
    before = None if adds else _select(config, key)
    try:
        LazyConfig.apply_overrides(config, [override])
    except Exception as error:  # Hydra's parser, OmegaConf and Detectron2 raise many kinds
        raise UserValueError(f"Override {override}: {one_line(error)}.") from error
    after = _select(config, key)
    if not _fits(after, before):
        raise UserValueError(
            f"Override {override}: {after!r} is {type(after).__name__}, and {key} was {before!r}, "
            f"which is {type(before).__name__}."
        )


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(node, DictConfig):
        return
    for key in map(str, node):
        yield prefix + key
        yield from _leaves(node._get_node(key), f"{prefix}{key}.")


def _select(config: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None


def _fits(value: Any, before: Any) -> bool:
    """Return True if a value may replace another one: both are of one kind, or one is None."""
    if value is None or before is None:
        return True
    kinds: tuple[Any, ...] = (bool, str, Real, ListConfig, DictConfig)
    kind = next((kind for kind in kinds if isinstance(before, kind)), object)
    if isinstance(before, int) and not isinstance(before, bool):
        kind = int
    # The name of a variant may stand for its spec.
    if isinstance(before, DictConfig) or (
        isinstance(before, str) and isinstance(value, DictConfig)
    ):
        return True
    return isinstance(value, kind) and isinstance(value, bool) == isinstance(before, bool)


def instantiate(config: DictConfig, key: str) -> Any:
    """Build the object that a key describes. Raise ValueError if the called function does not have
    the given arguments, or if a reference leads nowhere."""
    try:
        return detectron2_instantiate(OmegaConf.select(config, key))
    except (OmegaConfBaseException, TypeError) as error:
        raise UserValueError(
            f"{key} of the LazyConfig cannot be built: {one_line(error)}."
        ) from error


def to_cfg(config: DictConfig) -> CfgNode:
    """Return the part of a LazyConfig that the engine reads, under the keys of YAML files. Raise
    ValueError if a reference in the config leads nowhere.

    This part says where files go, how long the training is, and which data it takes. It does not
    say how the model is built.
    """
    cfg = load_config()
    cfg.MODEL.META_ARCHITECTURE = name_of_target(config.model)
    _describe_backbone(cfg, config)
    heads = OmegaConf.select(config, "model.roi_heads") or {}
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = "mask_head" in heads, "keypoint_head" in heads
    for key, path in paths_of(cfg).items():
        try:
            value = OmegaConf.select(config, path)
        except OmegaConfBaseException as error:
            raise UserValueError(f"{path} of the LazyConfig: {one_line(error)}.") from error
        if value is not None or key in ("DATASETS.TRAIN", "DATASETS.TEST"):
            _set(cfg, key, value)
    warmup = OmegaConf.select(config, "lr_multiplier.warmup_length")
    cfg.SOLVER.WARMUP_ITERS = round((warmup or 0) * cfg.SOLVER.MAX_ITER)
    cfg.SOLVER.STEPS = ()
    if cfg.DATALOADER.REPEAT_THRESHOLD:
        cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    return cfg


def name_of_target(node: DictConfig) -> str:
    """Return the name of what a node calls; empty if it calls nothing."""
    target = node.get("_target_", "")
    return target.rpartition(".")[2] if isinstance(target, str) else target.__name__


def _describe_backbone(cfg: CfgNode, config: DictConfig) -> None:
    """Describe the backbone well enough for the checks to suggest weights."""
    node = OmegaConf.select(config, "model.backbone.bottom_up")
    if isinstance(node, DictConfig) and name_of_target(node) == "VoVNet":
        cfg.MODEL.BACKBONE.NAME = "build_vovnet_fpn_backbone"
        spec = node.spec.get("spec") if isinstance(node.spec, DictConfig) else node.spec
        cfg.MODEL.VOVNET.CONV_BODY = spec if isinstance(spec, str) else ""


def paths_of(cfg: CfgNode) -> dict[str, str]:
    """Return the paths in a LazyConfig of all values that the engine reads, by the keys of YAML
    files. ``cfg`` is what :func:`to_cfg` makes of the LazyConfig."""
    return _KEYS | _HEAD_KEYS.get(cfg.MODEL.META_ARCHITECTURE, {})


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    if isinstance(value, ListConfig):
        value = OmegaConf.to_container(value)
    if key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        value = (value,) if isinstance(value, str) else tuple(value or ())
    set_value(cfg, key, value)


@contextmanager
def in_lazy_terms(cfg: CfgNode) -> Iterator[None]:
    """Replace the keys of YAML files in errors of the engine by the keys of a LazyConfig."""
    try:
        yield
    except UserError as error:
        message = _translate(str(error), paths_of(cfg))
        if message == str(error):
            raise
        raise type(error)(message) from error


def _translate(message: str, keys: dict[str, str]) -> str:
    for flag in ("; --auto-scale-lr fits the config's", ", with --auto-scale-lr"):
        message = message.replace(flag, "")  # only tools/train_net.py has this argument
    message = message.replace(
        "SOLVER.WARMUP_ITERS", "lr_multiplier.warmup_length × train.max_iter:"
    )
    for key, path in sorted(keys.items(), reverse=True):
        message = re.sub(rf"\b{re.escape(key)}\b", path, message)
    return message
