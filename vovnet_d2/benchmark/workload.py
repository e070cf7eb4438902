# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Make the work that is timed: one inference, or one training step, on random images."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..analysis.memory_access import layer_cost
from ..analysis.observe import observe
from .treatments import Treatment

_OBJECTS = 8  # per image, about as many as in COCO
_LEARNING_RATE = 1e-6  # small steps keep the weights finite


def random_images(batch: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Return normalised images (batch, 3, height, width)."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)


def as_pixels(images: Tensor) -> Tensor:
    """Turn normalised images into images with values from about 0 to 255."""
    return images * 50 + 128


def detector_inputs(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Return images as Detectron2's data loader does. A model in training mode also gets boxes,
    masks, keypoints and labels for its heads."""
    height, width = images.shape[-2:]
    inputs = []
    for image in images:
        record = {"image": as_pixels(image), "height": height, "width": width}
        if model.training:
            record["instances"] = _random_objects(model, height, width).to(image.device)
            semantic: Any = getattr(model, "sem_seg_head", None)
            if semantic is not None:
                record["sem_seg"] = torch.zeros(
                    height, width, dtype=torch.long, device=image.device
                )
        inputs.append(record)
    return inputs


def network_inputs(model: nn.Module, images: Tensor, *, is_detector: bool, last: bool) -> Any:
    """Return normalised images as a network takes them. With ``last``, a backbone gets them in the
    memory format channels-last."""
    if is_detector:
        return detector_inputs(model, images)
    return images.to(memory_format=torch.channels_last) if last else images


def _random_objects(model: nn.Module, height: int, width: int) -> Instances:
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([width, height])
    corner = torch.rand(_OBJECTS, 2, generator=generator) * size * 0.7
    sides = (torch.rand(_OBJECTS, 2, generator=generator) * 0.25 + 0.05) * size
    boxes = torch.cat([corner, corner + sides], dim=1)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.zeros(_OBJECTS, dtype=torch.long)
    heads: Any = getattr(model, "roi_heads", None)
    if getattr(heads, "mask_on", False):
        x0, y0, x1, y1 = boxes.unbind(1)
        corners = torch.stack([x0, y0, x1, y0, x1, y1, x0, y1], dim=1)
        instances.gt_masks = PolygonMasks([[polygon.numpy()] for polygon in corners])
    if getattr(heads, "keypoint_on", False):
        number = heads.keypoint_head.num_keypoints
        centres = (corner + sides / 2)[:, None].expand(-1, number, -1)
        visible = torch.full((_OBJECTS, number, 1), 2.0)
        instances.gt_keypoints = Keypoints(torch.cat([centres, visible], dim=2))
    return instances


def inference(
    model: nn.Module, inputs: Any, treatment: Treatment, device: torch.device
) -> Callable[[], object]:
    """Return a function that runs a model without autograd."""

    def call() -> object:
        with torch.inference_mode(), treatment.precision(device):
            return model(inputs)

    return call


def training_step(
    model: nn.Module, inputs: Any, treatment: Treatment, device: torch.device
) -> Callable[[], object]:
    """Return a function that runs one step: forward, backward, SGD with momentum.

    The loss is the detector's loss, or the sum of the means of the backbone's feature maps.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=_LEARNING_RATE, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=treatment.dtype == torch.float16)

    def call() -> object:
        with treatment.precision(device):
            with treatment.autocast(device), EventStorage():
                outputs = model(inputs)
                loss = sum(value.float().mean() for value in outputs.values())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return loss

    return call


def count_multiply_adds(call: Callable[[], object]) -> int:
    """Count the multiply-adds of convolutions, fully-connected layers and attention in a call, with
    its backward pass."""
    counter = _Counter()
    with observe(counter):
        call()
    return counter.multiply_adds


class _Counter:
    def __init__(self) -> None:
        self.multiply_adds = 0

    def observe(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        if func._overloadpacket == torch.ops.aten.convolution_backward:
            # torch counts grouped convolutions as dense ones. The gradients of input and weight
            # each cost as much as the convolution.
            gradient, features, weight, *_, transposed, _, _, wanted = args
            places = features if transposed else gradient
            self.multiply_adds += sum(wanted[:2]) * places.numel() * weight[0].numel()
        elif (cost := layer_cost(func, args, kwargs, out)) is not None:
            self.multiply_adds += cost.multiply_adds
