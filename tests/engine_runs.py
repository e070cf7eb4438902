# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of the launcher on the miniature COCO, inside the process of the test."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from detectron2.config import CfgNode
from detectron2.engine import defaults
from torch import nn

from vovnet_d2.engine import Trainer, argument_parser, load_config, report, run

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_V_19_slim_eSE_FPN_3x.yaml"
FASTER_RCNN = "COCO-Detection/faster_rcnn_V_19_slim_eSE_FPN_3x.yaml"
RETINANET = "COCO-Detection/retinanet_V_19_slim_eSE_FPN_3x.yaml"

# Options that let a shipped config train for three iterations on the miniature, without weights.
SHORT = [
    *["MODEL.VOVNET.NORM", "BN", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"],
    *["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"],
    *["SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.002", "SOLVER.WARMUP_ITERS", "0"],
    *["SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "0"],
]
# A network that is so thin that a run takes two seconds. It predicts objects without training.
TINY = [
    *SHORT,
    *["MODEL.VOVNET.STAGE_MID_CHANNELS", "(8, 8, 8, 8)", "MODEL.FPN.OUT_CHANNELS", "16"],
    *["MODEL.VOVNET.STAGE_OUT_CHANNELS", "(8, 8, 8, 8)"],
    *["MODEL.VOVNET.STEM_CHANNELS", "(8, 8, 8)", "MODEL.VOVNET.LAYERS_PER_BLOCK", "1"],
    *["MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"],
    *["MODEL.RPN.PRE_NMS_TOPK_TEST", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"],
    *["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"],
    *["MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"],
    *["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.NUM_CONVS", "1"],
    *["TEST.DETECTIONS_PER_IMAGE", "10", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "50"],
]


def tiny_config(config: str, output_dir: Path, *options: str) -> CfgNode:
    options = (*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output_dir), *options)
    return load_config(config, options)


@contextmanager
def quick_set_up() -> Iterator[None]:
    """Let Detectron2 set runs up in a tenth of the time.

    Keys of a config are looked up in the config, which Detectron2 would write as YAML and read
    again, and the config that is logged has no colours.
    """
    through_yaml = getattr(defaults, "_try_get_key", None)

    def look_up(cfg: Any, *keys: str, default: Any = None) -> Any:
        if not isinstance(cfg, CfgNode):
            return through_yaml(cfg, *keys, default=default)
        for key in keys:
            found = reduce(lambda node, name: (node or {}).get(name), key.split("."), cfg)
            if found is not None:
                return found
        return default

    with (
        mock.patch.object(defaults, "_try_get_key", look_up, create=True),
        mock.patch.object(defaults, "_highlight", lambda code, filename: code, create=True),
    ):
        yield


@contextmanager
def quick(*, pictures: bool = False) -> Iterator[None]:
    """Make runs inside this context take half of their usual time.

    They are set up quickly. The report has no pictures unless ``pictures`` is True.
    """
    draw = report._draw if pictures else lambda *_: None
    with quick_set_up(), mock.patch.object(report, "_draw", draw):
        yield


def launch(
    config: str,
    output_dir: Path,
    *words: str,
    options: list[str] = TINY,
    pictures: bool = False,
) -> dict:
    """Run the launcher. ``words`` are flags and further options, which follow ``options``."""
    flags = [word for word in words if word.startswith("--")]
    more = [word for word in words if not word.startswith("--")]
    options = [*options, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output_dir), *more]
    with quick(pictures=pictures):
        return run(argument_parser().parse_args(["--config-file", config, *flags, *options]))


def read_log(output_dir: Path) -> str:
    return (output_dir / "log.txt").read_text()


def data_flags(root: Path, images: str, *splits: str) -> list[str]:
    """Return the arguments for JSON files below ``root``; ``images`` may have ``{split}`` in it."""
    words = []
    for split in splits:
        words += [f"--{split}-json", str(root / f"{split}.json")]
        words += [f"--{split}-images", str(root / images.format(split=split))]
    return words


def note_evaluated(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Return a list to which each model is added when it is evaluated."""
    evaluated: list[nn.Module] = []
    test_all = Trainer.test_all.__func__
    noted = classmethod(
        lambda cls, cfg, model: evaluated.append(model) or test_all(cls, cfg, model)
    )
    monkeypatch.setattr(Trainer, "test_all", noted)
    return evaluated
