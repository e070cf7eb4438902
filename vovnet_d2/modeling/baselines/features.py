# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The common part of the adapters that make backbones of networks of timm and torchvision.

The names of feature maps are those of VoVNet: "stage2" is the last one of stride 4, "stage5" the
last one of stride 32.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import Backbone
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm

from ...errors import UserValueError


class FeatureBackbone(Backbone):
    """A backbone around a network that returns its feature maps in a list."""

    def __init__(
        self,
        network: nn.Module,
        shapes: Mapping[str, ShapeSpec],
        *,
        image_shape: tuple[int, int, int],
        channels_last: bool = False,
    ):
        """
        Args:
            network: takes (N, C, H, W).
            shapes: the shapes of the feature maps that it returns, in their order.
            image_shape: (C, H, W) of an image that the network can take.
            channels_last: True if the feature maps are (N, H, W, C).
        """
        super().__init__()
        self.network = network
        self.image_shape = image_shape
        self._shapes = dict(shapes)
        self._channels_last = channels_last

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the feature maps of :meth:`output_shape` from images (N, C, H, W)."""
        maps = self.network(x)
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return dict(zip(self._shapes, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)


def stage_name(stride: int) -> str:
    """Return the name of the stage with a stride, such as "stage3" for stride 8. Raise ValueError
    if the stride is not a power of 2."""
    if stride & (stride - 1):
        raise UserValueError(
            f"The network has a feature map of stride {stride}. Backbones need powers of 2: choose "
            "another network."
        )
    return f"stage{stride.bit_length() - 1}"


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """A frozen norm of timm, which also applies dropout and an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def _freeze_norms(module: nn.Module) -> nn.Module:
    # Detectron2's conversion would drop the activation.
    if isinstance(module, nn.BatchNorm2d | SyncBatchNorm) and hasattr(module, "act"):
        frozen = FrozenBatchNormAct2d.convert_frozen_batchnorm(module)
        frozen.drop, frozen.act = module.drop, module.act
        return frozen
    if isinstance(module, nn.BatchNorm2d | SyncBatchNorm):
        return FrozenBatchNorm2d.convert_frozen_batchnorm(module)
    for name, child in module.named_children():
        module.add_module(name, _freeze_norms(child))
    return module


def convert_norms(
    network: nn.Module, norm: str, synchronise: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Replace the batch norms of a network in place, and return the network. "BN" leaves them as
    they are; "FrozenBN" and, by the function ``synchronise``, "SyncBN" replace them. Raise
    ValueError for any other norm."""
    converters = {"BN": lambda module: module, "FrozenBN": _freeze_norms, "SyncBN": synchronise}
    if norm not in converters:
        raise UserValueError(
            f"NORM is {norm!r}, but the network has norms already: choose BN, which leaves them as "
            "they are, or FrozenBN or SyncBN for its batch norms."
        )
    return converters[norm](network)


def maps_on_meta(
    network: nn.Module, size: tuple[int, int], in_channels: int
) -> tuple[Sequence[torch.Tensor], dict[str, torch.Tensor]]:
    """Run a network on the meta device for an image of (H, W), without a change to the network.
    Return the outputs, and the parameters that they were computed from."""
    parameters = {
        name: torch.empty_like(p, device="meta", requires_grad=True)
        for name, p in network.named_parameters()
    }
    buffers = {name: torch.empty_like(b, device="meta") for name, b in network.named_buffers()}
    image = torch.empty(1, in_channels, *size, device="meta")
    training = network.training
    with torch.enable_grad():
        maps = torch.func.functional_call(network.eval(), {**parameters, **buffers}, (image,))
    network.train(training)
    return maps, parameters


def parameters_behind(
    network: nn.Module, size: tuple[int, int], in_channels: int, maps: Iterable[int]
) -> set[str]:
    """Return the names of the parameters that the feature maps with some indices are computed from,
    for an image of (H, W) that the network can take."""
    found, parameters = maps_on_meta(network, size, in_channels)
    total = torch.stack([found[index].sum() for index in maps]).sum()
    gradients = torch.autograd.grad(total, [*parameters.values()], allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return {name for name, gradient in pairs if gradient is not None}


def freeze(
    network: nn.Module,
    freeze_at: int,
    strides: Sequence[int],
    behind: Callable[[Iterable[int]], set[str]],
) -> None:
    """Freeze the layers that the feature maps up to a stride are computed from.

    Their parameters get ``requires_grad=False`` and their batch norms become frozen ones.

    Args:
        freeze_at: 0 freezes nothing, 1 up to stride 2, 2 up to stride 4, and so on.
        strides: the strides of the feature maps of the network.
        behind: returns the names of the parameters for the indices of some feature maps.

    Raises:
        ValueError: all feature maps have a larger stride.
    """
    if freeze_at <= 0:
        return
    maps = [index for index, stride in enumerate(strides) if stride <= 2**freeze_at]
    if not maps:
        raise UserValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, which freezes up to stride {2**freeze_at}, "
            f"but the feature maps have strides {', '.join(map(str, strides))}: set it to 0, which "
            "freezes nothing, or so that it reaches one of these."
        )
    frozen = behind(maps)
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, module in list(network.named_modules()):
        owned = [p for p, _ in module.named_parameters(prefix=name)]
        if isinstance(module, nn.BatchNorm2d | SyncBatchNorm) and owned and frozen >= {*owned}:
            network.set_submodule(name, _freeze_norms(module))
