# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The claims of the check about Detectron2 and pycocotools are true for both libraries."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from dataset_faults import FAULTS, DataSet, evaluate_the_truth, spoil
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from hypothesis import given, settings
from hypothesis import strategies as st

from vovnet_d2.data.check import PROBLEMS, Severity
from vovnet_d2.data.check.masks import decode_counts

pytest_plugins = ["dataset_faults"]

STOPS_LOADING = {
    *["byte order mark", "UTF-16", "no categories", "a number for an image"],
    *["null for an annotation", "category without name", "no file name", "no size"],
    *["annotation without id", "annotation id twice", "no image", "unknown category"],
    *["no category", "category as a list", "ignore", "empty box", "image without id"],
    *["mask of a number", "flat polygon", "RLE without size"],
    *["RLE without counts", "truncated", "empty file", "a list", "HTML", "latin-1", "binary"],
    *["deep", "huge number", "category id as text", "image id as text", "image id as a name"],
    *["category without id"],
}


@pytest.mark.parametrize("name", sorted(STOPS_LOADING))
def test_detectron2_stops_at_these(data: DataSet, name: str) -> None:
    spoil(data, FAULTS[name][0])
    register_coco_instances("spoilt", {}, str(data.json), str(data.images))
    try:
        with pytest.raises(Exception):  # noqa: B017, PT011
            DatasetCatalog.get("spoilt")
    finally:
        DatasetCatalog.remove("spoilt")
        MetadataCatalog.remove("spoilt")
    severities = {PROBLEMS[problem].severity for problem in FAULTS[name][1]}
    # The tools of this package read other encodings, so the check only warns of them.
    least = Severity.WARNING if FAULTS[name][1] == {"encoding"} else Severity.ERROR
    assert least in severities


@pytest.mark.parametrize("name", ["no area", "no iscrowd"])
def test_evaluation_stops_at_these(data: DataSet, name: str) -> None:
    spoil(data, FAULTS[name][0])
    with pytest.raises(KeyError):
        evaluate_the_truth(data.json)


def test_pycocotools_takes_annotation_0_for_no_match(data: DataSet) -> None:
    data.write()
    assert evaluate_the_truth(data.json) == pytest.approx(1)
    spoil(data, FAULTS["annotation id 0"][0])
    assert evaluate_the_truth(data.json) < 0.99


@pytest.mark.parametrize("name", ["polygon of two points", "polygon of odd count"])
def test_detectron2_drops_these_without_an_error(data: DataSet, name: str) -> None:
    spoil(data, FAULTS[name][0])
    records = load_coco_json(str(data.json), str(data.images))
    assert sum(len(r["annotations"]) for r in records) == len(data.content["annotations"]) - 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(1, 20))
def test_compressed_rle_is_decoded_as_pycocotools_encodes(bits: list[bool], stretch: int) -> None:
    mask = np.repeat(np.array(bits, dtype=np.uint8), stretch)[:, None]
    text = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    counts = decode_counts(text)
    values = np.repeat(np.arange(len(counts)) % 2, counts)
    assert np.array_equal(values, mask[:, 0])
