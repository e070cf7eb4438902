# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training and evaluating what a LazyConfig describes: ``tools/lazyconfig_train_net.py``."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, LazyCall
from detectron2.data import DatasetMapper
from detectron2.data.common import DatasetFromList
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..data.copy_paste import CopyPaste
from ..data.mapper import Mapper
from ..data.oversampling import build_sampler
from ..data.stream import TrainingStream, goes_to_gpu
from ..data.unreadable import ReadableOnly, image_roots
from ..data.workers import attend_to_workers
from ..errors import UserValueError
from .arguments import base_parser
from .coco_evaluators import convert_anew
from .data_checks import check_data, check_stream
from .distillation import add_teacher_argument
from .evaluation import check_evaluators
from .fitting import add_fitting_arguments, refuse_to_fit
from .initial_weights import check_initialisation
from .launch import launch_command
from .lazy_config import (
    as_yaml_options,
    in_lazy_terms,
    instantiate,
    load_lazy_config,
    to_cfg,
    write_back,
)
from .lazy_fitting import fit_lazy_config
from .memory_format import to_memory_format
from .num_classes import instance_class_keys
from .own_data import add_own_data_arguments
from .precision import predict_in_float32
from .registered_data import explain_loading, register_data, register_package_data
from .rehearsal import rehearse_evaluation
from .run import run_task
from .run_checks import check_run
from .task import Task
from .trainer import Trainer

logger = logging.getLogger(__name__)

_DATASET_MAPPER = f"{DatasetMapper.__module__}.{DatasetMapper.__qualname__}"

_EXAMPLES = """
Examples:

Eight GPUs of a machine:
    $ python tools/lazyconfig_train_net.py --num-gpus 8 --config-file FILE.py

Other values, below the config's names:
    $ python tools/lazyconfig_train_net.py --config-file FILE.py optimizer.lr=0.001 \\
        train.init_checkpoint=/path/to/weights.pth
"""


def build_train_stream(
    dataset: list[dict[str, Any]],
    *,
    mapper: Callable[[dict[str, Any]], Any],
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    repeat_threshold: float = 0.0,
    copy_paste: float = 0.0,
) -> TrainingStream:
    """Build a training loader that can be resumed exactly.

    The arguments are those of :func:`detectron2.data.build_detection_train_loader`.

    Args:
        repeat_threshold: images of rare classes come more often, by Detectron2's
            RepeatFactorTrainingSampler. A class is rare if less than this share of the images has
            it; 0 repeats none.
        copy_paste: the probability with which objects of another image are pasted into an image, as
            :class:`~vovnet_d2.data.copy_paste.CopyPaste` does.
    """
    records = DatasetFromList(dataset, copy=False)
    if copy_paste:
        mapper = CopyPaste(mapper, records, copy_paste)
    return TrainingStream(
        records,
        lambda: build_sampler(dataset, repeat_threshold),
        total_batch_size,
        mapper=mapper,
        group_by_shape=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=list,
    )


class LazyTrainer(Trainer):
    """A :class:`Trainer` whose parts a LazyConfig describes.

    :meth:`of` makes the class for a LazyConfig, because the methods that build parts are class
    methods.

    Attributes:
        config: the LazyConfig, with ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader``
            and ``train``. Without a ``dataloader.evaluator``, the metadata of the data set name the
            evaluator.
    """

    config: ClassVar[DictConfig]

    @staticmethod
    def of(config: DictConfig) -> type[LazyTrainer]:
        """Return the class of trainers for a LazyConfig."""
        return type("LazyTrainer", (LazyTrainer,), {"config": config})

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = instantiate(cls.config, "model")
        logger.info("Model:\n%s", model)
        return to_memory_format(predict_in_float32(model.to(cfg.MODEL.DEVICE), cfg), cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        config = copy.deepcopy(cls.config)
        config.optimizer.params.model = model
        return maybe_add_gradient_clipping(cfg, instantiate(config, "optimizer"))

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        multiplier = instantiate(cls.config, "lr_multiplier")
        return LRMultiplier(optimizer, multiplier=multiplier, max_iter=cfg.SOLVER.MAX_ITER)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        config = copy.deepcopy(cls.config)
        _name_unreadable_images(config.dataloader.train, cfg.DATASETS.TRAIN)
        with explain_loading():
            loader = instantiate(config, "dataloader.train")
        if isinstance(loader, TrainingStream):
            loader.pin_memory = goes_to_gpu(cfg)
        check_stream(cfg, loader)
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        config = copy.deepcopy(cls.config)
        config.dataloader.test.dataset.names = dataset_name
        _name_unreadable_images(config.dataloader.test, [dataset_name])
        loader = instantiate(config, "dataloader.test")
        return attend_to_workers(loader)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, *, suffix: str = ""
    ) -> DatasetEvaluator:
        config = copy.deepcopy(cls.config)
        if "evaluator" not in config.dataloader:
            return super().build_evaluator(cfg, dataset_name, suffix=suffix)
        if folder := config.dataloader.evaluator.get("output_dir"):
            config.dataloader.evaluator.output_dir = f"{folder}{suffix}"
            convert_anew(dataset_name, f"{folder}{suffix}")
        return instantiate(config, "dataloader.evaluator")


