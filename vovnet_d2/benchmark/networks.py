# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Build the networks to compare: backbones by name, and detectors by their config files.

Weights are random unless a detector's trained weights are asked for, so nothing is downloaded.
Norms then have the statistics of random images, so that values are neither huge nor zero in deep
networks and in low precision.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_resnet_backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import VoVNetCheckpointer
from ..engine.config import load_config, resolve_config
from ..engine.run_checks import check_network
from ..errors import UserValueError
from ..modeling.baselines.timm_backbone import TimmBackbone
from ..modeling.baselines.torchvision_backbone import TorchvisionBackbone
from ..modeling.layers import NORMS
from ..modeling.specs import VOVNET_SPECS
from ..modeling.vovnet import VoVNet
from ..words import suggest
from .plain import plain
from .workload import as_pixels

DEFAULT_NORM = "FrozenBN"
_TIMM = "timm:"


@dataclass(frozen=True)
class Network:
    """Describes a network that the benchmark can build.

    Attributes:
        build: makes the network on torch's current device, with random weights.
        is_detector: True if it takes Detectron2's list of dicts, rather than (N, 3, H, W).
        load: loads the trained weights, if they are asked for.
        size: (height, width) in pixels, if the network takes images of one size only.
        channels_last: True if the network trains in that memory format; None for the faster one.
        cfg: the config of a detector.
    """

    name: str
    build: Callable[[], nn.Module]
    is_detector: bool = False
    load: Callable[[nn.Module], object] | None = None
    size: tuple[int, int] | None = None
    channels_last: bool | None = None
    cfg: CfgNode | None = None


def backbone(name: str, *, norm: str = DEFAULT_NORM) -> Network:
    """Return a network with feature maps of strides 4, 8, 16 and 32, as a dict.

    Args:
        name: a key of :data:`BACKBONES`, or ``"timm:NAME"`` for any network of timm's that has
            these feature maps.
        norm: the norm, if :func:`takes_norm` is True. DenseNet and timm's networks have BN.

    Raises:
        ValueError: there is no such network or norm, it has no such feature maps, or timm is not
            installed.
    """
    network = Network(name, _find_builder(name, norm))
    with torch.device("meta"):  # an unknown network is refused before anything is measured
        network.build()
    return network


def takes_norm(name: str) -> bool:
    """Return whether the norm of a backbone can be chosen."""
    return BACKBONES.get(name) in (_vovnet, _resnet)


def _find_builder(name: str, norm: str) -> Callable[[], nn.Module]:
    if name.startswith(_TIMM):
        return lambda: TimmBackbone(name.removeprefix(_TIMM))
    if name not in BACKBONES:
        raise UserValueError(
            f"No network {name!r}.{suggest(name, BACKBONES, cutoff=0.5)} There are "
            f"{', '.join(BACKBONES)}, timm:NAME for timm's, and detectors by --config-file."
        )
    if norm not in NORMS:
        raise UserValueError(f"No norm {norm!r}: there are {', '.join(map(repr, NORMS))}.")
    return lambda: BACKBONES[name](name, norm)


def _vovnet(name: str, norm: str) -> nn.Module:
    return VoVNet(name, norm=norm, out_features=["stage2", "stage3", "stage4", "stage5"])


def _resnet(name: str, norm: str) -> nn.Module:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = int(name.partition("-")[2])
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def _densenet(name: str, norm: str) -> nn.Module:
    # the nodes come after norm and ReLU, like the feature maps of other networks
    nodes = [f"features.transition{i}.relu" for i in (1, 2, 3)] + ["features.norm5"]
    return TorchvisionBackbone(name.lower().replace("-", ""), nodes)


BACKBONES: dict[str, Callable[[str, str], nn.Module]] = {
    **dict.fromkeys(VOVNET_SPECS, _vovnet),
    **dict.fromkeys(("ResNet-50", "ResNet-101"), _resnet),
    **dict.fromkeys(("DenseNet-161", "DenseNet-201"), _densenet),
}
"""Name to what builds it, from name and norm: this package's variants, Detectron2's ResNet and
torchvision's DenseNet."""


