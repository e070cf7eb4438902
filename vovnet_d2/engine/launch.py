# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What one process of a training or evaluation run does."""

from __future__ import annotations

import argparse
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_setup

from ..data import register_digits
from .config import load_config
from .trainer import Trainer

__all__ = ["main"]


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, or evaluate with ``--eval-only``; returns the results of the evaluation."""
    register_digits()
    cfg = load_config(args)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    return trainer._last_eval_results
