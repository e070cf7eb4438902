# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Batch norms made part of the convolutions before them, for inference."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .single_shot.layers import ConvTranspose2d

__all__ = ["fold_norms"]

_SIZE = (512, 512)  # of an image on the meta device, where size costs nothing


def fold_norms(model: nn.Module) -> None:
    """Fold every batch norm, frozen or not, that takes just what one convolution gives.

    Those that Detectron2's convolutions hold are found anywhere. Those that are modules of their
    own, as in the networks of timm and torchvision, are found in the backbone by watching it run
    on the meta device; a backbone that cannot run there keeps them.

    Args:
        model: a backbone or a detector, in evaluation mode; changed in place.
    """
    for module in model.modules():
        if isinstance(module, Conv2d | ConvTranspose2d) and _is_foldable(module.norm):
            _fold(module, module.norm)
            module.norm = None
    backbone = getattr(model, "backbone", model)
    if not any(_is_foldable(module) for module in backbone.modules()):
        return
    try:
        pairs = _norms_behind_convolutions(backbone)
    except Exception as error:  # each network fails in its own way
        logging.getLogger(__name__).info("Norms that stand alone are not folded: %s", error)
        return
    names = {module: name for name, module in backbone.named_modules()}
    for conv, norm in pairs:
        _fold(conv, norm)
        # timm's norms carry dropout and an activation.
        rest = nn.Sequential(*norm.children())
        backbone.set_submodule(names[norm], rest if len(rest) else nn.Identity())


def _is_foldable(norm: nn.Module | None) -> bool:
    # A batch norm without running statistics takes those of each batch.
    return isinstance(norm, _BatchNorm | FrozenBatchNorm2d) and norm.running_mean is not None


def _fold(conv: Any, norm: Any) -> None:
    """Fold in float64, so that each weight is rounded once."""
    bias, scale, shift = (
        None if t is None else t.double() for t in (conv.bias, norm.weight, norm.bias)
    )
    fused = fuse_conv_bn_weights(
        conv.weight.double(),
        bias,
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        scale,
        shift,
        transpose=isinstance(conv, nn.ConvTranspose2d),
    )
    conv.weight, conv.bias = (nn.Parameter(t.to(conv.weight.dtype), False) for t in fused)


def _norms_behind_convolutions(backbone: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Each convolution whose output a batch norm takes and nothing else, with that norm."""
    registered = Counter(module for _, module in backbone.named_modules(remove_duplicate=False))
    calls: Counter[nn.Module] = Counter()
    made_by: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor, so that no other gets its id
    taken: list[tuple[int, nn.Module]] = []

    def note_call(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        if _is_foldable(module) and args and id(args[0]) in made_by:
            taken.append((id(args[0]), module))

    def note_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _is_plain_convolution(module):
            made_by[id(output)] = module, output
            reads.count[id(output)] = 0  # forget those of a tensor that had the id before

    reads = _Reads()
    returned = _run_on_meta(backbone, note_call, note_output, reads)
    outside = {id(leaf) for leaf in tree_leaves(returned)}
    return [
        (conv, norm)
        for key, norm in taken
        for conv in [made_by[key][0]]
        if reads.count[key] == 1
        and key not in outside
        and calls[conv] == calls[norm] == registered[conv] == registered[norm] == 1
    ]


def _is_plain_convolution(module: nn.Module) -> bool:
    if type(module) is Conv2d:
        return module.norm is None and module.activation is None
    return type(module) is nn.Conv2d  # others may do more with their weight


class _Reads(TorchFunctionMode):
    """Counts the functions that make a tensor from a tensor, by the latter's id."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.count.update(
                id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
            )
        return result


def _run_on_meta(
    backbone: nn.Module,
    before: Callable[[nn.Module, tuple[Any, ...]], None],
    after: Callable[[nn.Module, tuple[Any, ...], Any], None],
    mode: TorchFunctionMode,
) -> Any:
    tensors = {
        name: torch.empty_like(
            tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None
        )
        for named in (backbone.named_parameters(), backbone.named_buffers())
        for name, tensor in named
    }
    image = torch.empty(1, *_image_shape(backbone), device="meta")
    hooks: list[Any] = []
    for module in backbone.modules():
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with torch.no_grad(), mode:
            return torch.func.functional_call(backbone, tensors, (image,))
    finally:
        for hook in hooks:
            hook.remove()


def _image_shape(backbone: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of an image that it takes."""
    body: Any = backbone
    while hasattr(body, "bottom_up"):  # of an FPN, for example, whose own convolutions come first
        body = body.bottom_up
    if hasattr(body, "image_shape"):
        return body.image_shape
    first = next(module for module in body.modules() if isinstance(module, nn.Conv2d))
    return first.in_channels, *_SIZE
