# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The config keys that this package adds to Detectron2's, and the config files it ships."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from detectron2.config import CfgNode

from .errors import UserFileNotFoundError
from .modeling.build import require_own_builders
from .modeling.specs import VoVNetSpec
from .words import close_to_it

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
    for name, defaults in (
        ("VOVNET", _vovnet_defaults()),
        ("FCOS", _fcos_defaults()),
        ("SINGLE_SHOT", _single_shot_defaults()),
        ("REFINEDET", _refinedet_defaults()),
        ("TIMM", _timm_defaults()),
        ("TORCHVISION", _torchvision_defaults()),
        ("DENSENET67", CfgNode({"NORM": "BN"})),
        ("PELEENET", _peleenet_defaults()),
    ):
        cfg.MODEL.setdefault(name, CfgNode())
        for key, value in defaults.items():
            cfg.MODEL[name].setdefault(key, value)
    cfg.setdefault("DISTILLATION", CfgNode())
    for key, value in _distillation_defaults().items():
        cfg.DISTILLATION.setdefault(key, value)
    # Custom data sets in COCO's format, which --train-annotations writes here. Each is a dictionary
    # with "name"; "json" and "images", the annotation file and the folder of images; "categories",
    # the names in the order of the network's outputs; "category_ids", their ids in the file.
    cfg.DATASETS.setdefault("OWN", [])
    # Experiment trackers that get the metrics, like TensorBoard: "wandb", "mlflow", "trackio". Each
    # needs its package, which reads its settings from the environment.
    cfg.setdefault("LOGGERS", [])
    # Resize every image to a square of this side in training and evaluation; 0 keeps Detectron2's
    # INPUT.MIN_SIZE_TRAIN and so on. INPUT.RANDOM_FLIP applies in both cases.
    cfg.INPUT.setdefault("FIXED_SIZE", 0)
    # Train with SSD's augmentation (colours, expansion, crops), which needs FIXED_SIZE.
    cfg.INPUT.setdefault("SSD_AUGMENTATION", False)
    # Copy-paste augmentation: the probability with which objects of another training image are
    # pasted into an image. It needs masks (MODEL.MASK_ON).
    cfg.INPUT.setdefault("COPY_PASTE", 0.0)
    # Train with tensors in channels-last order (True) or in NCHW order (False). None takes the
    # faster one: NCHW on CPUs without AVX-512 and for keypoint heads, which need it, and
    # channels-last otherwise.
    cfg.MODEL.setdefault("CHANNELS_LAST", None)
    # Compile the backbone and its FPN by torch.compile for training. The first step then takes
    # minutes. With a memory budget below 1.0, only this share of the feature maps is saved for the
    # backward pass, which computes the others again.
    cfg.SOLVER.setdefault("COMPILE", CfgNode())
    cfg.SOLVER.COMPILE.setdefault("ENABLED", False)
    cfg.SOLVER.COMPILE.setdefault("MEMORY_BUDGET", 1.0)
    # The dtype for SOLVER.AMP.ENABLED and TEST.AMP.ENABLED: "float16" (GPU), "bfloat16", or "auto":
    # bfloat16 on a CPU and on a GPU from Ampere on, float16 with scaled losses on an older GPU.
    cfg.SOLVER.AMP.setdefault("DTYPE", "auto")
    # "SGD" with MOMENTUM and NESTEROV, or another class of torch.optim, such as "AdamW". The weight
    # decay of biases and norms is WEIGHT_DECAY_BIAS and WEIGHT_DECAY_NORM.
    cfg.SOLVER.setdefault("OPTIMIZER", "SGD")
    # Further arguments of that class, as names and values in turn:
    # ["betas", [0.9, 0.98], "eps", 1e-6].
    cfg.SOLVER.setdefault("OPTIMIZER_ARGS", [])
    # Learning rate of a stage of VoVNet, divided by the rate of the next stage. The layers after
    # the backbone have BASE_LR, stage5 has BASE_LR times this number, and the stem BASE_LR times
    # its fifth power. 1.0 is one rate for all.
    cfg.SOLVER.setdefault("LAYER_DECAY", 1.0)
    # Number of parts of a batch that are computed one after the other to save memory. Iterations,
    # learning rate, schedule and log still count batches of IMS_PER_BATCH images.
    cfg.SOLVER.setdefault("ACCUMULATE", 1)
    # Decay of the exponential moving average of the weights, such as 0.9998; 0 keeps no average.
    # After n steps the decay is at most (1 + n) / (10 + n). Both the weights and their average are
    # evaluated (results have "bbox" and "bbox_EMA"). The average is written to model_final_ema.pth
    # and model_best_ema.pth, for MODEL.WEIGHTS. TEST.PATIENCE then uses the average.
    cfg.SOLVER.setdefault("EMA", 0.0)
    # Number of checkpoints to keep, the newest ones; 0 keeps all. model_best.pth and
    # model_final.pth always stay.
    cfg.SOLVER.setdefault("CHECKPOINTS_KEPT", 0)
    # Number of steps with a NaN or infinite loss that a training skips, with a warning and a record
    # of each. The next such step ends the training. Steps that float16's loss scaling skips for
    # their infinite gradients do not count.
    cfg.SOLVER.setdefault("MAX_SKIPPED_STEPS", 0)
    # Number of training images that a process skips, with a warning for each, if they cannot be
    # read or have another size than the annotations say. The next one ends the training.
    cfg.DATALOADER.setdefault("MAX_UNREADABLE", 0)
    # End a training whose metric (mask AP, or box AP without masks) has not risen in this number
    # of evaluations, TEST.EVAL_PERIOD apart; 0 never ends it early. model_best.pth stays.
    cfg.TEST.setdefault("PATIENCE", 0)
    # Evaluate in mixed precision. OpenVINO and TensorRT then compute in half precision, too.
    cfg.TEST.setdefault("AMP", CfgNode())
    cfg.TEST.AMP.setdefault("ENABLED", False)
    # Evaluate (--eval-only) the result of vovnet_d2.optimize_for_inference, in float32.
    cfg.TEST.setdefault("OPTIMIZE", False)
    # The program that runs backbone, FPN and dense head in --eval-only, Predictor and the demo:
    # "torch", "openvino", "onnxruntime", "tensorrt", or "auto", the fastest that is installed.
    # torch runs the rest.
    cfg.TEST.setdefault("BACKEND", "torch")
    # A file of tools/export_model.py --int8 for the backend; "" computes in float32.
    cfg.TEST.setdefault("INT8", "")
    # Height and width in pixels of the tiles that a large image is cut into, so that small objects
    # keep their pixels; () for no tiles. Each tile is then resized like an image.
    cfg.TEST.setdefault("TILES", ())
    # The least overlap of two neighbouring tiles, as a share of the side of a tile.
    cfg.TEST.setdefault("TILE_OVERLAP", 0.2)
    # The package that evaluates COCO-format data sets: "pycocotools", "faster-coco-eval" (the same
    # results in less time), or "auto", which is faster-coco-eval if it is installed.
    cfg.TEST.setdefault("COCO_API", "auto")


