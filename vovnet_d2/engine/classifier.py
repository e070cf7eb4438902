# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A classifier in Detectron2's engine: its losses, its data, its accuracy, its trainer.

The augmentation and the optimizers are those of timm.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.layers import ShapeSpec
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.utils.data import DataLoader

from ..data.classification import build_classification_dataset
from ..data.stream import TrainingStream, goes_to_gpu
from ..data.workers import attend_to_workers
from ..errors import UserValueError
from ..modeling.baselines.cifar import CifarClassifier
from ..modeling.build import build_vovnet_classifier
from ..words import counted, suggest
from .class_teacher import ClassTeacher, build_class_teacher
from .hooks import BestCheckpointer
from .memory_format import to_memory_format
from .trainer import Trainer

logger = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]
Augmentation = Callable[[torch.Tensor, torch.Tensor], Batch]


class ImageClassifier(nn.Module):
    """A classifier with the interface of Detectron2's detectors: it turns a batch into losses or
    predictions.

    The input format, the mean and the standard deviation have the names that they have in
    detectors. So checkpoints have them, too.

    Attributes:
        teacher: adds a loss in training; None by default.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        input_format: str,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        augmentations: Sequence[Augmentation] = (),
        label_smoothing: float = 0.0,
    ):
        """
        Args:
            network: returns logits, (N, number of classes), as "linear".
            input_format: order of the channels that ``network`` takes, "BGR" or "RGB".
            pixel_mean: the mean of each channel, in this order, of values from 0 to 255.
            pixel_std: the standard deviation of each channel, in the same way.
            augmentations: functions that change normalised batches in training, one after the
                other. Targets may become probabilities, (N, number of classes).
            label_smoothing: see :func:`torch.nn.functional.cross_entropy`.
        """
        super().__init__()
        self.network = network
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.augmentations = augmentations
        self.label_smoothing = label_smoothing
        self.teacher: ClassTeacher | None = None

    def forward(self, batch: Batch) -> dict[str, torch.Tensor] | torch.Tensor:
        """Compute the losses of a batch in training, and its logits otherwise.

        Args:
            batch: RGB images, (N, 3, H, W) from 0 to 255, and the numbers of their classes, (N,).

        Returns:
            in training, the losses by name; otherwise the logits, (N, number of classes).
        """
        images, targets = (tensor.to(self.pixel_mean.device, non_blocking=True) for tensor in batch)
        if self.input_format == "BGR":
            images = images.flip(1)
        images = (images - self.pixel_mean) / self.pixel_std
        if not self.training:
            return self.network(images)["linear"]
        for augment in self.augmentations:
            images, targets = augment(images, targets)
        logits = self.network(images)["linear"]
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if self.teacher is None:
            return {"loss_cls": loss}
        seen = images * self.pixel_std + self.pixel_mean
        taught = self.teacher.compute_loss(seen, self.input_format, logits)
        return {"loss_cls": loss, "loss_distillation": taught}


class AccuracyEvaluator(DatasetEvaluator):
    """Top-1 and top-5 accuracy in percent, over all processes.

    With fewer than five classes, top-5 counts as many as there are.
    """

    def reset(self) -> None:
        self._counts = torch.zeros(3, dtype=torch.long)  # images, top-1, top-5

    def process(self, inputs: Batch, outputs: torch.Tensor) -> None:
        targets, logits = inputs[1], outputs.float().cpu()
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        self._counts += torch.tensor([len(targets), best[:, 0].sum(), best.sum()])

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        gathered = comm.gather(self._counts)
        if not comm.is_main_process():
            return None
        images, top1, top5 = sum(gathered).tolist()
        return {"classification": {"top1": 100 * top1 / images, "top5": 100 * top5 / images}}


class ClassifierTrainer(Trainer):
    """A :class:`Trainer` of a classifier, on the data of the ``PRETRAIN`` node."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> ImageClassifier:
        model = ImageClassifier(
            build_network(cfg),
            input_format=cfg.INPUT.FORMAT,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            augmentations=_batch_augmentations(cfg),
            # Mixup smooths the labels itself.
            label_smoothing=0.0 if _mixes(cfg) else cfg.PRETRAIN.LABEL_SMOOTHING,
        )
        logger.info("Model:\n%s", model)
        return to_memory_format(model.to(cfg.MODEL.DEVICE), cfg)

    @classmethod
    def add_teacher(cls, cfg: CfgNode, model: nn.Module, *, allow_pickle: bool) -> None:
        """Give ``model`` the teacher of timm that ``DISTILLATION`` names, if there is one."""
        if cfg.DISTILLATION.TEACHER:
            model.teacher = build_class_teacher(cfg)  # type: ignore[assignment]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of timm that ``PRETRAIN.OPTIMIZER`` names. Biases and norms are not
        decayed.
        """
        name = cfg.PRETRAIN.OPTIMIZER
        if name not in list_optimizers():
            hint = (
                suggest(name, map(str, list_optimizers()), cutoff=0.4)
                or " There are 'sgd', 'adamw', ..."
            )
            raise UserValueError(f"PRETRAIN.OPTIMIZER {name!r} is none of timm's.{hint}")
        optimizer = create_optimizer_v2(
            model,
            name,
            lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            momentum=cfg.SOLVER.MOMENTUM,
        )
        return maybe_add_gradient_clipping(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Batch]:
        (split,) = cfg.DATASETS.TRAIN
        dataset = _build_dataset(cfg, split, _training_transform(cfg))
        number, batch = len(dataset), cfg.SOLVER.IMS_PER_BATCH
        logger.info(
            "%s of %s in %s; %d iterations are %.1f epochs.",
            *(counted(number, "images"), counted(cfg.PRETRAIN.NUM_CLASSES, "classes"), split),
            *(cfg.SOLVER.MAX_ITER, cfg.SOLVER.MAX_ITER * batch / number),
        )
        return TrainingStream(
            dataset,
            lambda: TrainingSampler(number),
            batch,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            pin_memory=goes_to_gpu(cfg),
            seed=max(cfg.SEED, 0),
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Batch]:
        dataset = _build_dataset(cfg, dataset_name, _test_transform(cfg))
        loader = DataLoader(
            dataset,
            batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
            sampler=InferenceSampler(len(dataset)),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        return attend_to_workers(loader)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, *, suffix: str = ""
    ) -> AccuracyEvaluator:
        return AccuracyEvaluator()

    @classmethod
    def main_metric(cls, cfg: CfgNode) -> str | None:
        return "classification/top1" if cfg.DATASETS.TEST else None

    def build_hooks(self) -> list[HookBase | None]:
        """Return the hooks of :class:`Trainer` without the hook that keeps the best checkpoint.

        The learning rate falls to zero, so the last weights are the best ones.
        """
        return [hook for hook in super().build_hooks() if not isinstance(hook, BestCheckpointer)]


def build_network(cfg: CfgNode) -> nn.Module:
    """Build the classifier ``PRETRAIN.NETWORK``, for ``PRETRAIN.NUM_CLASSES`` classes."""
    num_classes = cfg.PRETRAIN.NUM_CLASSES
    if cfg.PRETRAIN.NETWORK != "VoVNet":
        return CifarClassifier(cfg.PRETRAIN.NETWORK, num_classes=num_classes)
    return build_vovnet_classifier(cfg, ShapeSpec(channels=3), num_classes)


# Augmentation: of single images in the workers, of batches in the model.


def _build_dataset(cfg: CfgNode, split: str, transform: Callable[..., Any]) -> Any:
    return build_classification_dataset(
        cfg.PRETRAIN.DATA, split, transform, image_size=cfg.PRETRAIN.IMAGE_SIZE
    )


def _rgb_mean(cfg: CfgNode) -> tuple[float, ...]:
    """Return the colour that augmentation fills borders with."""
    mean = [value / 255 for value in cfg.MODEL.PIXEL_MEAN]
    return tuple(mean if cfg.INPUT.FORMAT == "RGB" else reversed(mean))


def _training_transform(cfg: CfgNode) -> Callable[..., Any]:
    node = cfg.PRETRAIN
    try:
        return create_transform(
            node.IMAGE_SIZE,
            is_training=True,
            scale=node.SCALE,
            ratio=node.RATIO,
            hflip=node.HFLIP,
            color_jitter=node.COLOR_JITTER,
            auto_augment=node.AUTO_AUGMENT or None,
            interpolation="random",
            mean=_rgb_mean(cfg),
            normalize=False,
        )
    except (AssertionError, ValueError) as error:
        raise UserValueError(
            f"PRETRAIN.AUTO_AUGMENT {node.AUTO_AUGMENT!r} is none of timm's policies ({error}). "
            "Examples: rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original; or '' for none."
        ) from error


def _test_transform(cfg: CfgNode) -> Callable[..., Any]:
    return create_transform(
        cfg.PRETRAIN.IMAGE_SIZE,
        is_training=False,
        crop_pct=cfg.PRETRAIN.CROP_PCT,
        interpolation="bicubic",
        normalize=False,
    )


def _mixes(cfg: CfgNode) -> bool:
    return cfg.PRETRAIN.MIXUP > 0 or cfg.PRETRAIN.CUTMIX > 0


def _batch_augmentations(cfg: CfgNode) -> list[Augmentation]:
    node = cfg.PRETRAIN
    augmentations: list[Augmentation] = []
    if node.RE_PROB > 0:
        erase = RandomErasing(node.RE_PROB, device=cfg.MODEL.DEVICE)
        augmentations.append(lambda images, targets: (erase(images), targets))
    if _mixes(cfg):
        augmentations.append(
            Mixup(
                mixup_alpha=node.MIXUP,
                cutmix_alpha=node.CUTMIX,
                label_smoothing=node.LABEL_SMOOTHING,
                num_classes=node.NUM_CLASSES,
            )
        )
    return augmentations
