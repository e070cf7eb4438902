# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Oversampling of rare classes: its message, and the same images from both kinds of configs."""

import itertools
import logging
from collections import Counter

import pytest
from engine_runs import FASTER_RCNN

from vovnet_d2.data.oversampling import report_repeats
from vovnet_d2.data.stream import build_detection_stream
from vovnet_d2.engine import load_config
from vovnet_d2.engine.lazy import build_train_stream

# Class 0 is in all images, class 1 in four images, and class 2 in one image.
CLASSES = [(0,), (0, 1), (0,), (0, 1, 2), (0,), (0,), (0, 1), (0,), (0, 1), (0,)]
RECORDS = [
    {
        "file_name": f"{index}.png",
        "width": 9,
        "height": 8,
        "annotations": [{"category_id": label} for label in labels],
    }
    for index, labels in enumerate(CLASSES)
]
REPEATED = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
OPTIONS = [*REPEATED, "DATALOADER.REPEAT_THRESHOLD", "0.625", "SOLVER.IMS_PER_BATCH", "2"]


def test_both_kinds_of_config_draw_the_same_images() -> None:
    cfg = load_config(FASTER_RCNN, OPTIONS)
    theirs = build_detection_stream(cfg, mapper=dict, dataset=list(RECORDS))
    ours = build_train_stream(RECORDS, mapper=dict, total_batch_size=2, repeat_threshold=0.625)
    batches = [
        list(itertools.islice(stream.batches(stream.place), 2000)) for stream in (ours, theirs)
    ]
    assert batches[0] == batches[1]
    # The factor is √(0.625 / 0.4) = 1.25 for class 1 and √(0.625 / 0.1) = 2.5 for class 2. So a
    # pass over the images has 6 + 3 × 1.25 + 2.5 = 12.25 samples.
    counts = Counter(index for batch in batches[0] for _, index in batch)
    passes = 4000 / 12.25
    for index, labels in enumerate(CLASSES):
        factor = {0: 1.0, 1: 1.25, 2: 2.5}[max(labels)]
        assert counts[index] == pytest.approx(passes * factor, rel=0.1)
    plain = build_train_stream(RECORDS, mapper=dict, total_batch_size=2)
    mixed = build_train_stream(
        RECORDS, mapper=dict, total_batch_size=2, aspect_ratio_grouping=False
    )
    assert plain._is_wide is not None
    assert mixed._is_wide is None
    drawn = itertools.islice(plain.batches(plain.place), 500)
    assert set(Counter(index for batch in drawn for _, index in batch).values()) == {100}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OPTIONS, "less than the share 0.625 of the images are repeated: bird (0.1), dog (0.4)."),
        (
            [*REPEATED, "DATALOADER.REPEAT_THRESHOLD", "0.4"],
            "less than the share 0.4 of the images are repeated: bird (0.1).",
        ),
        (REPEATED, "has no effect: no class is in less than the share"),
        (["DATALOADER.REPEAT_THRESHOLD", "0.5"], "REPEAT_THRESHOLD 0.5 has no effect: images of"),
        ([], ""),
    ],
    ids=["repeated", "at the threshold", "threshold 0", "no sampler", "plain"],
)
def test_messages_on_oversampling(
    caplog: pytest.LogCaptureFixture, options: list[str], message: str
) -> None:
    with caplog.at_level(logging.INFO, "vovnet_d2"):
        report_repeats(load_config(FASTER_RCNN, options), RECORDS, ["cat", "dog", "bird"])
    assert message in caplog.text
    assert bool(caplog.text) == bool(message)
