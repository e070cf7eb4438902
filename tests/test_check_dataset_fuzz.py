# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The corrected copy of a randomly damaged data set has no problems, and Detectron2 reads it."""

import contextlib
import copy
import io
from typing import Any

import check_dataset
import pytest
from dataset_faults import NAMES, SIZE, DataSet, make_content, names_of, require_trainable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 100),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-5, 99), st.floats(), st.text(max_size=2)), max_size=9),
    st.lists(st.lists(st.floats(-99, 99), max_size=9), max_size=3),
    st.fixed_dictionaries(
        {}, optional={"size": st.just(list(SIZE)), "counts": st.text("0123PQRop", max_size=6)}
    ),
    st.sampled_from([*NAMES, "../a", *map(str, range(5))]),
)
PLACES = [
    *[("categories", key) for key in ("id", "name", "keypoints")],
    *[("images", key) for key in ("id", "file_name", "height", "width")],
    *[("annotations", key) for key in ("id", "image_id", "category_id", "bbox", "area")],
    *[("annotations", key) for key in ("iscrowd", "segmentation", "keypoints", "ignore")],
]
CHANGES = st.lists(
    st.tuples(st.sampled_from(PLACES), st.integers(0, 7), VALUES), min_size=1, max_size=8
)


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return DataSet(tmp_path_factory.mktemp("fuzz") / "data")


def change_and_fix(data: DataSet, changes: list) -> None:
    data.json = data.folder / "a.json"
    data.content = copy.deepcopy(make_content())
    for (section, key), index, value in changes:
        records = data.content[section]
        records[index % len(records)][key] = value
    data.write()
    fixed = data.folder / "fixed.json"
    fixed.unlink(missing_ok=True)
    file, images = str(data.json), str(data.images)
    words = ["--train-json", file, "--train-images", images, "--masks", "--fix", str(fixed)]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            status = check_dataset.main(words)
        except SystemExit as ended:  # nothing is left to train on
            status = ended.code
        assert status in (0, 1) or (status, fixed.exists()) == (2, False)
        if fixed.exists():
            data.json = fixed
            status, findings = data.check()
            assert (status, names_of(findings)) == (0, set())
            require_trainable(data)


FUZZ: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@settings(max_examples=25, **FUZZ)
@given(changes=CHANGES)
def test_corrected_copies_are_clean(canvas: DataSet, changes: list) -> None:
    change_and_fix(canvas, changes)


@pytest.mark.slow
@settings(max_examples=300, **FUZZ)
@given(changes=CHANGES)
def test_many_corrected_copies_are_clean(canvas: DataSet, changes: list) -> None:
    change_and_fix(canvas, changes)
