# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Distillation of classifiers: a trained network of timm's gives soft targets."""

import timm
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..checkpoint.metadata import InputConvention
from ..checkpoint.sources import read_weights
from ..errors import UserValueError
from ..modeling.baselines.timm_backbone import create_pretrained, require_network
from .distillation import Teacher


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return how far the student's probabilities are from the teacher's, both softened.

    This is the loss of Hinton et al. (arXiv 1503.02531, section 2): the Kullback-Leibler divergence
    of the softmax of logits divided by the temperature, multiplied by the square of the
    temperature, so that its gradients keep their size whatever the temperature is.

    Args:
        student: logits, (N, number of classes).
        teacher: the same shape.
        temperature: above 0; 1 compares the probabilities themselves.

    Returns:
        a scalar, the mean over the images, float32.
    """
    ours, theirs = (F.log_softmax(x.float() / temperature, dim=1) for x in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class ClassTeacher(Teacher):
    """A trained classifier that says how likely each class is in the images of a student."""

    def __init__(
        self,
        network: nn.Module,
        convention: InputConvention,
        *,
        temperature: float = 1.0,
        loss_weight: float = 1.0,
    ):
        """
        Args:
            network: returns logits, (N, number of classes).
            convention: the input that ``network`` takes.
            temperature: see :func:`soft_target_loss`.
            loss_weight: the factor of the loss.
        """
        super().__init__(network)
        self.convention = convention
        self.temperature = temperature
        self.loss_weight = loss_weight

    def compute_loss(self, images: Tensor, input_format: str, logits: Tensor) -> Tensor:
        """Return the loss, a scalar, between the logits of the student, (N, number of classes), and
        the logits of the teacher.

        Args:
            images: the images of the student, (N, 3, H, W), with values from 0 to 255.
            input_format: the order of their channels, "BGR" or "RGB".
        """
        if input_format != self.convention.format:
            images = images.flip(1)
        mean, std = (
            images.new_tensor(values).view(-1, 1, 1)
            for values in (self.convention.pixel_mean, self.convention.pixel_std)
        )
        with torch.no_grad():
            taught = self.network((images - mean) / std)
        return self.loss_weight * soft_target_loss(logits, taught, self.temperature)


def build_class_teacher(cfg: CfgNode) -> ClassTeacher:
    """Build the network of timm's that ``DISTILLATION.TEACHER`` names.

    Raises:
        FileNotFoundError: the weights cannot be found or downloaded.
        ValueError: timm has no such network or no weights of it, they are of another network or
            number of classes, the network does not take the images, or the temperature is not
            above 0.
    """
    node = cfg.DISTILLATION
    if not node.TEMPERATURE > 0:
        raise UserValueError(f"DISTILLATION.TEMPERATURE is {node.TEMPERATURE}: it must be above 0.")
    require_network(timm, node.TEACHER)
    network, convention = _load(node.TEACHER, node.WEIGHTS, cfg.PRETRAIN.NUM_CLASSES)
    network = network.to(cfg.MODEL.DEVICE)
    teacher = ClassTeacher(
        network, convention, temperature=node.TEMPERATURE, loss_weight=node.LOSS_WEIGHT
    )
    _check_output(teacher, cfg)
    return teacher


def _load(name: str, weights: str, num_classes: int) -> tuple[nn.Module, InputConvention]:
    if not weights:
        network = create_pretrained(timm, name, "set DISTILLATION.WEIGHTS to a file of yours")
        return network, _timm_convention(network)
    network = timm.create_model(name, num_classes=num_classes)
    checkpoint, known = read_weights(weights)
    try:
        network.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserValueError(
            f"{weights} does not hold the weights of timm's {name} with {num_classes} classes: "
            f"{' '.join(str(error).split())}"
        ) from error
    own = known.input if known else None
    return network, own or _timm_convention(network)


def _timm_convention(network: nn.Module) -> InputConvention:
    """Return the input that timm's weights of a network take."""
    config = timm.data.resolve_model_data_config(network)
    mean, std = (tuple(255 * value for value in config[key]) for key in ("mean", "std"))
    return InputConvention("RGB", mean, std)


def _check_output(teacher: ClassTeacher, cfg: CfgNode) -> None:
    node, side, classes = cfg.DISTILLATION, cfg.PRETRAIN.IMAGE_SIZE, cfg.PRETRAIN.NUM_CLASSES
    try:
        with torch.no_grad():
            found = teacher.network(torch.zeros(1, 3, side, side, device=cfg.MODEL.DEVICE)).shape[1]
    except Exception as error:  # each network refuses in its own way
        raise UserValueError(
            f"The teacher {node.TEACHER} does not take images of {side}×{side} pixels "
            f"(PRETRAIN.IMAGE_SIZE): {' '.join(str(error).split())}"
        ) from error
    if found != classes:
        raise UserValueError(
            f"The teacher {node.TEACHER} has {found} classes and PRETRAIN.DATA has {classes}: the "
            "teacher must be trained on the same classes, in the order of their names."
        )
