# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The networks of timm (pytorch-image-models) as backbones."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch import nn

from ...errors import UserFileNotFoundError, UserValueError
from ...words import suggest
from .features import FeatureBackbone, convert_norms, freeze, parameters_behind, stage_name

_PROBE_SIZE = 256


class TimmBackbone(FeatureBackbone):
    """A network of timm that returns the last feature map of each stride."""

    def __init__(
        self,
        name: str,
        *,
        in_channels: int = 3,
        out_features: Sequence[str] = ("stage2", "stage3", "stage4", "stage5"),
        norm: str = "BN",
        pretrained: bool = False,
        freeze_at: int = 0,
        arguments: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            name: the name for ``timm.create_model``, such as "resnet50" or "resnet50.a1_in1k".
            out_features: feature maps to return. Layers that none of them needs are left out if
                timm can do so.
            norm: see :func:`convert_norms`.
            pretrained: download timm's weights, except on the meta device. Images must be
                normalised as ``timm.get_pretrained_cfg(name)`` says.
            freeze_at: see :func:`freeze`.
            arguments: further arguments of ``timm.create_model``, such as ``drop_path_rate``.

        Raises:
            ValueError: timm is not installed, or has no such network, feature map or weights, or
                the network cannot return feature maps or takes images of one size only.
            FileNotFoundError: the weights cannot be downloaded.
        """
        timm = _import_timm()
        arguments = {"in_chans": in_channels, **(arguments or {})}
        outline = _outline(timm, name, arguments)
        strides = outline.feature_info.reduction()
        # If several feature maps have one stride, the last one stays.
        indices = {stage_name(stride): index for index, stride in enumerate(strides)}
        missing = [feature for feature in out_features if feature not in indices]
        if missing or not out_features:
            raise UserValueError(
                f"{name} of timm has no feature map {', '.join(missing) or '(none asked for)'}: "
                f"choose from {', '.join(indices)}."
            )
        ordered = sorted(out_features, key=lambda feature: indices[feature])
        shapes = {
            feature: ShapeSpec(
                channels=outline.feature_info.channels()[indices[feature]],
                stride=strides[indices[feature]],
            )
            for feature in ordered
        }
        channels_last = str(getattr(outline, "output_fmt", "NCHW")).endswith("NHWC")
        taken = [outline.feature_info.out_indices[indices[feature]] for feature in ordered]
        network = _create(timm, name, taken, pretrained, arguments)
        network = convert_norms(network, norm, _synchronise)
        size = _image_size(arguments)
        freeze(
            network,
            freeze_at,
            strides,
            lambda maps: parameters_behind(outline, size, arguments["in_chans"], maps),
        )
        image_shape = (arguments["in_chans"], *size)
        super().__init__(network, shapes, image_shape=image_shape, channels_last=channels_last)


def _import_timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserValueError("This backbone needs timm: pip install timm") from error
    return timm


def _outline(timm: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    """Build the network with all its feature maps on the meta device, which needs no memory."""
    require_network(timm, name)
    try:
        with torch.device("meta"):
            outline = timm.create_model(name, features_only=True, **arguments)
    except Exception as error:  # each network raises its own error
        raise UserValueError(
            f"timm cannot make a feature extractor of {name!r} with the arguments "
            f"{dict(arguments)}: {error}"
        ) from error
    if "img_size" not in arguments and any(
        getattr(module, "strict_img_size", False) for module in outline.modules()
    ):
        raise UserValueError(
            f"{name} of timm takes images of one size only: set dynamic_img_size to True in "
            "MODEL.TIMM.ARGUMENTS, or set img_size there and resize all images to it."
        )
    return outline


def _create(
    timm: Any, name: str, taken: Sequence[int], pretrained: bool, arguments: Mapping[str, Any]
) -> nn.Module:
    arguments = {**arguments, "features_only": True, "out_indices": tuple(taken)}
    if not pretrained:
        return timm.create_model(name, **arguments)
    way_out = "set PRETRAINED to False and MODEL.WEIGHTS to your own file"
    return create_pretrained(timm, name, way_out, **arguments)


def require_network(timm: Any, name: str) -> None:
    """Raise ValueError if timm has no network of this name."""
    if not timm.is_model(name):
        hint = suggest(name.partition(".")[0], timm.list_models())
        raise UserValueError(
            f"timm has no network {name!r}.{hint or ' timm.list_models() lists them.'}"
        )


def create_pretrained(timm: Any, name: str, way_out: str, **arguments: Any) -> nn.Module:
    """Build a network with timm's weights, or without them on the meta device. ``way_out`` is the
    advice in an error, such as "set PRETRAINED to False".

    Raises:
        FileNotFoundError: the weights cannot be downloaded.
        ValueError: timm has no weights of this network.
    """
    if not timm.is_model_pretrained(name):
        raise UserValueError(
            f"timm has no trained weights of {name!r}: {way_out}, or choose a network that "
            "timm.list_pretrained() lists."
        )
    # torch.get_default_device() of torch 2.6 does not see `with torch.device("meta")`.
    loads = not torch.empty(0).is_meta
    try:
        return timm.create_model(name, pretrained=loads, **arguments)
    except Exception as error:
        own = isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError)
        if not loads or own:  # such as a full disk
            raise
        raise UserFileNotFoundError(
            f"timm's weights of {name!r} are not on this machine and cannot be downloaded "
            f"({type(error).__name__}). Put them into the Hugging Face hub's cache, or {way_out}."
        ) from error


def _image_size(arguments: Mapping[str, Any]) -> tuple[int, int]:
    size = arguments.get("img_size", _PROBE_SIZE)
    return (size, size) if isinstance(size, int) else tuple(size)


def _synchronise(network: nn.Module) -> nn.Module:
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(network)
