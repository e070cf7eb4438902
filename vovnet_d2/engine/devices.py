# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The device that a run computes on: ``MODEL.DEVICE`` and ``--device``."""

import argparse
import logging

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..errors import UserValueError

logger = logging.getLogger(__name__)


def check_device(cfg: CfgNode) -> None:
    """Choose and check ``MODEL.DEVICE``; see :func:`choose_device`. Raise ValueError if there is no
    such device, or if several processes cannot share it."""
    choose_device(cfg)
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    if on_cpu and torch.cuda.is_available() and comm.get_world_size() > 1:
        raise UserValueError(
            "MODEL.DEVICE is cpu in several processes, which talk to each other through the GPUs "
            "there are: hide these with CUDA_VISIBLE_DEVICES=''."
        )


def choose_device(cfg: CfgNode) -> None:
    """Set ``MODEL.DEVICE`` to cpu, with a warning, if it is a GPU and torch finds no GPU. Raise
    ValueError if torch cannot use the device."""
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
    """Read the value of ``--device``: the CPU, or a GPU that torch finds. Raise ArgumentTypeError
    for any other value."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    choices = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if text not in choices:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device that torch finds here: choose from {', '.join(choices)}"
        )
    return torch.device(text)
