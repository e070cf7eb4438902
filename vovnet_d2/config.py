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

__all__ = ["add_vovnet_config", "find_config_folder", "get_config_file"]

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
    for name, defaults in (
        ("SINGLE_SHOT", _single_shot_defaults()),
        ("REFINEDET", _refinedet_defaults()),
        ("TIMM", _timm_defaults()),
        ("TORCHVISION", _torchvision_defaults()),
        ("DENSENET67", _densenet67_defaults()),
        ("PELEENET", _peleenet_defaults()),
    ):
        cfg.MODEL.setdefault(name, CfgNode())
        for key, value in defaults.items():
            cfg.MODEL[name].setdefault(key, value)
    # Data sets in COCO's format beside those that programs register, each a dictionary: "name";
    # "json" and "images", its annotation file and folder; "categories", the names in the order of
    # the network's outputs, and "category_ids", theirs in the file. --train-annotations writes them
    # here.
    cfg.DATASETS.setdefault("OWN", [])
    # Warp every image to a square of this side, in training and at test; 0 keeps Detectron2's
    # INPUT.MIN_SIZE_TRAIN and so on. INPUT.RANDOM_FLIP holds with both.
    cfg.INPUT.setdefault("FIXED_SIZE", 0)
    # Train with SSD's augmentation (colours, expansion, crops), which needs FIXED_SIZE.
    cfg.INPUT.setdefault("SSD_AUGMENTATION", False)
    # Keep the tensors of the network in channels-last order in training, or in the usual NCHW order
    # (True or False). None takes what is faster: NCHW on CPUs without AVX-512 and with keypoint
    # heads, which need it, and channels-last otherwise.
    cfg.MODEL.setdefault("CHANNELS_LAST", None)
    # The type that SOLVER.AMP.ENABLED and TEST.AMP.ENABLED compute in: "float16" (GPU), "bfloat16",
    # or "auto", which is float16 on a GPU, as Detectron2 has it, and bfloat16 on a CPU.
    cfg.SOLVER.AMP.setdefault("DTYPE", "auto")
    # "SGD", or "AdamW", which decays biases and norms only as far as WEIGHT_DECAY_BIAS and
    # WEIGHT_DECAY_NORM say.
    cfg.SOLVER.setdefault("OPTIMIZER", "SGD")
    # How many checkpoints of a training to keep, the newest; 0 is all. Beside them stay
    # model_best.pth and model_final.pth.
    cfg.SOLVER.setdefault("CHECKPOINTS_KEPT", 0)
    # Steps with a loss that is infinite or not a number: so many of a training are left out, with
    # a warning and a record of each; the next ends it. float16's loss scaling, which leaves out
    # steps of infinite gradients, does not count.
    cfg.SOLVER.setdefault("MAX_SKIPPED_STEPS", 0)
    # Training images that cannot be read, or are of another size than the annotations say: so many
    # different ones are left out by a process, with a warning each; the next ends the training.
    cfg.DATALOADER.setdefault("MAX_UNREADABLE", 0)
    # End a training whose metric (mask AP, or box AP where there are no masks) has not risen in so
    # many evaluations, TEST.EVAL_PERIOD apart; 0 never does. model_best.pth stays.
    cfg.TEST.setdefault("PATIENCE", 0)
    # Evaluate in mixed precision.
    cfg.TEST.setdefault("AMP", CfgNode())
    cfg.TEST.AMP.setdefault("ENABLED", False)
    # Evaluate (--eval-only) what vovnet_d2.optimize_for_inference makes of the model, in float32.
    cfg.TEST.setdefault("OPTIMIZE", False)
    # What runs the backbone, FPN and dense head in --eval-only, in Predictor and in the demo, the
    # rest being torch's: "torch", "openvino", "onnxruntime", "tensorrt", or "auto", which is the
    # fastest of those that are installed.
    cfg.TEST.setdefault("BACKEND", "torch")
    # The file of tools/export_model.py --int8 that the backend is to run; "" computes in float32.
    cfg.TEST.setdefault("INT8", "")
    # Height and width in pixels of the tiles that an image is cut into, where small objects should
    # keep their pixels; () for none. Each tile is then resized as an image is.
    cfg.TEST.setdefault("TILES", ())
    # The least share of its side that a tile has in common with the next.
    cfg.TEST.setdefault("TILE_OVERLAP", 0.2)
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
    # Keep only the input of the stem and of each OSA block for the backward pass, which computes
    # them a second time: a sixth of the memory for activations, and one more forward pass.
    node.CHECKPOINT_BLOCKS = False
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


