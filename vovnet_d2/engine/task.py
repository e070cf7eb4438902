# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The kinds of runs: how the config of a run is read, checked and fitted to its data."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from detectron2.config import CfgNode
from omegaconf import DictConfig

from .config import find_config, load_config
from .run_checks import check_config
from .scaling import report_scaling, scale_to_batch, warn_of_unscaled_batch
from .trainer import Trainer


class Task:
    """A run of one kind. :func:`~vovnet_d2.engine.run.run_task` calls the methods in this order.

    Attributes:
        args: the arguments of the command line.
        trainer: the class of the trainer.
    """

    trainer: type[Trainer] = Trainer

    def __init__(self, args: argparse.Namespace):
        self.args = args

    @property
    def training(self) -> bool:
        """Return True for a training, and False for an evaluation."""
        return not self.args.eval_only

    def load(self) -> CfgNode:
        """Return the config of the run, under the keys of YAML files."""
        raise NotImplementedError

    def translating_errors(self, cfg: CfgNode) -> AbstractContextManager[None]:
        """Return a context in which errors name the keys of the user's config."""
        return nullcontext()

    def check(self, cfg: CfgNode, *, resuming: bool) -> None:
        """Check the config, the weights and the data. The data may complete the config.

        Args:
            cfg: the config, with the folder and the device of the run.
            resuming: True if a checkpoint is loaded that an earlier run has left in the folder.

        Raises:
            FileNotFoundError, KeyError, ValueError: the run would fail.
        """
        raise NotImplementedError

    def fit(self, cfg: CfgNode, *, resuming: bool) -> None:
        """Fit the config of a training to its data and its batch. By default nothing changes."""

    def saved_config(self, cfg: CfgNode) -> CfgNode | DictConfig:
        """Return the config that ``OUTPUT_DIR/config.yaml`` keeps."""
        return cfg


class YamlTask(Task):
    """A run that a YAML file and options describe."""

    def add_config(self, cfg: CfgNode) -> None:
        """Add keys to the config that only this kind of run has. By default there are none."""

    def load(self) -> CfgNode:
        args = self.args
        load = partial(
            load_config,
            find_config(args.config_file) if args.config_file else "",
            allow_unsafe_yaml=args.allow_unsafe_yaml,
            add_config=self.add_config,
        )
        self._written = load()
        # With --auto-scale-lr, this config is not used. It is loaded for its error messages.
        cfg = load(args.opts)
        return scale_to_batch(self._written, args.opts) if args.auto_scale_lr else cfg

    def check(self, cfg: CfgNode, *, resuming: bool) -> None:
        check_config(cfg, training=self.training)

    def fit(self, cfg: CfgNode, *, resuming: bool) -> None:
        report = report_scaling if self.args.auto_scale_lr else warn_of_unscaled_batch
        report(self._written, cfg)
