# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Select the predictions that are shown."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.data.catalog import Metadata

from ..drawing.artist import Shown
from ..errors import UserValueError
from ..words import suggest


class Selection:
    """Selects predictions by their score and their category."""

    def __init__(self, metadata: Metadata, *, min_score: float, names: Sequence[str] = ()):
        """
        Args:
            metadata: with the categories' names.
            min_score: least score of instances.
            names: names of categories; empty for all.

        Raises:
            ValueError: a name is not a category.
        """
        self.min_score = min_score
        self._things = _Categories(metadata.get("thing_classes", []), names)
        self._stuff = _Categories(metadata.get("stuff_classes", []), names)
        known = [*self._things.names, *self._stuff.names]
        for name in names:
            if name not in known:
                hint = suggest(name, known, cutoff=0.5) or f" There are: {', '.join(known)}."
                raise UserValueError(f"There is no category {name!r}.{hint}")

    def __call__(self, prediction: dict[str, Any]) -> Shown:
        """Select from the prediction for an image, in Detectron2's output format and on the CPU."""
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
        names = [str(name) for name in names]  # the names of a custom data set may be numbers
        self.names = names
        self._all = not selected
        self._numbers = torch.tensor([i for i, name in enumerate(names) if name in selected])

    def mark(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return for each number whether its category is selected."""
        if self._all:
            return torch.ones_like(numbers, dtype=torch.bool)
        return torch.isin(numbers, self._numbers)