def _name_unreadable_images(loader: DictConfig, names: Sequence[str]) -> None:
    """Let the mapper in the description of a loader, which is changed, name the images of its data
    sets that it cannot read."""
    if loader.get("mapper") is not None:  # a loader of the user may have no mapper
        if loader.mapper.get("_target_") in (DatasetMapper, _DATASET_MAPPER):
            loader.mapper._target_ = Mapper  # it reads files as all tools of this package do
        loader.mapper = LazyCall(ReadableOnly)(mapper=loader.mapper, roots=image_roots(names))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of ``tools/lazyconfig_train_net.py``, in as many processes as it asks
    for. For the exit see :func:`launch_command`."""
    launch_command(run, lazy_argument_parser(), argv)


def lazy_argument_parser() -> argparse.ArgumentParser:
    """Return the parser of ``tools/lazyconfig_train_net.py``.

    It has those arguments of ``tools/train_net.py`` that apply to a LazyConfig. Overrides such as
    ``train.max_iter=1000`` follow them.
    """
    unsafe_help = "let the config.yaml of a training call functions of any package"
    parser, _ = base_parser(_EXAMPLES, unsafe_help=unsafe_help)
    add_own_data_arguments(parser)
    add_fitting_arguments(parser)
    add_teacher_argument(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate a LazyConfig in this process; see :func:`run_task`."""
    refuse_to_fit(args)
    return run_task(LazyTask(args))


class LazyTask(Task):
    """A run that a LazyConfig describes.

    Attributes:
        config: the LazyConfig. The data and the command line complete it.
    """

    config: DictConfig

    def load(self) -> CfgNode:
        register_package_data()  # a Python file may look up the metadata of these data sets
        args = self.args
        self.config = load_lazy_config(
            args.config_file, args.opts, allow_unsafe_yaml=args.allow_unsafe_yaml
        )
        for part, file in zip(("teacher", "weights"), args.teacher or (), strict=False):
            OmegaConf.update(self.config, f"train.distillation.{part}", file)
        self.trainer = LazyTrainer.of(self.config)
        return to_cfg(self.config)

    def translating_errors(self, cfg: CfgNode) -> AbstractContextManager[None]:
        return in_lazy_terms(cfg)

    def check(self, cfg: CfgNode, *, resuming: bool) -> None:
        self.config.train.output_dir = cfg.OUTPUT_DIR
        check_run(cfg, training=self.training)
        backbone = instantiate(self.config, "model.backbone")
        check_initialisation(cfg, training=self.training, resuming=resuming, backbone=backbone)
        self._register_data(cfg)
        check_data(cfg, training=self.training)
        if "evaluator" not in self.config.dataloader:
            check_evaluators(cfg)
        rehearse_evaluation(cfg, self.trainer)

    def _register_data(self, cfg: CfgNode) -> None:
        """Register the data sets of annotation files, including those of an earlier run. If the
        command line gives annotation files, set the data sets and the number of categories.
        """
        args = self.args
        given = bool(args.train_annotations or args.val_annotations)
        if cfg.MODEL.KEYPOINT_ON and given:
            raise UserValueError(
                "The mapper of a LazyConfig has the keypoints that are swapped in a mirrored "
                "picture (keypoint_hflip_indices), which annotation files do not reach: give "
                "keypoints of your own to tools/train_net.py, with a YAML file."
            )
        words = {**vars(args), "opts": as_yaml_options(args.opts)}
        register_data(cfg, argparse.Namespace(**words), training=self.training)
        if given:
            data_sets = ("DATASETS.TRAIN", "DATASETS.TEST", "DATASETS.OWN")
            write_back(self.config, cfg, [*data_sets, *instance_class_keys()])
            # Detectron2's evaluator would count categories by their ids. The metadata of the data
            # set name another evaluator.
            self.config.dataloader.pop("evaluator", None)

    def fit(self, cfg: CfgNode, *, resuming: bool) -> None:
        fit_lazy_config(self.config, cfg, self.args, resuming=resuming)

    def saved_config(self, cfg: CfgNode) -> DictConfig:
        return self.config
