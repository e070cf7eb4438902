# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Images of rare classes are drawn more often, by Detectron2's RepeatFactorTrainingSampler."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)

_REPEATING = RepeatFactorTrainingSampler.__name__
_MOST_NAMED = 10


def build_sampler(records: Sequence[Mapping[str, Any]], threshold: float) -> Sampler[int]:
    """Return Detectron2's sampler for training. Images of a class that is in a share of the images
    below ``threshold`` are repeated; 0 repeats none."""
    if not threshold:
        return TrainingSampler(len(records))
    find_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    return RepeatFactorTrainingSampler(find_factors(records, threshold))


def report_repeats(
    cfg: CfgNode, records: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Log which classes are repeated, or that the keys of ``DATALOADER`` have no effect. ``names``
    are the names of the classes; empty if they have none."""
    threshold, sampler = cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.SAMPLER_TRAIN
    if sampler != _REPEATING:
        if threshold:
            logger.warning(
                "DATALOADER.REPEAT_THRESHOLD %g has no effect: images of rare classes come more "
                "often with DATALOADER.SAMPLER_TRAIN %s.",
                *(threshold, _REPEATING),
            )
        return
    images: Counter[int] = Counter()
    for record in records:
        images.update({annotation["category_id"] for annotation in record["annotations"]})
    rare = [label for label, count in images.items() if count < threshold * len(records)]
    if not rare:
        logger.warning(
            "DATALOADER.SAMPLER_TRAIN %s has no effect: no class is in less than the share "
            "DATALOADER.REPEAT_THRESHOLD %g of the images; the rarest is in %.2g of them.",
            *(sampler, threshold, min(images.values(), default=0) / len(records)),
        )
        return
    told = [
        f"{names[label] if label < len(names) else label} ({images[label] / len(records):.2g})"
        for label in sorted(rare, key=images.__getitem__)
    ]
    more = f" and {len(told) - _MOST_NAMED} others" if len(told) > _MOST_NAMED else ""
    logger.info(
        "Images of classes that occur in less than the share %g of the images are repeated: %s%s.",
        *(threshold, ", ".join(told[:_MOST_NAMED]), more),
    )
