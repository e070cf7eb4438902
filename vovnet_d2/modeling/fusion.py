# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Fusion of batch norms into the convolutions before them, for inference."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import UserValueError
from .convolution import ConvNormAct
from .layers import ConvTranspose2d, DeformableConv2d
from .tracing import has_hooks

logger = logging.getLogger(__name__)

# These classes apply their norm to a plain convolution. Others may standardise the weight first.
_FORWARDS = tuple(c.forward for c in (Conv2d, ConvNormAct, DeformableConv2d, ConvTranspose2d))
_SIZE = (512, 512)  # of the image on the meta device


def fuse_norms(model: nn.Module) -> None:
    """Fuse each batch norm into the convolution whose output only this norm reads.

    Detectron2's convolutions hold their norms, frozen or not. Known classes of norms, without hooks
    or parametrizations, are fused. In the networks of timm and torchvision, norms are separate
    modules. A forward pass of the backbone on
    the meta device shows which of them to fuse. A backbone that cannot run there keeps them.

    Args:
        model: a backbone or a detector, in evaluation mode; changed in place.

    Raises:
        ValueError: the model is in training mode, where norms use the statistics of each batch.
    """
    if model.training:
        raise UserValueError("Norms are fused for inference: call eval() on the model first.")
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if type(module).forward in _FORWARDS and _is_fusible(module.norm):
            module.norm = _fuse(module, module.norm)
    backbone = getattr(model, "backbone", model)
    if not any(_is_fusible(module) for module in backbone.modules()):
        return
    names = {module: name for name, module in backbone.named_modules()}
    for conv, norm in _norms_behind_convolutions(model, backbone):
        backbone.set_submodule(names[norm], _fuse(conv, norm) or nn.Identity())


def _is_fusible(norm: nn.Module | None) -> bool:
    # A batch norm without running statistics uses the statistics of each batch.
    return isinstance(norm, _BatchNorm | FrozenBatchNorm2d) and norm.running_mean is not None


def _is_pristine(module: nn.Module) -> bool:
    """Return True if a module has no hook and no parametrization of its weight."""
    return not (has_hooks(module) or is_parametrized(module))


def _behind_normalisation(norm: Any) -> nn.Sequential | None:
    """Return the modules that a norm applies after normalising: timm's norms have an activation.
    Return None if these modules do not explain what the norm computes."""
    rest = nn.Sequential(*norm.children())
    mean = norm.running_mean
    x = torch.linspace(-3, 3, 4 * len(mean)).to(mean).view(1, len(mean), 2, 2)
    with torch.no_grad():
        y = F.batch_norm(x, mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        same = torch.allclose(rest(y.clone()), norm(x), rtol=1e-3, atol=1e-5)
    return rest if same else None


def _fuse(conv: Any, norm: Any) -> nn.Module | None:
    """Fuse a norm into a convolution, in float64, so that each weight is rounded once.

    Returns:
        the module that replaces the norm: what the norm does after normalising, or None for
        nothing. A norm that cannot be fused stays.
    """
    rest = _behind_normalisation(norm)
    if rest is None or not (_is_pristine(conv) and _is_pristine(norm)):
        return norm
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
    return rest if len(rest) else None


def _norms_behind_convolutions(
    model: nn.Module, backbone: nn.Module
) -> list[tuple[nn.Module, nn.Module]]:
    """Return the convolutions of a backbone whose output only a batch norm reads, with the norm."""
    registered = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    calls: Counter[nn.Module] = Counter()
    # The keys are ids of outputs. Each output is kept, so that no other tensor gets its id.
    made_by: dict[int, tuple[nn.Module, Tensor]] = {}
    taken: list[tuple[int, nn.Module]] = []

    def note_call(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        if _is_fusible(module) and args and id(args[0]) in made_by:
            taken.append((id(args[0]), module))

    def note_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _is_plain_convolution(module):
            made_by[id(output)] = module, output
            reads.count[id(output)] = 0  # an earlier tensor may have had this id

    reads = _Reads()
    try:
        returned = _run_on_meta(backbone, note_call, note_output, reads)
    except Exception as error:  # a network of another project may raise anything
        logger.warning("Separate norms are not fused, so inference is slower: %s", error)
        return []
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
    return type(module) is nn.Conv2d  # a subclass may compute something else


class _Reads(TorchFunctionMode):
    """Counts the functions that read or change a tensor, by the id of the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Writing to a part of a tensor returns None. What returns a shape or a flag reads no value.
        if result is None or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
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
    with ExitStack() as stack:
        for module in backbone.modules():
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        return torch.func.functional_call(backbone, tensors, (image,))


def _image_shape(backbone: nn.Module) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of an image that a model takes."""
    body: Any = backbone
    while hasattr(body, "bottom_up"):  # the convolutions of an FPN itself come first
        body = body.bottom_up
    if hasattr(body, "image_shape"):
        return body.image_shape
    first = next(module for module in body.modules() if isinstance(module, nn.Conv2d))
    return first.in_channels, *_SIZE
