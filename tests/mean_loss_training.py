# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A training that gives the same result however processes share a batch: its loss is a mean over
images, and its norms see one image at a time. Run it in the same way as train_net.py."""

import argparse
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from engine_runs import FASTER_RCNN, TINY
from torch import nn

from vovnet_d2.engine import Trainer, argument_parser
from vovnet_d2.engine.data_checks import check_data
from vovnet_d2.engine.launch import launch_or_exit
from vovnet_d2.engine.registered_data import register_data
from vovnet_d2.engine.run import run_task
from vovnet_d2.engine.task import YamlTask

STEPS = 20
OPTIONS = [
    *TINY,
    *["MODEL.META_ARCHITECTURE", "ObjectCounter", "MODEL.BACKBONE.NAME", "build_vovnet_backbone"],
    *["MODEL.VOVNET.OUT_FEATURES", "['stage3']", "MODEL.VOVNET.NORM", "GN", "MODEL.DEVICE", "cpu"],
    *["SOLVER.MAX_ITER", str(STEPS), "SOLVER.BASE_LR", "0.002", "SOLVER.IMS_PER_BATCH", "4"],
    *["INPUT.MIN_SIZE_TRAIN", "(96,)", "SOLVER.CHECKPOINT_PERIOD", "1000"],
]


@META_ARCH_REGISTRY.register()
class ObjectCounter(nn.Module):
    """Network that learns the number of objects in an image. The loss is the squared error."""

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.head = nn.Linear(self.backbone.output_shape()["stage3"].channels, 1)

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        images = torch.stack([image["image"] for image in batched_inputs])
        features = self.backbone(images.to(self.head.weight.dtype) / 127.5 - 1)["stage3"]
        counts = torch.tensor([[len(image["instances"])] for image in batched_inputs])
        return {"loss": ((self.head(features.mean((2, 3))) - counts) ** 2).mean()}


class DoubleTrainer(Trainer):
    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return super().build_model(cfg).double()


TRAINERS = {"float32": Trainer, "float64": DoubleTrainer}


def train(args: argparse.Namespace) -> None:
    """Train once in each precision. The last option is the folder for the runs.

    After the word THEN come the options of another training, in the same processes.
    """
    end = args.opts.index("THEN") if "THEN" in args.opts else len(args.opts)
    *options, folder = args.opts[:end]
    for name, trainer in TRAINERS.items():
        words = [*OPTIONS, *options, str(Path(folder) / name)]
        own = argparse.Namespace(**{**vars(args), "opts": words})
        run_task(CountingTask(own, trainer))
    if others := args.opts[end + 1 :]:
        train(argparse.Namespace(**{**vars(args), "opts": others}))


class CountingTask(YamlTask):
    def __init__(self, args: argparse.Namespace, trainer: type[Trainer]):
        super().__init__(args)
        self.trainer = trainer

    def check(self, cfg: CfgNode, *, resuming: bool) -> None:
        super().check(cfg, resuming=resuming)
        register_data(cfg, self.args, training=self.training)
        check_data(cfg, training=self.training)


def parse(*words: str) -> argparse.Namespace:
    return argument_parser().parse_args(["--config-file", FASTER_RCNN, *words])


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch_or_exit(train, parse(*sys.argv[1:]))
