# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Which of a network's predictions are shown."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances

__all__ = ["Selection", "Shown"]


class Shown(NamedTuple):
    """What is left of a prediction, on the CPU; None for what the network does not predict.

    Attributes:
        instances: see Detectron2's output format.
        labels: (H, W), the category of each pixel among ``stuff_classes``; their number where it
            is none of those selected.
        panoptic: (H, W) ids of segments, and a dict for each segment that is shown.
    """

    instances: Instances | None
    labels: torch.Tensor | None
    panoptic: tuple[torch.Tensor, list[dict[str, Any]]] | None


class Selection:
    """Predictions from a score on, of some categories or all."""

    def __init__(self, metadata: Metadata, *, min_score: float, names: Sequence[str] = ()):
        """
        Args:
            metadata: with the categories' names.
            min_score: of instances.
            names: of the categories; none for all.

        Raises:
            ValueError: there is no category of a name.
        """
        self.min_score = min_score
        self._things = _Categories(metadata.get("thing_classes", []), names)
        self._stuff = _Categories(metadata.get("stuff_classes", []), names)
        known = [*self._things.names, *self._stuff.names]
        for name in names:
            if name not in known:
                close = get_close_matches(name, known, n=3, cutoff=0.5) or known
                raise ValueError(f"There is no category {name!r}. There are: {', '.join(close)}.")

    def __call__(self, prediction: dict[str, Any]) -> Shown:
        """
        Args:
            prediction: for an image, in Detectron2's output format, on the CPU.
        """
        instances = prediction.get("instances")
        if instances is not None:
            instances = instances[instances.scores >= self.min_score]
            instances = instances[self._things.mark(instances.pred_classes)]
        labels = prediction.get("sem_seg")
        if labels is not None:
            none, labels = len(labels), labels.argmax(dim=0)
            labels = torch.where(self._stuff.mark(labels), labels, none)
        panoptic = prediction.get("panoptic_seg")
        if panoptic is not None:
            panoptic = (panoptic[0], [s for s in panoptic[1] if self._is_shown(s)])
        return Shown(instances, labels, panoptic)

    def _is_shown(self, segment: dict[str, Any]) -> bool:
        categories = self._things if segment["isthing"] else self._stuff
        selected = categories.mark(torch.tensor(segment["category_id"])).item()
        return bool(selected) and segment.get("score", 1.0) >= self.min_score


class _Categories:
    def __init__(self, names: Sequence[str], selected: Sequence[str]):
        names = [str(name) for name in names]  # a data set of somebody's may have numbers
        self.names = names
        self._all = not selected
        self._numbers = torch.tensor([i for i, name in enumerate(names) if name in selected])

    def mark(self, numbers: torch.Tensor) -> torch.Tensor:
        """Whether each number is that of a category which is selected."""
        if self._all:
            return torch.ones_like(numbers, dtype=torch.bool)
        return torch.isin(numbers, self._numbers)
