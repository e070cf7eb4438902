# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert weights to other names or another channel order, or fuse the normalisation into them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from vovnet_d2.layouts import LAYOUTS, rename_keys

from ..errors import UserValueError
from .metadata import InputConvention, Metadata
from .recognition import Description, describe_state_dict, native_names

_FIRST = "stem.conv1.weight"


def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor], to: str = "native", *, prefix: str | None = None
) -> dict[str, torch.Tensor]:
    """Rename the tensors of a VoVNet. Their values stay as they are, so the conversion can be
    undone.

    Args:
        state_dict: in any layout, below any prefix. Tensors of other modules are left out.
        to: "native", "detectron2", "timm" or "osmr".
        prefix: the prefix of VoVNet's names; None finds it.

    Returns:
        the tensors of the backbone, and of its classifier if there is one, without prefix.

    Raises:
        ValueError: ``to`` is no layout or has no names for some of the tensors, or there is no
            VoVNet in ``state_dict``.
    """
    if to not in LAYOUTS:
        raise UserValueError(f"Unknown layout {to!r}: choose from {', '.join(LAYOUTS)}.")
    found = describe_state_dict(state_dict, prefix)
    names = native_names(state_dict, found.prefix)
    native = {name: state_dict[old] for old, name in names.items()}
    if to == "native":
        return native
    renamed = rename_keys(native, to)
    if nameless := [name for name in native if name not in renamed]:
        raise UserValueError(
            f"The {to} layout has no name for {len(nameless)} of the tensors, such as "
            f"{nameless[0]}: bottlenecks and deformable convolutions are native only, and osmr has "
            "neither eSE nor depthwise convolutions."
        )
    return {renamed[name]: tensor for name, tensor in native.items()}


def reorder_channels(
    state_dict: Mapping[str, torch.Tensor], convention: InputConvention, to: str
) -> tuple[dict[str, torch.Tensor], InputConvention]:
    """Turn weights for RGB input into weights for BGR input, or the other way round. The result is
    exact.

    Args:
        state_dict: the state dict of a VoVNet, with our own names, without prefix.
        convention: the input that the weights expect.
        to: "BGR" or "RGB".

    Returns:
        the state dict, and the convention that it expects now.

    Raises:
        ValueError: the input does not have three channels of a known order.
    """
    if to not in ("BGR", "RGB"):
        raise UserValueError(f"Channel order {to!r}: choose BGR or RGB.")
    if not convention.format or state_dict[_FIRST].shape[1] != 3:
        raise UserValueError(
            f"The weights take {state_dict[_FIRST].shape[1]} channels in the order "
            f"{convention.format or 'unknown'}: only RGB and BGR can be turned into each other."
        )
    if convention.format == to:
        return dict(state_dict), convention
    flipped = InputConvention(to, convention.pixel_mean[::-1], convention.pixel_std[::-1])
    return {**state_dict, _FIRST: state_dict[_FIRST].flip(1)}, flipped


def fold_normalization(
    state_dict: Mapping[str, torch.Tensor],
    convention: InputConvention,
    what: Literal["std", "mean-std"] = "std",
) -> tuple[dict[str, torch.Tensor], InputConvention]:
    """Fuse the normalisation of images into the first convolution.

    Fusing the standard deviation is exact except for rounding. Fusing the mean is exact only where
    the first convolution sees no padding: before, a border of zeros meant the mean colour, and
    after, it means black. This changes the outermost row and column of the first convolution's
    output on the top and the left (and on the bottom and the right of images with an odd size).
    It also changes the area by which Detectron2 pads the images of a batch. With random weights,
    random images and the normalisation of ImageNet, the error at the border is as large as the
    values. Over the whole output of the stem it is 8% for an image of 224x224, and 1 to 2% over
    the output of stage5.

    Args:
        state_dict: the state dict of a VoVNet, with our own names, without prefix.
        convention: the input that the weights expect.
        what: "std", or "mean-std" for both.

    Returns:
        the state dict, and the input that it expects now: a standard deviation of 1, and a mean of
            0 if the mean was fused.

    Raises:
        ValueError: ``what`` is neither, the channels do not fit, or the mean cannot be fused
            because neither a batch norm nor a bias follows the first convolution.
    """
    if what not in ("std", "mean-std"):
        raise UserValueError(f"Nothing to fold is called {what!r}: choose std or mean-std.")
    weight = state_dict[_FIRST]
    if weight.shape[1] != len(convention.pixel_std):
        raise UserValueError(
            f"The first convolution takes {weight.shape[1]} channels, and the normalisation is for "
            f"{len(convention.pixel_std)}."
        )
    std = torch.tensor(convention.pixel_std, dtype=torch.float64).reshape(1, -1, 1, 1)
    scaled = weight.double() / std
    folded = {**state_dict, _FIRST: scaled.to(weight.dtype)}
    ones = (1.0,) * len(convention.pixel_std)
    if what == "std":
        return folded, replace(convention, pixel_std=ones)
    mean = torch.tensor(convention.pixel_mean, dtype=torch.float64)
    # The convolution now gives that much more than before, wherever it sees no padding.
    surplus = torch.einsum("oihw,i->o", scaled, mean)
    for name, sign in (("stem.conv1.norm.running_mean", 1), ("stem.conv1.bias", -1)):
        if name in folded:
            value = folded[name]
            folded[name] = (value.double() + sign * surplus).to(value.dtype)
            return folded, replace(convention, pixel_mean=(0.0,) * len(ones), pixel_std=ones)
    raise UserValueError(
        "The mean cannot be folded: neither a batch norm nor a bias follows the first convolution. "
        "Fold the standard deviation alone."
    )


def timm_caveats(found: Description, known: Metadata) -> list[str]:
    """List the reasons why timm's models would compute something else with weights of this
    architecture, or refuse them.

    The list is empty if there is no such reason.
    """
    caveats = []
    ese, blocks = found.fields["ese"], found.fields["blocks_per_stage"]
    if ese == "all" and max(blocks) > 1:
        caveats.append("timm has eSE in the last block of a stage only: it has no place for these.")
    if ese == "none" and known.residual and max(blocks) > 1:
        caveats.append("timm's VoVNets without eSE have no residual connections: these need them.")
    if known.stem == "pooled":
        caveats.append("The stem is the pooled one: create timm's model with stem_stride=2.")
    return caveats


def osmr_caveats(found: Description, known: Metadata) -> list[str]:
    """List the reasons why pytorchcv's VoVNets would compute something else with weights of this
    architecture.

    The list is empty if there is no such reason.
    """
    caveats = []
    if known.residual is False and max(found.fields["blocks_per_stage"]) > 1:
        caveats.append("pytorchcv's VoVNets have residual connections: these were trained without.")
    if known.stem == "pooled":
        caveats.append("pytorchcv's VoVNets have the strided stem: these need the pooled one.")
    return caveats
