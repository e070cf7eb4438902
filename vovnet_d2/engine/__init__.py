# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation on top of Detectron2's trainer, hooks and evaluators."""

from .config import load_config
from .detection import argument_parser, main, run
from .evaluation import build_evaluator
from .trainer import Trainer

__all__ = ["Trainer", "argument_parser", "build_evaluator", "load_config", "main", "run"]
