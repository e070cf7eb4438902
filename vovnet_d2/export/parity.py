# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Comparison of the outputs of an exported model with those of the original model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torchvision.ops import box_iou

MAP_TOLERANCE = 1e-4
"""The largest difference of a feature map, relative to its largest value."""

MIN_IOU, SCORE_TOLERANCE = 0.99, 1e-3
"""Two detections of one class are the same within these limits."""

FIELD_TOLERANCE = 1e-2
"""The largest relative difference of other fields of a detection, such as keypoints, and the
largest share of pixels of boolean masks that differ."""

Outputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class MapDifference:
    """Holds the difference between two feature maps.

    Attributes:
        absolute: the largest difference; infinite if the shapes differ.
        relative: the largest difference divided by the largest expected absolute value.
    """

    absolute: float
    relative: float

    @property
    def agrees(self) -> bool:
        return self.relative <= MAP_TOLERANCE


@dataclass(frozen=True)
class DetectionDifference:
    """Holds the difference between the detections of two models in an image.

    Attributes:
        expected: number of detections of the original model.
        found: number of detections of the exported model.
        matched: number of detections that both have.
        iou: the least IoU of matched boxes.
        box: the largest difference of their coordinates, in pixels.
        score: the largest difference of their scores.
        fields: the relative differences of all other fields.
    """

    expected: int
    found: int
    matched: int
    iou: float
    box: float
    score: float
    fields: dict[str, float]

    @property
    def agrees(self) -> bool:
        return self.matched == self.expected == self.found and all(
            difference <= FIELD_TOLERANCE for difference in self.fields.values()
        )


Difference = MapDifference | DetectionDifference


def compare(actual: Outputs, expected: Outputs) -> dict[str, Difference]:
    """Compare the outputs of two models.

    Args:
        actual: outputs of the exported model by name.
        expected: outputs of the original model by name.

    Returns:
        the difference of all detections, in any order, under "detections", and of any other output
        under its name.
    """
    if "pred_boxes" in expected:
        return {"detections": _compare_detections(actual, expected)}
    return {name: _compare_maps(actual[name], expected[name]) for name in expected}


def _compare_maps(actual: torch.Tensor, expected: torch.Tensor) -> MapDifference:
    if actual.shape != expected.shape:
        return MapDifference(math.inf, math.inf)
    if not expected.numel():
        return MapDifference(0.0, 0.0)
    absolute = (actual.double() - expected.double()).abs().max().item()
    largest = expected.abs().max().item()
    return MapDifference(absolute, absolute / largest if largest else absolute)


def _compare_detections(actual: Outputs, expected: Outputs) -> DetectionDifference:
    found, wanted = _match(actual, expected)
    of_image = {"image_size"}
    pairs = {
        name: (actual[name], expected[name])
        if name in of_image
        else (actual[name][found], expected[name][wanted])
        for name in expected
    }
    iou = box_iou(*pairs["pred_boxes"]).diag()
    return DetectionDifference(
        expected=len(expected["scores"]),
        found=len(actual["scores"]),
        matched=len(wanted),
        iou=iou.min().item() if len(iou) else 1.0,
        box=_compare_maps(*pairs.pop("pred_boxes")).absolute,
        score=_compare_maps(*pairs.pop("scores")).absolute,
        fields={name: _compare_field(*pair) for name, pair in pairs.items()},
    )


def _compare_field(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.dtype == expected.dtype == torch.bool and actual.shape == expected.shape:
        return (actual != expected).double().mean().item() if actual.numel() else 0.0
    return _compare_maps(actual, expected).relative


def _match(actual: Outputs, expected: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the detections that both have. NMS leaves one match for each."""
    iou = box_iou(actual["pred_boxes"], expected["pred_boxes"])
    same = iou >= MIN_IOU
    same &= actual["pred_classes"][:, None] == expected["pred_classes"]
    same &= (actual["scores"][:, None] - expected["scores"]).abs() <= SCORE_TOLERANCE
    return same.nonzero(as_tuple=True)
