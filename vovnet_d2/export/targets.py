# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of a model that can be exported, as functions from tensors to tensors."""

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

from ..errors import UserValueError
from ..modeling.inference import optimize_for_inference
from .dense import DensePart
from .masks import paste_masks

PARTS = ("backbone", "fpn", "dense", "detector")
"""The parts of a detector: the backbone without FPN, with FPN, with FPN and dense head (see
:class:`~.dense.DensePart`), or the whole detector."""


class ExportTarget(ABC):
    """A module to export, and the model that it has to agree with.

    Attributes:
        description: a line for the report.
        module: a copy for inference that takes tensors and returns a tuple of tensors.
        input_names, output_names: the names of its inputs and outputs.
        example: inputs to trace it with.
        batched: True if it takes several images at once.
    """

    description: str
    module: nn.Module
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    example: tuple[torch.Tensor, ...]
    batched: bool

    @abstractmethod
    def eager(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs of the original model for inputs of the exported module."""

    @abstractmethod
    def inputs_from(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Turn images (N, C, H, W), raw pixels with the channel order of the model, into inputs of
        the exported module. N is 1 unless the target is ``batched``."""


class BackboneTarget(ExportTarget):
    """A backbone, with or without FPN, from images (N, C, H, W) to its feature maps."""

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
            backbone: a backbone whose ``forward`` returns a dict of feature maps.
            pixel_mean, pixel_std: (C, 1, 1) each.
            preprocessing: whether the module normalises images itself.
            shape: fixed N, H and W, as TensorRT and other compilers need them; None for any.

        Raises:
            ValueError: the backbone does not take this height or width.
        """
        # The strides of FPN must divide the sides, so that upsampled feature maps fit.
        self.divisor = max(backbone.size_divisibility, 1)
        self.shape = shape
        if shape and any(side < 32 or side % self.divisor for side in shape[1:]):
            multiples = f" that are multiples of {self.divisor}" if self.divisor > 1 else ""
            raise UserValueError(
                f"The backbone does not take an image of {shape[1]}x{shape[2]}: give a height and "
                f"width from 32 up{multiples}."
            )
        self.preprocessing = preprocessing
        self._normalize = _Normalize(pixel_mean, pixel_std)
        first = self._normalize if preprocessing else nn.Identity()
        optimized = optimize_for_inference(backbone, memory_format=torch.contiguous_format)
        self.module = _Maps(first, optimized).eval()
        self._model = _Maps(first, copy.deepcopy(backbone)).eval()
        # Batch, channels, height and width differ, because an exporter may take equal numbers for
        # the same one.
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
        """See :class:`ExportTarget`; the sides are cropped to a multiple of the divisor."""
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
    """A whole detector, from one image to its detections, by Detectron2's :class:`TracingAdapter`.

    The outputs of the meta-architecture must consist of tensors.
    """

    batched = False

    def __init__(self, model: Any, *, preprocessing: bool = True, postprocessing: bool = True):
        """
        Args:
            model: the detector.
            preprocessing: whether the module normalises and pads images itself. If False, the sides
                of an image must be multiples of ``size_divisibility`` of the backbone.
            postprocessing: whether the module also takes the height and width of the result, scales
                boxes and keypoints to them, and pastes the masks. If False, boxes are in pixels of
                the image, and masks are in their boxes, as with ``do_postprocess=False`` in
                Detectron2.

        Raises:
            ValueError: some outputs are not tensors.
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
        """See :class:`ExportTarget`; the result has twice the size of the image."""
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
            raise UserValueError(
                f"{type(self.module.model).__name__} cannot be exported whole, because some of its "
                "outputs are not tensors: export its part backbone or fpn."
            ) from error
        return tuple(_leaf_names(self.module.outputs_schema))


def _take_as_preprocessed(batched_inputs: list[dict[str, torch.Tensor]]) -> ImageList:
    (inputs,) = batched_inputs
    image = inputs["image"]
    return ImageList(image[None], [shapes_to_tensor(image.shape[-2:])])


def _infer(model: Any, image: torch.Tensor, *size: torch.Tensor) -> list[dict[str, Any]]:
    """Run a model on an image; in a trace :func:`paste_masks` pastes the masks. ``size`` is the
    height and width of the result, or nothing for no post-processing."""
    inputs = {"image": image, **dict(zip(("height", "width"), size, strict=False))}
    is_rcnn = isinstance(model, GeneralizedRCNN) and not isinstance(model, PanopticFPN)
    if not is_rcnn or (size and not torch.jit.is_tracing()):
        return model([inputs])
    (instances,) = model.inference([inputs], do_postprocess=False)
    return [{"instances": _postprocess(instances, *size) if size else instances}]


def _postprocess(instances: Instances, height: Any, width: Any) -> Instances:
    """Apply Detectron2's ``detector_postprocess``, with masks pasted by :func:`paste_masks`."""
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
    """Yield the names of the outputs of a :class:`TracingAdapter`, in their order."""
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
    """Return a part of a detector as a target.

    Args:
        model: a detector of Detectron2's.
        part: one of :data:`PARTS`.
        preprocessing: see :class:`BackboneTarget` and :class:`DetectorTarget`.
        postprocessing: see :class:`DetectorTarget`; other parts ignore it.
        shape: see :class:`BackboneTarget`.

    Raises:
        ValueError: the part is unknown, the model does not have it, or it does not take the shape.
    """
    if part not in PARTS:
        raise UserValueError(f"Unknown part {part!r}: choose from {', '.join(PARTS)}.")
    if part == "detector":
        if shape:
            raise UserValueError("A whole detector takes images of any size: export its part fpn.")
        return DetectorTarget(model, preprocessing=preprocessing, postprocessing=postprocessing)
    backbone = model.backbone
    has_fpn = isinstance(backbone, FPN)
    if part == "fpn" and not has_fpn:
        raise UserValueError(
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
