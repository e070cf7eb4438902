# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Distillation: a trained detector teaches another one its feature maps."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..errors import UserValueError
from .any_config import as_cfg, load_any_config, load_network
from .memory_format import to_memory_format
from .run_checks import check_network

logger = logging.getLogger(__name__)

_Self = TypeVar("_Self", bound="Teacher")


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the correlation of two feature maps, as the mean over the channels.

    This is the loss of PKD (arXiv 2207.02039, section 3.2): half of the mean squared difference of
    the feature maps, each channel brought to mean 0 and variance 1 over the batch. The loss is at
    most 2. It is 0 if each channel of one feature map is a positive multiple of the other's
    channel, plus a constant.

    Args:
        student: (N, C, H, W), of any floating point type.
        teacher: the same shape.

    Returns:
        a scalar, float32.
    """
    return F.mse_loss(_standardise(student), _standardise(teacher)) / 2


def _standardise(maps: Tensor) -> Tensor:
    """Bring each channel of (N, C, H, W) to mean 0 and variance 1; the result is (C, N·H·W)."""
    channels = maps.float().transpose(0, 1).flatten(1)
    return F.layer_norm(channels, channels.shape[1:], eps=1e-6)


class Teacher:
    """A trained network in evaluation mode, whose parameters are not trained.

    A teacher is not a module. So the parameters and the checkpoints of a student that holds a
    teacher do not include the teacher. Copies of the student share it.
    """

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        return self


class FeatureTeacher(Teacher):
    """A detector whose backbone or FPN computes the feature maps that another detector learns.

    After :meth:`attach`, the student's losses in training have ``loss_distillation``, which is the
    sum of :func:`correlation_loss` over the feature maps, times a weight. Both networks see the
    same images in the same padding, each in its own normalisation.

    If the widths differ, a fixed matrix with orthonormal rows or columns converts the teacher's
    channels to the student's number of channels. The matrix is neither trained nor saved.
    """

    def __init__(
        self,
        detector: nn.Module,
        *,
        flip_channels: bool = False,
        in_features: Sequence[str] = (),
        loss_weight: float = 1.0,
    ):
        """
        Args:
            detector: a detector of Detectron2 or of this package. Only its backbone is kept.
            flip_channels: True if the student takes BGR and the teacher RGB, or the reverse.
            in_features: names of the feature maps to compare; all of the student's by default.
            loss_weight: the factor of the loss.
        """
        backbone: Any = detector.backbone
        super().__init__(backbone)
        self.pixel_mean: Any = detector.pixel_mean
        self.pixel_std: Any = detector.pixel_std
        self.flip_channels = flip_channels
        self.in_features = list(in_features)
        self.loss_weight = loss_weight
        self._projections: dict[tuple[int, int], Tensor] = {}  # by the widths
        self._features: Mapping[str, Tensor] | None = None  # the student's, in a forward pass

    def attach(self, student: nn.Module) -> None:
        """Add the loss to those that a detector returns in training. Raise ValueError if one of the
        networks has no such feature map, or if their strides differ."""
        backbone: Any = student.backbone
        ours, theirs = backbone.output_shape(), self.network.output_shape()  # type: ignore[operator]
        self.in_features = self.in_features or list(ours)
        for name in self.in_features:
            if name not in ours or name not in theirs or ours[name].stride != theirs[name].stride:
                common = [key for key in ours if key in theirs]
                raise UserValueError(
                    f"The student and the teacher do not both have a feature map {name} with the "
                    f"same stride: the student has {_describe(ours)} and the teacher "
                    f"{_describe(theirs)}. Set DISTILLATION.IN_FEATURES to the feature maps to "
                    f"compare, such as {common}, or choose another teacher."
                )
        backbone.register_forward_hook(self._keep_features)
        student.register_forward_hook(self._add_loss)

    def _keep_features(self, backbone: nn.Module, _: Any, features: Mapping[str, Tensor]) -> None:
        if backbone.training and torch.is_grad_enabled():
            self._features = features

    def _add_loss(
        self, student: nn.Module, inputs: tuple[Any, ...], losses: dict[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """Return the losses with the loss of the teacher. Return None, which leaves the output as
        it is, if the student is not trained."""
        features, self._features = self._features, None
        if features is None:
            return None
        taught = self._compute_features(inputs[0], student.backbone)
        parts = [
            correlation_loss(features[name], self._fit_width(taught[name], features[name].shape[1]))
            for name in self.in_features
        ]
        return {**losses, "loss_distillation": self.loss_weight * torch.stack(parts).sum()}

    @torch.no_grad()
    def _compute_features(
        self, batch: Sequence[Mapping[str, Any]], student_backbone: Any
    ) -> Mapping[str, Tensor]:
        images = [record["image"].to(self.pixel_mean.device) for record in batch]
        if self.flip_channels:
            images = [image.flip(0) for image in images]
        padded = ImageList.from_tensors(
            [(image - self.pixel_mean) / self.pixel_std for image in images],
            student_backbone.size_divisibility,
            padding_constraints=student_backbone.padding_constraints,
        )
        return self.network(padded.tensor)

    def _fit_width(self, maps: Tensor, width: int) -> Tensor:
        if maps.shape[1] == width:
            return maps
        key = (width, maps.shape[1])
        if key not in self._projections:
            generator = torch.Generator().manual_seed(0)
            matrix = nn.init.orthogonal_(torch.empty(key), generator=generator)
            self._projections[key] = matrix[:, :, None, None].to(maps.device)
        return F.conv2d(maps, self._projections[key].to(maps.dtype))


def _describe(shapes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} (stride {shape.stride})" for name, shape in shapes.items())


def add_teacher(student: nn.Module, cfg: CfgNode, *, allow_pickle: bool = False) -> None:
    """Build the teacher that ``DISTILLATION`` names and attach it to a detector.

    Args:
        cfg: the student's config.
        allow_pickle: see :class:`VoVNetCheckpointer`.

    Raises:
        FileNotFoundError: there is no such config, or no such file of weights.
        KeyError: the teacher's config has a key that does not exist.
        ValueError: there are no weights, they do not fit the teacher's config, or the teacher does
            not fit the student; see :meth:`FeatureTeacher.attach`.
    """
    node = cfg.DISTILLATION
    if not node.WEIGHTS:
        raise UserValueError(
            f"DISTILLATION.WEIGHTS is empty: set it to a file of the trained weights of the "
            f"teacher {node.TEACHER}, or give --teacher CONFIG WEIGHTS."
        )
    config = load_any_config(node.TEACHER)
    teacher_cfg = as_cfg(config)
    teacher_cfg.MODEL.WEIGHTS, teacher_cfg.MODEL.DEVICE = node.WEIGHTS, cfg.MODEL.DEVICE
    if isinstance(config, CfgNode):
        check_network(teacher_cfg)
    ours, theirs = cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT
    if ours != theirs and {ours, theirs} != {"BGR", "RGB"}:
        raise UserValueError(
            f"INPUT.FORMAT is {ours} and that of the teacher {node.TEACHER} is {theirs}: only BGR "
            "and RGB can be converted into each other."
        )
    detector, _ = load_network(config, teacher_cfg, allow_pickle=allow_pickle)
    teacher = FeatureTeacher(
        to_memory_format(detector, teacher_cfg),
        flip_channels=ours != theirs,
        in_features=node.IN_FEATURES,
        loss_weight=node.LOSS_WEIGHT,
    )
    teacher.attach(student)
    logger.info(
        "The teacher %s with the weights %s teaches the feature maps %s. The loss has weight %g.",
        *(node.TEACHER, node.WEIGHTS, ", ".join(teacher.in_features), node.LOSS_WEIGHT),
    )


def add_teacher_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--teacher`` to the arguments of a training of detectors."""
    parser.add_argument_group("a teacher (distillation)").add_argument(
        "--teacher",
        nargs=2,
        metavar=("CONFIG", "WEIGHTS"),
        help="train with a loss that compares the feature maps of the FPN with those of this "
        "trained detector: its config file, and its weights as MODEL.WEIGHTS takes them",
    )


def teacher_options(args: argparse.Namespace) -> list[str]:
    """Return the config options that ``--teacher`` stands for."""
    keys = ("DISTILLATION.TEACHER", "DISTILLATION.WEIGHTS")
    return [word for pair in zip(keys, args.teacher or (), strict=False) for word in pair]
