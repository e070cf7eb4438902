# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The check of label maps for semantic segmentation, before the first iteration of a run."""

import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..data.check.label_maps import LabelCounts, count_labels, explain_labels
from ..errors import UserValueError

logger = logging.getLogger(__name__)


def check_label_maps(cfg: CfgNode, name: str) -> None:
    """Read all label maps of a registered data set once, shared among the processes.

    Raises:
        ValueError: a label map cannot be read or has another size than its picture, a value is no
            class of the network, or the metadata have another value for pixels that are not
            labelled.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    ignored = MetadataCatalog.get(name).get("ignore_label", head.IGNORE_VALUE)
    if ignored != head.IGNORE_VALUE:
        raise UserValueError(
            f"Data set {name} has ignore_label {ignored} in its metadata and the network "
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE {head.IGNORE_VALUE} for pixels that are not "
            "labelled: set them to the value that the label maps have."
        )
    records = [record for record in DatasetCatalog.get(name) if "sem_seg_file_name" in record]
    if not records:
        raise UserValueError(
            f"Data set {name} has no label maps (sem_seg_file_name in its records), which "
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} learns from."
        )
    rank, processes = comm.get_rank(), comm.get_world_size()
    counts = LabelCounts()
    for part in comm.all_gather(count_labels(records[rank::processes], f"label maps of {name}")):
        counts.merge(part)
    error, note = explain_labels(counts, head.NUM_CLASSES, ignored)
    if error:
        raise UserValueError(f"Data set {name}: {error}")
    logger.info("Data set %s: %s.", name, note)