def _vovnet_defaults() -> CfgNode:
    node = CfgNode()
    # The variant: a key of vovnet_d2.VOVNET_SPECS.
    node.CONV_BODY = "V-39-eSE"
    # Feature maps to return: any of "stem", "stage2" to "stage5". Later stages are not built.
    node.OUT_FEATURES = ["stage2", "stage3", "stage4", "stage5"]
    # A norm that Detectron2 knows ("FrozenBN", "BN", "SyncBN", "GN", ...; "" is none).
    node.NORM = "FrozenBN"
    # Stages 2 to 5 with deformable 3x3 convolutions, whether these are modulated (DCNv2), and the
    # number of their groups.
    node.STAGE_WITH_DCN = (False, False, False, False)
    node.WITH_MODULATED_DCN = False
    node.DEFORMABLE_GROUPS = 1
    # 2 keeps stage5 at the resolution of stage4 (output stride 16), like ResNet's RES5_DILATION.
    node.STAGE5_DILATION = 1
    # Activation checkpointing: keep only the input of the stem and of each OSA block. Activations
    # take a sixth of the memory, and the backward pass runs one more forward pass.
    node.CHECKPOINT_BLOCKS = False
    # The feature that `build_retinanet_vovnet_fpn_backbone` makes P6 and P7 from: "stage5" or "p5".
    node.TOP_BLOCK_IN_FEATURE = "stage5"
    # YAML files of other VoVNet projects have these keys. No project reads them.
    node.OUT_CHANNELS = 256
    node.BACKBONE_OUT_CHANNELS = 256
    # Every field of VoVNetSpec, in capitals (STEM, RESIDUAL, ESE, DEPTHWISE, BOTTLENECK and the
    # widths); None takes the value of CONV_BODY.
    for field in fields(VoVNetSpec):
        node[field.name.upper()] = None
    return node


