# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Write detections as JSON in COCO's results format."""

import json
from contextlib import AbstractContextManager
from pathlib import Path

from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from ..drawing.artist import Shown
from ..errors import UserValueError
from ..made import note_made
from .inputs import Frame


class ResultsFile(AbstractContextManager["ResultsFile"]):
    """Writes a list detection by detection. The file is valid JSON once it is closed.

    Each detection has ``file_name`` in addition to the keys of COCO's format. ``image_id`` counts
    the inputs, or the frames of a video, from 1. ``category_id`` is the id of the data set if that
    is known, and otherwise the index of the network's output, from 0.
    """

    def __init__(self, path: Path, metadata: Metadata):
        """Open the file. Raise ValueError if it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._path = path.open("w", encoding="utf-8"), path
        except OSError as error:
            raise UserValueError(f"{path} cannot be written ({error.strerror}).") from error
        ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
        self._category_ids = {number: category for category, number in ids.items()}
        self._separator = "[\n"

    def __exit__(self, *error: object) -> None:
        self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")
        self._file.close()
        note_made(self._path)

    def write(self, frame: Frame, shown: Shown) -> None:
        """Write the detections of an image. Raise ValueError if the network predicts none."""
        if shown.instances is None:
            raise UserValueError(
                "The network predicts no instances, so nothing can be written as JSON: leave out "
                "--json."
            )
        for result in instances_to_coco_json(shown.instances, frame.number):
            number = result["category_id"]
            result["category_id"] = self._category_ids.get(number, number)
            result["file_name"] = frame.name
            self._file.write(self._separator + json.dumps(result))
            self._separator = ",\n"
