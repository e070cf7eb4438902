# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The config keys that this package adds to Detectron2's, and the config files it ships."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from detectron2.config import CfgNode

from .modeling.build import require_own_builders
from .modeling.specs import VoVNetSpec

__all__ = ["add_vovnet_config", "get_config_file"]

_SUFFIXES = (".yaml", ".py")


def add_vovnet_config(cfg: CfgNode) -> None:
    """Add this package's keys, with their defaults, to a Detectron2 config.

    Keys that are there already, from an earlier call or from another VoVNet project, keep their
    values.

    Raises:
        KeyError: another package has registered the names of our backbones; see
            :func:`vovnet_d2.register_backbones`.
    """
    require_own_builders()
    cfg.MODEL.setdefault("VOVNET", CfgNode())
    for key, value in _vovnet_defaults().items():
        cfg.MODEL.VOVNET.setdefault(key, value)
    cfg.MODEL.setdefault("FCOS", CfgNode())
    for key, value in _fcos_defaults().items():
        cfg.MODEL.FCOS.setdefault(key, value)
    # Keep the network's tensors in channels-last order, which its convolutions are faster in.
    cfg.MODEL.setdefault("CHANNELS_LAST", True)
    # The type that SOLVER.AMP.ENABLED and TEST.AMP.ENABLED compute in: "float16" (GPU), "bfloat16",
    # or "auto", which is float16 on a GPU, as Detectron2 has it, and bfloat16 on a CPU.
    cfg.SOLVER.AMP.setdefault("DTYPE", "auto")
    # How many checkpoints of a training to keep, the newest; 0 is all. Beside them stay
    # model_best.pth and model_final.pth.
    cfg.SOLVER.setdefault("CHECKPOINTS_KEPT", 0)
    # Steps with a loss that is infinite or not a number: so many of a training are left out, with
    # a warning and a record of each; the next ends it. float16's loss scaling, which leaves out
    # steps of infinite gradients, does not count.
    cfg.SOLVER.setdefault("MAX_SKIPPED_STEPS", 0)
    # Evaluate in mixed precision.
    cfg.TEST.setdefault("AMP", CfgNode())
    cfg.TEST.AMP.setdefault("ENABLED", False)
    # Who evaluates COCO-format data sets: "pycocotools", "faster-coco-eval" (the same results in
    # less time), or "auto", which is faster-coco-eval where it is installed.
    cfg.TEST.setdefault("COCO_API", "auto")


def _vovnet_defaults() -> CfgNode:
    node = CfgNode()
    # The variant: a key of vovnet_d2.VOVNET_SPECS.
    node.CONV_BODY = "V-39-eSE"
    # Maps to return: any of "stem", "stage2" to "stage5". Later stages are not built.
    node.OUT_FEATURES = ["stage2", "stage3", "stage4", "stage5"]
    # A norm that Detectron2 knows ("FrozenBN", "BN", "SyncBN", "GN", ...; "" is none).
    node.NORM = "FrozenBN"
    # Deformable 3x3 convolutions in stages 2 to 5; modulated ones (DCNv2) or not; their groups.
    node.STAGE_WITH_DCN = (False, False, False, False)
    node.WITH_MODULATED_DCN = False
    node.DEFORMABLE_GROUPS = 1
    # 2 keeps stage5 at stage4's resolution (output stride 16), as RES5_DILATION does for ResNet.
    node.STAGE5_DILATION = 1
    # What P6 and P7 of `build_retinanet_vovnet_fpn_backbone` are made from: "stage5" or "p5".
    node.TOP_BLOCK_IN_FEATURE = "stage5"
    # Written in the YAML files of other VoVNet projects, where nothing reads them either.
    node.OUT_CHANNELS = 256
    node.BACKBONE_OUT_CHANNELS = 256
    # Every field of VoVNetSpec, in capitals (STEM, RESIDUAL, ESE, DEPTHWISE, BOTTLENECK and the
    # widths); None leaves it as CONV_BODY has it.
    for field in fields(VoVNetSpec):
        node[field.name.upper()] = None
    return node


def _fcos_defaults() -> CfgNode:
    node = CfgNode()
    node.NUM_CLASSES = 80
    # Levels above p5 that `build_fcos_vovnet_fpn_backbone` makes: 2 (p6, p7), 1 (p6) or 0.
    node.TOP_LEVELS = 2
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions before the predictions, in each of the head's two branches, and their norm.
    node.NUM_CONVS = 4
    node.NORM = "GN"
    # Class score that every place starts with.
    node.PRIOR_PROB = 0.01
    # Centre sampling: places nearer to an object's centre than this many strides are positive.
    node.POS_RADIUS = 1.5
    # Alpha and gamma of the focal loss.
    node.LOSS_ALPHA = 0.25
    node.LOSS_GAMMA = 2.0
    # Detections need this score, the square root of class score times centerness; the best of each
    # level go to NMS with this IoU, and TEST.DETECTIONS_PER_IMAGE of what is left are returned.
    node.INFERENCE_TH_TEST = 0.2
    node.PRE_NMS_TOPK_TEST = 1000
    node.NMS_TH = 0.6
    return node


def get_config_file(name: str) -> str:
    """
    Args:
        name: a config file of this package, relative to its ``configs`` folder, such as
            ``"COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_3x.yaml"``.

    Returns:
        its path.

    Raises:
        FileNotFoundError: there is no such file; the message names the closest ones.
    """
    package = Path(__file__).parent
    # An installed wheel carries the folder inside; a checkout has it beside the package.
    root = next((p for p in (package / "configs", package.parent / "configs") if p.is_dir()), None)
    if root is None:
        raise FileNotFoundError(
            f"No configs folder in {package} or beside it: reinstall vovnet_d2 from its repository."
        )
    if (path := root / name).is_file():
        return str(path)
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*.*") if p.suffix in _SUFFIXES)
    close = get_close_matches(name, files, n=3, cutoff=0.3) or files[:3]
    raise FileNotFoundError(f"No config file {name!r} in {root}. Close to it: {', '.join(close)}.")
