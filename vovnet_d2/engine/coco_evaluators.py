# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's evaluator of COCO-format data sets, for categories and annotations of all kinds."""

import os
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

# The annotation files that Detectron2 has written for data sets without one.
_CONVERTED: set[str] = set()


class CategoriesByName(COCOEvaluator):
    """Detectron2's evaluator, which names the metrics of single categories correctly, even if the
    ids of a file are in another order than the outputs of the network."""

    _coco_api: Any

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        numbers = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if class_names and numbers:
            # The evaluation is in the order of the ids.
            class_names = [class_names[numbers[category]] for category in sorted(numbers)]
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


class PlainCOCOEvaluator(CategoriesByName):
    """Detectron2's evaluator on pycocotools."""

    def __init__(self, dataset_name: str, **arguments: Any):
        """
        Args:
            arguments: the arguments of :class:`detectron2.evaluation.COCOEvaluator`.
        """
        super().__init__(dataset_name, use_fast_impl=False, **arguments)


def convert_anew(name: str, folder: str) -> None:
    """Have Detectron2 write the annotation file of a data set that has none to the evaluator's
    folder, from what is registered now.

    Otherwise Detectron2 takes the file of an earlier run, whatever has changed since.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") in _CONVERTED:
        del metadata.json_file
    if metadata.get("json_file"):
        return
    path = os.path.join(folder, f"{name}_coco_format.json")
    if comm.is_main_process() and os.path.exists(path):
        os.remove(path)
    comm.synchronize()
    _CONVERTED.add(path)