def _fcos_defaults() -> CfgNode:
    node = CfgNode()
    node.NUM_CLASSES = 80
    # Levels above p5 that `build_fcos_vovnet_fpn_backbone` makes: 2 (p6, p7), 1 (p6) or 0.
    node.TOP_LEVELS = 2
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Number of convolutions before the predictions in each branch of the head, and their norm.
    node.NUM_CONVS = 4
    node.NORM = "GN"
    # Initial class score of every location.
    node.PRIOR_PROB = 0.01
    # With "center", the locations near the center of an object learn it; with "atss", the locations
    # whose anchors overlap it most (ATSS).
    node.ASSIGNMENT = "center"
    # For "center": locations nearer to the center of an object than this many strides are positive.
    node.POS_RADIUS = 1.5
    # "fcos" is focal loss, GIoU and centerness. "gfl" is generalized focal loss: the class score
    # learns the IoU of the box instead of a centerness, and box sides are distributions.
    node.LOSSES = "fcos"
    # For "gfl": the largest distance from a location to a box side, in strides.
    node.REG_MAX = 16
    # Alpha and gamma of the focal loss; for "gfl" gamma is the beta of its quality focal loss.
    node.LOSS_ALPHA = 0.25
    node.LOSS_GAMMA = 2.0
    # Detections need this score: for "fcos" the square root of class score times centerness, for
    # "gfl" the class score, which is lower (0.05 is usual). The best detections of each level go to
    # NMS with this IoU. The best TEST.DETECTIONS_PER_IMAGE that NMS keeps are returned.
    node.INFERENCE_TH_TEST = 0.2
    node.PRE_NMS_TOPK_TEST = 1000
    node.NMS_TH = 0.6
    return node


def _single_shot_defaults() -> CfgNode:
    """Return the keys of the meta-architectures SingleShotDetector and RefineDet."""
    node = CfgNode()
    node.NUM_CLASSES = 80  # without background
    # Feature maps of the backbone to read, the finest first.
    node.IN_FEATURES = ["stage3", "stage4", "stage5"]
    # Norm of the layers that are added to the backbone.
    node.NORM = "BN"
    # Momentum of the running statistics of all batch norms, including those of the backbone. 0.001,
    # the value of the paper, needs thousands of iterations.
    node.NORM_MOMENTUM = 0.001
    # An anchor is background below the first IoU, and belongs to the object from the second on.
    node.IOU_THRESHOLDS = [0.5, 0.5]
    # Number of mined negatives for each positive.
    node.NEGATIVE_RATIO = 3.0
    # Weights of dx, dy, dw, dh: the inverse of SSD's variances.
    node.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # For each class, the TOPK_CANDIDATES_TEST best boxes above the threshold go to NMS. The best
    # TEST.DETECTIONS_PER_IMAGE of all classes are returned.
    node.SCORE_THRESH_TEST = 0.01
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = 0.45
    # Only SingleShotDetector reads the rest.
    # Stages after the last feature map: their output widths, and their type: "dsod" (half pooled)
    # or "ssd" (1x1, 3x3). "ssd" also has strides (1 is a 3x3 without padding; [] is 2 for all) and
    # the widths between 1x1 and 3x3 ([] is half of the output width).
    node.EXTRA_CHANNELS = [256, 256, 256]
    node.EXTRA_TYPE = "dsod"
    node.EXTRA_STRIDES = []
    node.EXTRA_REDUCED_CHANNELS = []
    # Pixels between two locations for `SSDAnchorGenerator`, one number for each feature map; []
    # takes the strides of the feature maps.
    node.ANCHOR_STEPS = []
    # Initial scale of the L2 normalisation of feature maps; 0 is no normalisation.
    node.L2_NORM_SCALE = 0.0
    # Widths of the output and of the bottleneck of a residual block before the predictors; [] is no
    # block.
    node.BLOCK_CHANNELS = []
    # Kernel size of the predictors, and their norm ("" gives them a bias).
    node.PREDICTOR_KERNEL = 3
    node.PREDICTOR_NORM = ""
    return node