def detector(
    config_file: str, options: Sequence[str] = (), *, weights: bool = False, unsafe: bool = False
) -> Network:
    """Return the detector of a config file.

    With random weights, the heads of one network would get more work than the heads of another.
    So without trained weights, no region is dropped for its score or its overlap, and every head
    gets as many regions as the config allows. A single-shot detector, which has no head after its
    NMS, drops everything before it.

    Args:
        config_file: a path, or a name in this package or in Detectron2's model zoo.
        options: config options, ``[KEY, VALUE, ...]``.
        weights: load ``MODEL.WEIGHTS``.
        unsafe: accept Python tags in the file.

    Raises:
        FileNotFoundError, KeyError, ValueError: see :func:`load_config` and :func:`check_network`.
    """
    path, trusted = resolve_config(config_file)
    cfg = load_config(path, options, allow_unsafe_yaml=unsafe or trusted)
    check_network(cfg)
    if weights and not cfg.MODEL.WEIGHTS:
        raise UserValueError(
            f"{config_file} has no MODEL.WEIGHTS to load: give --opts MODEL.WEIGHTS FILE, or "
            "leave out --weights."
        )
    if not weights:
        cfg.MODEL.RPN.NMS_THRESH = 1.0
        for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
            node.SCORE_THRESH_TEST, node.NMS_THRESH_TEST = 0.0, 1.0
        cfg.MODEL.FCOS.INFERENCE_TH_TEST, cfg.MODEL.FCOS.NMS_TH = 0.0, 1.0
        combine = cfg.MODEL.PANOPTIC_FPN.COMBINE
        combine.INSTANCES_CONFIDENCE_THRESH, combine.OVERLAP_THRESH = 0.0, 1.0
        cfg.MODEL.SINGLE_SHOT.SCORE_THRESH_TEST = 1.0

    def build() -> nn.Module:
        own = cfg.clone()
        own.MODEL.DEVICE = torch.empty(0).device.type  # torch 2.6 needs this within torch.device
        return META_ARCH_REGISTRY.get(own.MODEL.META_ARCHITECTURE)(own)

    def load(model: nn.Module) -> None:
        checkpointer = VoVNetCheckpointer(model)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        if missing := checkpointer.missing_outside_backbone:
            raise UserValueError(
                f"{cfg.MODEL.WEIGHTS} has no weights for {missing[0]}: without --weights, heads "
                "are given as much to do as the config allows"
            )

    side = cfg.INPUT.FIXED_SIZE
    return Network(
        _config_name(config_file),
        build,
        is_detector=True,
        load=load if weights else None,
        size=(side, side) if side else None,
        channels_last=False if cfg.MODEL.KEYPOINT_ON else cfg.MODEL.CHANNELS_LAST,
        cfg=cfg,
    )


def _config_name(config_file: str) -> str:
    """Name a detector by its config file, or by the folder of a run's config.yaml."""
    path = PurePath(config_file)
    return path.parent.name if path.name == "config.yaml" and path.parent.name else path.stem


def calibrate_norms(model: Any, images: Tensor) -> None:
    """Give each batch norm of a backbone, or of a detector's backbone, the statistics of its input
    in one forward pass. ``images`` are (N, C, H, W), normalised."""

    def take_statistics(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))
        # A channel without variance, for example in a map of one pixel, is not changed.
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(torch.where(var > 0, var, 1.0))

    body = getattr(model, "backbone", model).eval()
    if body is not model:
        images = (as_pixels(images) - model.pixel_mean) / model.pixel_std
    written_out = plain(body)  # this pass calls every norm
    with ExitStack() as hooks, torch.no_grad():
        for module in written_out.modules():
            if isinstance(module, _BatchNorm | FrozenBatchNorm2d):
                hooks.callback(module.register_forward_pre_hook(take_statistics).remove)
        written_out(images)
    body.load_state_dict(written_out.state_dict())
