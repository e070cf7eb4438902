# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A detector in which a program computes the backbone, the FPN and the dense head."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.modeling import Backbone
from torch import Tensor, nn

from ..export.dense import find_dense_head, prediction_name
from ..modeling.inference import optimize_for_inference


@dataclass
class _Results:
    """The outputs of the program for the last images, kept until the head reads them."""

    maps: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)


class _BackboneElsewhere(Backbone):
    """A backbone whose program computes the feature maps and the predictions of the head."""

    def __init__(self, backbone: Backbone, results: _Results):
        super().__init__()
        self.program: Any = None  # set after the detector was copied, as programs cannot be copied
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
        assert features[0] is maps.get(self.features[0]), "Feature maps are not the last ones."
        kinds = len(predictions) // len(self.features)
        return [
            [predictions[prediction_name(kind, feature)] for feature in self.features]
            for kind in range(kinds)
        ]


def run_dense_part_elsewhere(model: Any, program: Any, output_names: Sequence[str]) -> nn.Module:
    """Copy a detector for inference and let a program compute its dense part.

    Args:
        model: a detector. It is not changed.
        program: takes images (N, C, H, W), normalised and padded, and returns the outputs of
            :class:`DensePart` as a tuple.
        output_names: the names of these outputs.

    Returns:
        the copy, whose other parts have gone through :func:`optimize_for_inference`.
    """
    results = _Results()
    head, features = find_dense_head(model)
    # A copy takes the modules of the memo instead of copies of the originals.
    memo: dict[int, Any] = {id(model.backbone): _BackboneElsewhere(model.backbone, results)}
    if head is not None:
        memo[id(head)] = _HeadElsewhere(features, results)
    copied: Any = optimize_for_inference(copy.deepcopy(model, memo))
    copied.backbone.program = program
    copied.backbone.output_names = tuple(output_names)
    return copied
