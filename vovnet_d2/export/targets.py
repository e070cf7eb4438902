# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What can be exported: a part of a model, as a function from tensors to tensors."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.export.flatten import DictSchema, InstancesSchema, ListSchema, Schema
from detectron2.layers import shapes_to_tensor
from detectron2.modeling import FPN, Backbone, GeneralizedRCNN
from detectron2.modeling.meta_arch import PanopticFPN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import nn

from ..modeling.inference import optimize_for_inference
from .dense import DensePart
from .masks import paste_masks

__all__ = ["PARTS", "BackboneTarget", "DetectorTarget", "ExportTarget", "select_target"]

PARTS = ("backbone", "fpn", "dense", "detector")
"""What of a detector can be exported: VoVNet alone, with its FPN, with its dense head too (see
:class:`~.dense.DensePart`), or everything."""


class ExportTarget(ABC):
    """A module to export, its contract, and the model that it has to agree with.

    Attributes:
        description: one line for people.
        module: takes tensors, returns a tuple of tensors; a copy, ready for inference.
        input_names: of its inputs, as ``output_names`` of its outputs.
        example: inputs to trace it with.
        batched: whether it takes several images at once.
    """

    description: str
    module: nn.Module
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    example: tuple[torch.Tensor, ...]
    batched: bool

    @abstractmethod
    def eager(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the model itself returns, unoptimised, for inputs of the exported module."""

    @abstractmethod
    def inputs_from(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs of the exported module, with all done that the module does not do itself.

        Args:
            images: (N, C, H, W), raw pixels in the order of channels that the model expects; N is
                1 unless the target is ``batched``.
        """


class BackboneTarget(ExportTarget):
    """A backbone, with or without FPN: (N, C, H, W) to its maps, all of N, H and W dynamic unless
    a shape is given."""

    batched = True
    input_names = ("images",)

    def __init__(
        self,
        backbone: Backbone,
        *,
        pixel_mean: torch.Tensor,
        pixel_std: torch.Tensor,
        preprocessing: bool = True,
        shape: tuple[int, int, int] | None = None,
    ):
        """
        Args:
            backbone: any whose ``forward`` returns a dict of maps.
            pixel_mean: (C, 1, 1), as is ``pixel_std``.
            preprocessing: whether the module takes raw pixels and normalises them, or takes them
                normalised.
            shape: the only N, H and W that the module is to take, as TensorRT and other compilers
                want it; None for any.

        Raises:
            ValueError: a height or width that the backbone does not take.
        """
        # FPN adds upsampled maps: they fit where its strides divide the sides.
        self.divisor = max(backbone.size_divisibility, 1)
        self.shape = shape
        if shape and any(side < 32 or side % self.divisor for side in shape[1:]):
            raise ValueError(
                f"An image of {shape[1]}x{shape[2]} is not what the backbone takes: give a height "
                f"and width from 32 up that are multiples of {self.divisor}."
            )
        self.preprocessing = preprocessing
        self._normalize = _Normalize(pixel_mean, pixel_std)
        first = self._normalize if preprocessing else nn.Identity()
        optimized = optimize_for_inference(backbone, memory_format=torch.contiguous_format)
        self.module = _Maps(first, optimized).eval()
        self._model = _Maps(first, copy.deepcopy(backbone)).eval()
        # No two sides alike, nor like the batch or the channels: an exporter may take two numbers
        # that are equal for one.
        batch, *size = shape or (2, 3 * self.divisor + 64, 4 * self.divisor + 64)
        images = torch.rand((batch, len(pixel_mean), *size), device=pixel_mean.device) * 255
        self.example = self.inputs_from(images)
        with torch.no_grad():
            self.output_names = tuple(self._model.maps(*self.example))
        n, height, width = shape or ("N", "H", "W")
        self.description = (
            f"{type(backbone).__name__}: images ({n}, {len(pixel_mean)}, {height}, {width})"
            + (f", H and W multiples of {self.divisor}," if self.divisor > 1 and not shape else "")
            + (" of raw pixels" if preprocessing else " of normalised pixels")
            + f" to {', '.join(self.output_names)}"
        )

    def eager(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return self._model(*inputs)

    def inputs_from(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See :class:`ExportTarget`; what is over the next multiple of the sides is cut off."""
        height, width = (size // self.divisor * self.divisor for size in images.shape[-2:])
        images = images[..., :height, :width]
        return (images if self.preprocessing else self._normalize(images),)


class _Normalize(nn.Module):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


class _Maps(nn.Module):
    def __init__(self, normalize: nn.Module, backbone: nn.Module):
        super().__init__()
        self.normalize = normalize
        self.backbone = backbone

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.backbone(self.normalize(images))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.maps(images).values())


class DetectorTarget(ExportTarget):
    """A whole detector by Detectron2's :class:`TracingAdapter`: one image to its detections.

    Any meta-architecture that takes Detectron2's inputs and whose outputs are made of tensors.
    """

    batched = False

    def __init__(self, model: Any, *, preprocessing: bool = True, postprocessing: bool = True):
        """
        Args:
            model: the detector.
            preprocessing: whether the module takes a raw image of any size, and normalises and pads
                it; or takes it normalised, its sides multiples of the backbone's
                ``size_divisibility``.
            postprocessing: whether the module also takes the height and width that boxes, keypoints
                and masks are to be in, and pastes the masks; or leaves boxes in pixels of the image
                and masks in their boxes, as Detectron2's ``do_postprocess=False``.

        Raises:
            ValueError: some of the outputs are not tensors.
        """
        self.postprocessing = postprocessing
        self._preprocess = None if preprocessing else model.preprocess_image
        self.input_names = ("image", "height", "width") if postprocessing else ("image",)
        optimized = optimize_for_inference(model, memory_format=torch.contiguous_format)
        size = (1, len(model.pixel_mean), 200, 264)
        self.example = self.inputs_from(torch.rand(size, device=model.device) * 255)
        self.module = self._adapt(optimized)
        self._model = self._adapt(copy.deepcopy(model).eval())
        self.output_names = self._find_output_names()
        self.description = (
            f"{type(model).__name__}: image (C, H, W), "
            + ("raw pixels" if preprocessing else "normalised and padded")
            + (", and height and width of the result," if postprocessing else "")
            + f" to {', '.join(self.output_names)}"
        )

    def eager(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._model(*inputs)

    def inputs_from(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See :class:`ExportTarget`; the result is to be in twice the image's size."""
        (image,) = images
        size = tuple(torch.tensor(2 * side) for side in image.shape[-2:])
        if self._preprocess is not None:
            (image,) = self._preprocess([{"image": image}]).tensor
        return (image, *size) if self.postprocessing else (image,)

    def _adapt(self, model: Any) -> TracingAdapter:
        if self._preprocess is not None:
            model.preprocess_image = _take_as_preprocessed
        return TracingAdapter(model, self.example, _infer).eval()

    def _find_output_names(self) -> tuple[str, ...]:
        try:
            self.module(*self.example)
        except ValueError as error:
            raise ValueError(
                f"{type(self.module.model).__name__} cannot be exported whole, as not all that it "
                "returns are tensors: export its part backbone or fpn."
            ) from error
        return tuple(_leaf_names(self.module.outputs_schema))


def _take_as_preprocessed(batched_inputs: list[dict[str, torch.Tensor]]) -> ImageList:
    (inputs,) = batched_inputs
    image = inputs["image"]
    return ImageList(image[None], [shapes_to_tensor(image.shape[-2:])])


def _infer(model: Any, image: torch.Tensor, *size: torch.Tensor) -> list[dict[str, Any]]:
    """What the model returns for an image; while it is traced, with our masks.

    Args:
        size: height and width of the result, or nothing to do without post-processing.
    """
    inputs = {"image": image, **dict(zip(("height", "width"), size, strict=False))}
    is_rcnn = isinstance(model, GeneralizedRCNN) and not isinstance(model, PanopticFPN)
    if not is_rcnn or (size and not torch.jit.is_tracing()):
        return model([inputs])
    (instances,) = model.inference([inputs], do_postprocess=False)
    return [{"instances": _postprocess(instances, *size) if size else instances}]


def _postprocess(instances: Instances, height: Any, width: Any) -> Instances:
    """Detectron2's, but for the masks."""
    if not instances.has("pred_masks"):
        return detector_postprocess(instances, height, width)
    instances.roi_masks = instances.pred_masks[:, 0]
    instances.remove("pred_masks")
    instances = detector_postprocess(instances, height, width)
    instances.pred_masks = paste_masks(
        instances.roi_masks, instances.pred_boxes.tensor, height, width
    )
    instances.remove("roi_masks")
    return instances


def _leaf_names(schema: Schema, name: str = "") -> Iterator[str]:
    """The keys of what a :class:`TracingAdapter` flattened, in its order."""
    if isinstance(schema, DictSchema):
        for key, part in zip(schema.keys, schema.schemas, strict=True):
            yield from _leaf_names(part, key)
        if isinstance(schema, InstancesSchema):
            yield "image_size"
    elif isinstance(schema, ListSchema):
        for part in schema.schemas:
            yield from _leaf_names(part, name)
    else:
        yield name


def select_target(
    model: Any,
    part: str,
    *,
    preprocessing: bool = True,
    postprocessing: bool = True,
    shape: tuple[int, int, int] | None = None,
) -> ExportTarget:
    """
    Args:
        model: a detector of Detectron2's.
        part: one of :data:`PARTS`.
        preprocessing: see :class:`BackboneTarget` and :class:`DetectorTarget`, as for
            ``postprocessing``, which a backbone has none of.
        shape: see :class:`BackboneTarget`.

    Raises:
        ValueError: an unknown part, one that the model does not have, or a shape that it does not
            take.
    """
    if part not in PARTS:
        raise ValueError(f"Unknown part {part!r}: choose from {', '.join(PARTS)}.")
    if part == "detector":
        if shape:
            raise ValueError("A whole detector takes images of any size: export its part fpn.")
        return DetectorTarget(model, preprocessing=preprocessing, postprocessing=postprocessing)
    backbone = model.backbone
    has_fpn = isinstance(backbone, FPN)
    if part == "fpn" and not has_fpn:
        raise ValueError(
            f"The backbone of the model, {type(backbone).__name__}, has no FPN: export its part "
            "backbone."
        )
    if part == "dense":
        backbone = DensePart(model)
    elif part == "backbone" and has_fpn:
        backbone = backbone.bottom_up
    return BackboneTarget(
        backbone,
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
        preprocessing=preprocessing,
        shape=shape,
    )
