# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detections as JSON, in COCO's results format."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from ..made import note_made
from .inputs import Frame
from .selection import Shown

__all__ = ["ResultsFile"]


class ResultsFile(AbstractContextManager["ResultsFile"]):
    """A list that grows detection by detection, and is valid JSON once it is closed.

    Each has ``file_name`` in addition to what COCO's format has. ``image_id`` is the image's place
    among the inputs, or the frame's in the video, from 1. ``category_id`` is the data set's, if
    that is known; else the network's, from 0.
    """

    def __init__(self, path: Path, metadata: Metadata):
        """
        Raises:
            ValueError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._path = path.open("w", encoding="utf-8"), path
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}).") from error
        ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
        self._category_ids = {number: category for category, number in ids.items()}
        self._separator = "[\n"

    def __exit__(self, *error: object) -> None:
        self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")
        self._file.close()
        note_made(self._path)

    def write(self, frame: Frame, shown: Shown) -> None:
        """
        Raises:
            ValueError: the network predicts no instances.
        """
        if shown.instances is None:
            raise ValueError(
                "The network predicts no instances, which is what the JSON would be of: leave out "
                "--json."
            )
        for result in instances_to_coco_json(shown.instances, frame.number):
            number = result["category_id"]
            result["category_id"] = self._category_ids.get(number, number)
            result["file_name"] = frame.name
            self._file.write(self._separator + json.dumps(result))
            self._separator = ",\n"