def _single_shot_defaults() -> CfgNode:
    """Of the meta-architectures SingleShotDetector and RefineDet."""
    node = CfgNode()
    node.NUM_CLASSES = 80  # without background
    # Maps of the backbone that are read, the finest first.
    node.IN_FEATURES = ["stage3", "stage4", "stage5"]
    # Norm of the layers that are added to the backbone.
    node.NORM = "BN"
    # How much of each batch's statistics the batch norms' running ones take in, the backbone's
    # norms included; the paper's 0.001 needs thousands of iterations.
    node.NORM_MOMENTUM = 0.001
    # IoU below which an anchor is background, and from which on it belongs to the object.
    node.IOU_THRESHOLDS = [0.5, 0.5]
    # Mined negatives for each positive.
    node.NEGATIVE_RATIO = 3.0
    # Of dx, dy, dw, dh: one over SSD's variances.
    node.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # Of each class, this many best boxes above the threshold go to NMS, and of all classes
    # TEST.DETECTIONS_PER_IMAGE are returned.
    node.SCORE_THRESH_TEST = 0.01
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = 0.45
    # The rest is SingleShotDetector's only.
    # Stages behind the last map: their output widths, "dsod" (half pooled) or "ssd" (1x1, 3x3), and
    # for "ssd" strides of 2, or 1 for a 3x3 without padding (none means 2 throughout), and widths
    # between 1x1 and 3x3 (none means half of the output's).
    node.EXTRA_CHANNELS = [256, 256, 256]
    node.EXTRA_TYPE = "dsod"
    node.EXTRA_STRIDES = []
    node.EXTRA_REDUCED_CHANNELS = []
    # Pixels from one place of a map to the next as `SSDAnchorGenerator` counts them, one for each
    # map; none takes the maps' strides.
    node.ANCHOR_STEPS = []
    # Initial scale of the maps' L2 normalisation; 0 is none.
    node.L2_NORM_SCALE = 0.0
    # Residual block before the predictors: widths of its output and bottleneck, or none.
    node.BLOCK_CHANNELS = []
    # Kernel of the predictors, and their norm ("" gives them a bias).
    node.PREDICTOR_KERNEL = 3
    node.PREDICTOR_NORM = ""
    return node


def _refinedet_defaults() -> CfgNode:
    """Of RefineDet, beside those of MODEL.SINGLE_SHOT, whose thresholds are the second step's."""
    node = CfgNode()
    # Of the first step, as SINGLE_SHOT.IOU_THRESHOLDS.
    node.ARM_IOU_THRESHOLDS = [0.5, 0.5]
    # Anchors of less objectness take no part in the second step.
    node.OBJECTNESS_THRESHOLD = 0.01
    # Widths: of the stage of stride 64, of the transfer connections, and of the residual blocks
    # before the predictors.
    node.EXTRA_CHANNELS = 512
    node.TCB_CHANNELS = 256
    node.HEAD_CHANNELS = 1024
    return node


def _timm_defaults() -> CfgNode:
    """Of `build_timm_backbone` and its forms with FPN."""
    node = CfgNode()
    node.NAME = ""  # as timm.create_model takes it
    # Maps to return, named after their strides: "stage1" of stride 2 to "stage5" of stride 32.
    node.OUT_FEATURES = ["stage2", "stage3", "stage4", "stage5"]
    # "BN" leaves the network's norms as they are; batch norms can be "FrozenBN" or "SyncBN".
    node.NORM = "BN"
    # Start from timm's weights, unless MODEL.WEIGHTS is set. INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD
    # must be theirs.
    node.PRETRAINED = False
    # What P6 and P7 of `build_retinanet_timm_fpn_backbone` are made from: "stage5" or "p5".
    node.TOP_BLOCK_IN_FEATURE = "stage5"
    # Further arguments of timm.create_model by their names, {drop_path_rate: 0.1} for example.
    node.ARGUMENTS = CfgNode(new_allowed=True)
    return node


def _torchvision_defaults() -> CfgNode:
    """Of `build_torchvision_backbone`."""
    node = CfgNode()
    node.NAME = ""  # as torchvision.models.get_model takes it
    # Nodes whose outputs are returned, one of each stride, the finest first; their maps are named
    # after the strides, as MODEL.TIMM's.
    node.NODES = []
    # As MODEL.TIMM's.
    node.NORM = "BN"
    node.PRETRAINED = False
    return node


def _densenet67_defaults() -> CfgNode:
    node = CfgNode()
    node.NORM = "BN"
    return node


def _peleenet_defaults() -> CfgNode:
    node = CfgNode()
    node.NORM = "BN"
    # Any of "stem", "stage2" (stride 4) to "stage5" (stride 32).
    node.OUT_FEATURES = ["stage2", "stage3", "stage4", "stage5"]
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
    root = find_config_folder()
    if (path := root / name).is_file():
        return str(path)
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*.*") if p.suffix in _SUFFIXES)
    same = [file for file in files if Path(file).name == Path(name).name]
    close = [*dict.fromkeys(same + get_close_matches(name, files, n=3, cutoff=0.3))][:3]
    raise FileNotFoundError(
        f"No config file {name!r} in {root}. Close to it: {', '.join(close or files[:3])}."
    )


def find_config_folder() -> Path:
    """Return the folder of the config files of this package.

    Raises:
        FileNotFoundError: there is none.
    """
    package = Path(__file__).parent
    # An installed wheel carries the folder inside; a checkout has it beside the package.
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"No configs folder in {package} or beside it: reinstall vovnet_d2 from its repository."
    )
