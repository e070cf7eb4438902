# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A detector with a program in the place of its backbone, FPN and dense head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.modeling import Backbone
from torch import Tensor, nn

from ..export.dense import find_dense_head, prediction_name
from ..modeling.inference import optimize_for_inference

__all__ = ["run_dense_part_elsewhere"]


@dataclass
class _Results:
    """The outputs of the program for the last images, kept until the head asks for its share."""

    maps: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)


class _BackboneElsewhere(Backbone):
    """A backbone whose feature maps a program computes, and with them the head's predictions."""

    def __init__(self, backbone: Backbone, results: _Results):
        super().__init__()
        self.program: Any = None  # set when the detector has been copied for the last time
        self.output_names: tuple[str, ...] = ()
        self._shapes = backbone.output_shape()
        self._size_divisibility = backbone.size_divisibility
        self._padding_constraints = backbone.padding_constraints
        self._results = results

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self._padding_constraints

    def output_shape(self) -> Any:
        return self._shapes

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = (value.to(images.device) for value in self.program(images.contiguous()))
        outputs = dict(zip(self.output_names, values, strict=True))
        maps = {name: outputs.pop(name) for name in self._shapes}
        if outputs:
            self._results.maps, self._results.predictions = maps, outputs
        return maps


class _HeadElsewhere(nn.Module):
    """A head whose predictions have been computed together with the feature maps."""

    def __init__(self, features: Sequence[str], results: _Results):
        super().__init__()
        self.features = tuple(features)
        self._results = results

    def forward(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        maps, predictions = self._results.maps, self._results.predictions
        self._results.maps, self._results.predictions = {}, {}
        assert features[0] is maps.get(self.features[0]), "These maps are not the backbone's last."
        kinds = len(predictions) // len(self.features)
        return [
            [predictions[prediction_name(kind, feature)] for feature in self.features]
            for kind in range(kinds)
        ]


def run_dense_part_elsewhere(model: Any, program: Any, output_names: Sequence[str]) -> nn.Module:
    """Copy a detector, for inference, with a program in the place of its dense part.

    Args:
        model: a detector. It is left as it is.
        program: takes images (N, C, H, W), normalised and padded, and returns the outputs of
            :class:`DensePart` as a tuple.
        output_names: the names of these outputs.

    Returns:
        the copy, whose other parts :func:`optimize_for_inference` made fast.
    """
    results = _Results()
    head, features = find_dense_head(model)
    # What is in the memo of a copy takes the place of the original.
    memo: dict[int, Any] = {id(model.backbone): _BackboneElsewhere(model.backbone, results)}
    if head is not None:
        memo[id(head)] = _HeadElsewhere(features, results)
    copied: Any = optimize_for_inference(copy.deepcopy(model, memo))
    copied.backbone.program = program
    copied.backbone.output_names = tuple(output_names)
    return copied