def _refinedet_defaults() -> CfgNode:
    """Return the keys that only RefineDet reads.

    It also reads MODEL.SINGLE_SHOT, where the thresholds of its ODM stage are.
    """
    node = CfgNode()
    # Thresholds of the ARM stage, like SINGLE_SHOT.IOU_THRESHOLDS.
    node.ARM_IOU_THRESHOLDS = [0.5, 0.5]
    # The ODM stage ignores anchors with less objectness.
    node.OBJECTNESS_THRESHOLD = 0.01
    # Widths of the stage with stride 64, of the transfer connections, and of the residual blocks
    # before the predictors.
    node.EXTRA_CHANNELS = 512
    node.TCB_CHANNELS = 256
    node.HEAD_CHANNELS = 1024
    return node


def _timm_defaults() -> CfgNode:
    """Return the keys of `build_timm_backbone` and of the builders that add an FPN to it."""
    node = CfgNode()
    node.NAME = ""  # as timm.create_model takes it
    # Feature maps to return, by stride: "stage1" of stride 2 to "stage5" of stride 32.
    node.OUT_FEATURES = ["stage2", "stage3", "stage4", "stage5"]
    # "BN" leaves the norms as they are; "FrozenBN" and "SyncBN" replace batch norms.
    node.NORM = "BN"
    # Start from timm's weights, unless MODEL.WEIGHTS is set. INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD
    # must fit these weights.
    node.PRETRAINED = False
    # The feature that `build_retinanet_timm_fpn_backbone` makes P6 and P7 from: "stage5" or "p5".
    node.TOP_BLOCK_IN_FEATURE = "stage5"
    # Further arguments of timm.create_model, such as {drop_path_rate: 0.1}.
    node.ARGUMENTS = CfgNode(new_allowed=True)
    return node


def _torchvision_defaults() -> CfgNode:
    """Return the keys of `build_torchvision_backbone`."""
    node = CfgNode()
    node.NAME = ""  # as torchvision.models.get_model takes it
    # Nodes whose outputs are returned, one for each stride, the finest first. The feature maps are
    # named as in MODEL.TIMM.
    node.NODES = []
    # These mean the same as in MODEL.TIMM.
    node.NORM = "BN"
    node.PRETRAINED = False
    return node


def _peleenet_defaults() -> CfgNode:
    node = CfgNode()
    node.NORM = "BN"
    # Any of "stem", "stage2" (stride 4) to "stage5" (stride 32).
    node.OUT_FEATURES = ["stage2", "stage3", "stage4", "stage5"]
    return node


def _distillation_defaults() -> CfgNode:
    node = CfgNode()
    # The config file and the weights of a trained detector, the teacher, whose feature maps the
    # student learns to imitate; --teacher CONFIG WEIGHTS sets both. "" trains without a teacher.
    node.TEACHER = ""
    node.WEIGHTS = ""
    # The weight of the loss, a sum over the feature maps; 6 is PKD's (arXiv 2207.02039).
    node.LOSS_WEIGHT = 6.0
    # The feature maps to compare, such as ["p3", "p4", "p5"]; [] compares all of the student.
    node.IN_FEATURES = []
    return node


def get_config_file(name: str) -> str:
    """Return the path of a config file of this package.

    Args:
        name: the path below the folder ``configs``, such as
            ``"COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_3x.yaml"``.

    Raises:
        FileNotFoundError: there is no such file. The message names the closest ones, unless
            ``name`` is absolute or its folder exists.
    """
    root = find_config_folder()
    if (path := root / name).is_file():
        return str(path)
    folder = Path(name).parent
    if Path(name).is_absolute() or (folder != Path() and folder.is_dir()):
        raise UserFileNotFoundError(f"There is no config file {name}.")
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*.*") if p.suffix in _SUFFIXES)
    same = [file for file in files if Path(file).name == Path(name).name]
    close = [*dict.fromkeys(same + get_close_matches(name, files, n=3, cutoff=0.6))][:3]
    raise UserFileNotFoundError(
        f"No config file {name!r} in the working folder or in {root}.{close_to_it(close)}"
    )


def find_config_folder() -> Path:
    """Return the folder of this package's configs. Raise FileNotFoundError if there is none."""
    package = Path(__file__).parent
    # A wheel has the folder inside the package, a checkout next to the package.
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UserFileNotFoundError(
        f"No configs folder in {package} or next to it: reinstall vovnet_d2 from its repository."
    )
