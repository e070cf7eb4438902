# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The check of two data sets compares the sets for training and validation."""

import json
import shutil
from pathlib import Path

import check_dataset
import numpy as np
import pytest
from dataset_faults import NAMES, SIZE, DataSet
from PIL import Image

from vovnet_d2.data.check.leakage import _ones

pytest_plugins = ["dataset_faults"]


def check_two(one: DataSet, other: DataSet, *words: str) -> tuple[int, set[str], dict]:
    report = one.folder / "report.json"
    arguments = ["--train-json", one.json, "--train-images", one.images]
    arguments += ["--val-json", other.json, "--val-images", other.images, "--json", report]
    status = check_dataset.main([*map(str, arguments), *words])
    (between,) = json.loads(report.read_text())["between"]
    return status, {f["problem"] for f in between["findings"]}, between


@pytest.fixture
def other(tmp_path: Path) -> DataSet:
    """A data set with other images under other names."""
    other = DataSet(tmp_path / "other")
    rng = np.random.default_rng(1)
    for image in other.content["images"]:
        (other.images / image["file_name"]).unlink()
        image["file_name"] = f"other_{image['file_name']}"
        small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        small.resize(SIZE[::-1]).save(other.images / image["file_name"])
    return other


def test_sets_without_anything_in_common(data: DataSet, other: DataSet) -> None:
    data.write()
    other.write()
    assert check_two(data, other)[:2] == (0, set())


def test_a_leak_is_found_and_dropped_from_training(data: DataSet, other: DataSet) -> None:
    shutil.copy(data.images / "a.jpg", other.images / "other_b.png")
    data.write()
    other.write()
    fixed = [str(d.folder / "fixed.json") for d in (data, other)]
    status, problems, _ = check_two(data, other, "--fix", *fixed)
    assert (status, problems) == (1, {"leaked_file"})
    data.json, other.json = map(Path, fixed)
    assert check_two(data, other)[:2] == (0, set())
    assert [i["file_name"] for i in json.loads(data.json.read_text())["images"]] == NAMES[1:]
    assert len(json.loads(other.json.read_text())["images"]) == 4


def test_bits_are_counted_with_numpy_1_and_2(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).integers(0, 2**63, (3, 5, 4), dtype=np.uint64)
    expected = [[sum(int(word).bit_count() for word in row) for row in rows] for rows in words]
    for _ in range(2):
        assert _ones(words).sum(axis=-1).tolist() == expected
        monkeypatch.delattr(np, "bitwise_count", raising=False)


@pytest.mark.parametrize("change", [{"quality": 30}, {"scale": 2}])
def test_a_copy_that_was_saved_again_is_noted(data: DataSet, other: DataSet, change: dict) -> None:
    picture = Image.open(data.images / "b.png")
    scale = change.pop("scale", 1)
    size = (scale * SIZE[1], scale * SIZE[0])
    picture.resize(size).save(other.images / "again.jpg", **change)
    other.content["images"][0] |= {"file_name": "again.jpg", "width": size[0], "height": size[1]}
    data.write()
    other.write()
    status, problems, between = check_two(data, other)
    assert (status, problems) == (0, {"near_duplicate"})
    assert between["findings"][0]["examples"] == ["again.jpg and b.png"]


def test_similar_images_are_counted_instead_of_their_pairs(data: DataSet, other: DataSet) -> None:
    picture = Image.open(data.images / "b.png")
    for name in ("a.jpg", "c.jpg"):  # with b.png, three images look like one of the other set
        picture.save(data.images / name, quality=40 if name == "a.jpg" else 50)
    picture.save(other.images / "other_b.png", compress_level=1)
    data.write()
    other.write()
    status, problems, between = check_two(data, other)
    assert (status, problems) == (0, {"near_duplicate"})
    (finding,) = between["findings"]
    assert (finding["count"], finding["examples"]) == (1, ["other_b.png and a.jpg and 2 more"])


def test_images_of_a_fixed_camera_are_no_copies(data: DataSet, other: DataSet) -> None:
    """Use images of the same scene, each with a small object at another position."""
    place = np.asarray(Image.open(data.images / "b.png").convert("RGB"))
    for data_set, start in ((data, 0), (other, 4)):
        for index, image in enumerate(data_set.content["images"]):
            pixels = place.copy()
            pixels[20:23, 5 * (start + index) : 5 * (start + index) + 3] = 255
            Image.fromarray(pixels).save(data_set.images / image["file_name"])
    data.write()
    other.write()
    status, problems, between = check_two(data, other)
    assert (status, problems) == (0, {"all_alike"})
    (finding,) = between["findings"]
    assert finding["count"] == 4
    assert "fixed camera" in finding["title"]


def test_different_images_of_the_same_name_are_noted(data: DataSet, other: DataSet) -> None:
    (other.images / "other_a.jpg").rename(other.images / "a.jpg")
    other.content["images"][0]["file_name"] = "a.jpg"
    data.write()
    other.write()
    assert check_two(data, other)[:2] == (0, {"same_name"})


def test_other_categories(data: DataSet, other: DataSet) -> None:
    other.content["categories"][0]["name"] = "fox"
    data.write()
    other.write()
    assert check_two(data, other)[:2] == (1, {"categories_differ"})


def test_corrected_copies_have_the_category_ids_of_the_first_set(
    data: DataSet, other: DataSet
) -> None:
    """Fix two sets with different category ids. The corrected copies share the ids of the first."""
    ids = {1: 2, 2: 1}
    for category in other.content["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in other.content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    data.content["categories"].append({"id": 7, "name": "fox"})
    data.write()
    other.write()
    fixed = [str(d.folder / "fixed.json") for d in (data, other)]
    assert check_two(data, other, "--fix", *fixed)[:2] == (1, {"category_ids_differ"})
    contents = [json.loads(Path(path).read_text()) for path in fixed]
    assert contents[0]["categories"] == contents[1]["categories"]
    before, after = (
        [{c["id"]: c["name"] for c in content["categories"]}[a["category_id"]]
         for a in content["annotations"]]
        for content in (other.content, contents[1])
    )  # fmt: skip
    assert before == after
    data.json, other.json = map(Path, fixed)
    assert check_two(data, other)[:2] == (0, set())
