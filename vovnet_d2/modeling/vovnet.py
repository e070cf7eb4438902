# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""VoVNet and VoVNetV2: stem, one-shot aggregation (OSA) blocks, and the network of both.

VoVNet: :paper:`VoVNet` arXiv 1904.09730, sections 3 and 4. VoVNetV2: :paper:`CenterMask` arXiv
1911.06667, section 3.3.
"""

# There is no `from __future__ import annotations`, because torch.fx would write annotations that
# are strings into the code of a trace.

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import Backbone
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserValueError
from ..layouts import rename_keys
from .activation_checkpointing import checkpointed
from .layers import (
    DeformableConv2d,
    DepthwiseSeparableConv2d,
    EffectiveSE,
    Norm,
    bottleneck,
    conv_norm_act,
    max_pool,
)
from .specs import STAGE_NAMES, VoVNetSpec, get_spec
from .tracing import is_symbolic

LayerFactory = Callable[..., nn.Module]


class VoVNetStem(CNNBlockBase):
    """Three 3x3 convolutions, the first of stride 2, the third of stride 2 or 1."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        *,
        last_stride: int,
        layer: LayerFactory,
        norm: Norm,
    ):
        """
        Args:
            channels: widths of the three convolutions.
            last_stride: stride of the third convolution: 2 for the strided stem, 1 for the pooled
                one.
            layer: makes the second and third convolution from their widths and stride.
            norm: norm of the first convolution; see :func:`conv_norm_act`.
        """
        super().__init__(in_channels, channels[2], 2 * last_stride)
        # An image has few channels, so the first convolution is a full one in every variant.
        self.conv1 = conv_norm_act(in_channels, channels[0], 3, norm=norm, stride=2)
        self.conv2 = layer(channels[0], channels[1])
        self.conv3 = layer(channels[1], channels[2], stride=last_stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(self.conv2(self.conv1(x)))


class OSABlock(CNNBlockBase):
    """One-shot aggregation (VoVNet paper, section 3.2).

    The outputs of a chain of convolutions are concatenated once, together with the input of the
    block. A 1x1 convolution reduces them to ``out_channels``.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        num_layers: int,
        layer: LayerFactory,
        norm: Norm,
        stride: int = 1,
        reduction: bool = False,
        residual: bool = False,
        ese: bool = False,
    ):
        """
        Args:
            mid_channels: width of each convolution of the chain.
            num_layers: length of the chain.
            layer: makes a convolution of the chain from its widths.
            norm: norm of the 1x1 convolutions; see :func:`conv_norm_act`.
            stride: 2 to begin with a max-pooling, or 1.
            reduction: whether a 1x1 convolution reduces the input to ``mid_channels`` before the
                chain (depthwise variants). The concatenation still has the input itself.
            residual: whether the (pooled) input is added to the result; needs
                ``in_channels == out_channels``.
            ese: whether effective squeeze-excitation follows the aggregation.
        """
        super().__init__(in_channels, out_channels, stride)
        self.residual = residual
        self.reduction = (
            conv_norm_act(in_channels, mid_channels, 1, norm=norm) if reduction else nn.Identity()
        )
        widths = [mid_channels if reduction else in_channels] + [mid_channels] * num_layers
        self.layers = nn.ModuleList(layer(i, o) for i, o in pairwise(widths))
        aggregated = in_channels + num_layers * mid_channels
        self.aggregation = conv_norm_act(aggregated, out_channels, 1, norm=norm)
        self.ese = EffectiveSE(out_channels) if ese else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 2:
            x = max_pool(x)
        features = [x]
        y = self.reduction(x)
        for layer in self.layers:
            y = layer(y)
            features.append(y)
        y = self.aggregation(features)
        residual = x if self.residual else None
        if self.ese is not None:
            return self.ese(y, residual)
        return y if residual is None else residual + y


class VoVNet(Backbone):
    """VoVNet and VoVNetV2, as a Detectron2 backbone or as a classifier."""

    def __init__(
        self,
        spec: str | VoVNetSpec,
        *,
        in_channels: int = 3,
        norm: Norm = "FrozenBN",
        out_features: Sequence[str] | None = None,
        num_classes: int | None = None,
        freeze_at: int = 0,
        norm_eval: bool = False,
        stage5_dilation: int = 1,
        stage_with_dcn: Sequence[bool] = (False, False, False, False),
        with_modulated_dcn: bool = False,
        deformable_groups: int = 1,
        checkpoint_blocks: bool = False,
    ):
        """
        Args:
            spec: the name of a variant, a key of ``VOVNET_SPECS``; or a spec.
            in_channels: number of channels of the input.
            norm: a norm that Detectron2 knows by name ("FrozenBN", "BN", "SyncBN", "GN", ...; ""
                is none), or a callable from a channel number to a module.
            out_features: names of the feature maps to return: any of "stem", "stage2" to "stage5"
                and, with ``num_classes``, "linear". By default the last one. Later stages are not
                built.
            num_classes: if given, the network is a classifier: global average pooling and a
                fully-connected layer with this number of outputs follow stage5.
            freeze_at: number of stages to freeze; see :meth:`freeze`. MMDetection's
                ``frozen_stages`` is one less: its -1 freezes nothing.
            norm_eval: whether batch norms use their running statistics in training and do not
                update them. Their weights and biases are still trained.
            stage5_dilation: 1, or 2 to keep stage5 at the resolution of stage4 with dilated
                convolutions (output stride 16).
            stage_with_dcn: whether the 3x3 convolutions of a stage are deformable, for each of the
                stages 2 to 5.
            with_modulated_dcn: whether deformable convolutions are modulated (DCNv2).
            deformable_groups: groups of channels that share the offsets of such a convolution.
            checkpoint_blocks: whether training keeps only the input of the stem and of each OSA
                block, and runs these a second time in the backward pass.

        Raises:
            ValueError: a variant, norm or feature is unknown, a number is out of range, or a
                combination does not exist; the message names the choices.
        """
        super().__init__()
        spec = get_spec(spec)
        _check_arguments(spec, in_channels, num_classes, stage5_dilation, stage_with_dcn)
        if deformable_groups < 1:
            raise UserValueError(f"deformable_groups is {deformable_groups}: give at least 1.")
        self.spec = spec
        self.num_classes = num_classes
        self.checkpoint_blocks = checkpoint_blocks
        self.norm_eval = norm_eval
        self._out_features = _check_out_features(out_features, num_classes)
        order = ["stem", *STAGE_NAMES]
        num_stages = max(4 if f == "linear" else order.index(f) for f in self._out_features)

        layer = _layer_factory(spec, norm)
        self.stem = VoVNetStem(
            in_channels,
            spec.stem_channels,
            last_stride=2 if spec.stem == "strided" else 1,
            # The bottleneck is a variant of the OSA block: the stem stays as it is.
            layer=partial(conv_norm_act, kernel_size=3, norm=norm) if spec.bottleneck else layer,
            norm=norm,
        )
        self._shapes = {"stem": ShapeSpec(channels=self.stem.out_channels, stride=self.stem.stride)}
        self.stage_names = STAGE_NAMES[:num_stages]
        channels, stride = self.stem.out_channels, self.stem.stride
        for index, name in enumerate(self.stage_names):
            dilation = stage5_dilation if name == "stage5" else 1
            stage_layer = partial(layer, dilation=dilation)
            if stage_with_dcn[index]:
                stage_layer = partial(
                    stage_layer,
                    conv_class=DeformableConv2d,
                    modulated=with_modulated_dcn,
                    deformable_groups=deformable_groups,
                )
            pooled = (index > 0 or spec.stem == "pooled") and dilation == 1
            stage = _make_stage(
                spec, index, channels, stride=2 if pooled else 1, layer=stage_layer, norm=norm
            )
            self.add_module(name, stage)
            channels, stride = stage[-1].out_channels, stride * stage[0].stride
            self._shapes[name] = ShapeSpec(channels=channels, stride=stride)
        if num_classes is not None and "linear" in self._out_features:
            self.linear = nn.Linear(channels, num_classes)
            # Initial logits are small, as in Detectron2's ResNet and in "Accurate, Large Minibatch
            # SGD", section 5.1.
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)
        self.freeze(freeze_at)
        self.train()  # for norm_eval

    def train(self, mode: bool = True) -> "VoVNet":
        """Set the training mode; with ``norm_eval`` batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.modules() if self.norm_eval else ():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the feature maps and the logits that were asked for.

        Args:
            x: (N, C, H, W), with H and W of at least 32. If a stride does not divide a size,
                convolutions round it up, and pooling of an odd size rounds it down.

        Returns:
            the feature maps of ``out_features``, each (N, channels, about H / stride, about
            W / stride), and "linear" of shape (N, num_classes).
        """
        if not torch.jit.is_scripting():
            return self._run(x)
        outputs: dict[str, torch.Tensor] = {}
        for name, stage in self.named_children():  # scripts cannot look up a module by its name
            x = stage(x.mean((2, 3)) if name == "linear" else x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def _run(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute what :meth:`forward` returns, outside of TorchScript."""
        symbolic = is_symbolic(x)
        if not symbolic and x.dim() != 4:
            raise UserValueError(
                f"VoVNet takes an input of shape (N, C, H, W), got {tuple(x.shape)}."
            )
        if not symbolic and not x.is_floating_point():
            raise UserValueError(
                f"VoVNet takes an input of floating-point numbers, got {x.dtype}: convert it, for "
                "example by x.float()."
            )
        outputs = {}
        recompute = self.checkpoint_blocks and self.training and torch.is_grad_enabled()
        for name in ("stem", *self.stage_names):
            stage = getattr(self, name)
            if recompute:
                for block in [stage] if name == "stem" else stage:
                    x = checkpointed(block, x)
            else:
                x = stage(x)
            if name in self._out_features:
                outputs[name] = x
        if "linear" in self._out_features:
            outputs["linear"] = self.linear(x.mean((2, 3)))
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels and the stride of each feature map that :meth:`forward` returns
        ("linear" has none).
        """
        return {name: self._shapes[name] for name in self._out_features if name != "linear"}

    def freeze(self, freeze_at: int = 0) -> "VoVNet":
        """Freeze the first stages: their parameters get ``requires_grad=False`` and their batch
        norms become :class:`detectron2.layers.FrozenBatchNorm2d`.

        Args:
            freeze_at: 0 or less freezes nothing, 1 the stem, 2 the stem and stage2, up to 5, all
                stages (a classifier's "linear" is never frozen).

        Returns:
            the network itself.

        Raises:
            ValueError: ``freeze_at`` is above 5.
        """
        if freeze_at > 5:
            raise UserValueError(
                f"freeze_at is {freeze_at}: choose 0 (nothing), 1 (stem), 2 (stem and stage2), "
                "3, 4 or 5 (up to stage5)."
            )
        if freeze_at >= 1:
            self.stem.freeze()
        for number, name in enumerate(self.stage_names, start=2):
            if freeze_at >= number:
                for block in getattr(self, name):
                    block.freeze()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Names of published weights and of timm are translated here, because every loader of every
        # project calls this method.
        renamed = rename_keys([k[len(prefix) :] for k in state_dict if k.startswith(prefix)])
        error_messages = args[-1]
        for old, new in renamed.items():
            tensor = state_dict.pop(prefix + old)
            if state_dict.setdefault(prefix + new, tensor) is not tensor:
                error_messages.append(
                    f"The state dict has {prefix + new} twice, also as {prefix + old}: remove one."
                )
        # The weights may come from a network with another norm, so the number of batches may be
        # missing or superfluous. Only a BatchNorm without momentum uses it.
        for name, module in self.named_modules():
            if hasattr(module, "num_batches_tracked"):
                count = f"{prefix}{name}.num_batches_tracked"
                if module.num_batches_tracked is None:
                    state_dict.pop(count, None)
                elif f"{prefix}{name}.running_mean" in state_dict:
                    known = module.num_batches_tracked
                    state_dict.setdefault(count, torch.tensor(0) if known.is_meta else known)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _layer_factory(spec: VoVNetSpec, norm: Norm) -> LayerFactory:
    """Return a function that builds a 3x3 layer of this architecture from its widths."""
    if spec.depthwise:
        return partial(DepthwiseSeparableConv2d, norm=norm)
    if spec.bottleneck:
        return partial(bottleneck, norm=norm)
    return partial(conv_norm_act, kernel_size=3, norm=norm)


def _make_stage(
    spec: VoVNetSpec, index: int, in_channels: int, *, stride: int, layer: LayerFactory, norm: Norm
) -> nn.Sequential:
    """Build the OSA blocks of stage ``index + 2``. Only the first one gets ``stride``."""
    mid, out = spec.stage_mid_channels[index], spec.stage_out_channels[index]
    blocks = []
    for number in range(spec.blocks_per_stage[index]):
        first, last = number == 0, number == spec.blocks_per_stage[index] - 1
        blocks.append(
            OSABlock(
                in_channels if first else out,
                mid,
                out,
                num_layers=spec.layers_per_block,
                layer=layer,
                norm=norm,
                stride=stride if first else 1,
                reduction=spec.depthwise and (in_channels if first else out) != mid,
                residual=spec.residual and not first,
                ese=spec.ese == "all" or (spec.ese == "last" and last),
            )
        )
    return nn.Sequential(*blocks)


def _check_out_features(out_features: Sequence[str] | None, num_classes: int | None) -> list[str]:
    choices = ["stem", *STAGE_NAMES] + (["linear"] if num_classes is not None else [])
    if out_features is None:
        return choices[-1:]
    if isinstance(out_features, str) or not out_features:
        raise UserValueError(
            f"out_features is {out_features!r}: give a list of {', '.join(choices)}."
        )
    for name in out_features:
        if name not in choices:
            hint = " Set num_classes to have 'linear'." if name == "linear" else ""
            raise UserValueError(
                f"VoVNet has no feature {name!r}: choose from {', '.join(choices)}.{hint}"
            )
    return list(out_features)


def _check_arguments(
    spec: VoVNetSpec,
    in_channels: int,
    num_classes: int | None,
    stage5_dilation: int,
    stage_with_dcn: Sequence[bool],
) -> None:
    if in_channels < 1:
        raise UserValueError(f"in_channels is {in_channels}: an input has at least one channel.")
    if num_classes is not None and num_classes < 1:
        raise UserValueError(
            f"num_classes is {num_classes}: give at least 1, or None for a backbone."
        )
    if stage5_dilation not in (1, 2):
        raise UserValueError(f"stage5_dilation is {stage5_dilation}: choose 1 or 2.")
    if len(stage_with_dcn) != len(STAGE_NAMES):
        raise UserValueError(
            f"stage_with_dcn is {list(stage_with_dcn)}: give four booleans, for stages 2 to 5."
        )
    if any(stage_with_dcn) and (spec.depthwise or spec.bottleneck):
        raise UserValueError(
            "stage_with_dcn: depthwise and bottleneck variants have no deformable convolutions; "
            "choose a variant of full 3x3 convolutions or set it to False for every stage."
        )
