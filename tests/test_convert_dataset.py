# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of ``tools/convert_dataset.py``: the formats, and the split."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import convert_dataset
import numpy as np
import pytest
from PIL import Image
from test_formats import objects, voc, voc_object, write

from vovnet_d2.data.check.files import inspect_files
from vovnet_d2.data.formats import read_annotations
from vovnet_d2.data.formats.split import _deal_out, find_groups, split_content


def convert(*words: Any) -> int:
    try:
        convert_dataset.main(list(map(str, words)))
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 40 images of noise in the layout of VOC. The last 8 repeat the first 8.

    All images have a dog, a quarter of them a cat, and four of them a bird.
    """
    root = tmp_path_factory.mktemp("voc")
    (root / "JPEGImages").mkdir()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (12, 16, 3), dtype=np.uint8) for _ in range(32)]
    for index, pixels in enumerate([*pictures, *pictures[:8]]):
        name = f"{index:02}"
        big = Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)
        big.save(root / "JPEGImages" / f"{name}.jpg", quality=90 if index < 32 else 60)
        kinds = ["dog", *["cat"] * (index % 4 == 1), *["bird"] * (index in (3, 12, 21, 30))]
        found = voc(*(voc_object(kind, 1, 1, 20, 30) for kind in kinds), size=(64, 48))
        write(root / "Annotations" / f"{name}.xml", found)
    return root


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def names_of(content: dict[str, Any]) -> set[str]:
    return {image["file_name"] for image in content["images"]}


def test_voc_is_written_as_coco(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert convert(folder, out) == 0
    told = capsys.readouterr()
    assert (
        "PASCAL VOC XML, 40 images, 54 objects; the categories in their order are 1 bi" in told.out
    )
    assert f"Wrote COCO JSON to {out}: all with 40 images." in told.out
    assert told.err == ""
    again = read_annotations(out / "all.json", folder / "JPEGImages")
    assert objects(again) == objects(read_annotations(folder, None))
    assert convert(folder, out) == 2
    assert f"error: {out} exists and is not empty" in capsys.readouterr().err


def test_changes_and_losses_are_warnings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (80, 50)).save(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", voc(voc_object("dog", 9, 1, 3, 5, more="<difficult>1</difficult>")))
    assert convert(tmp_path, tmp_path / "out", "--images", tmp_path) == 0
    told = capsys.readouterr().err
    assert "warning: 1 boxes have their corners swapped" in told


def test_split(folder: Path, tmp_path: Path) -> None:
    """Check the shares of images and classes in each part of a split.

    Repeated images are in the same part. The same seed gives the same split.
    """
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (3, 3, 4), strict=True):
        assert convert(folder, out, "--split", 0.5, 0.25, 0.25, "--seed", seed) == 0
    parts = {name: load(outs[0] / f"{name}.json") for name in ("train", "val", "test")}
    counts = {name: len(names_of(part)) for name, part in parts.items()}
    assert sum(counts.values()) == 40
    assert set.union(*map(names_of, parts.values())) == {f"{i:02}.jpg" for i in range(40)}
    for name, share in (("train", 0.5), ("val", 0.25), ("test", 0.25)):
        part = parts[name]
        assert abs(counts[name] - 40 * share) <= 2
        found = Counter(annotation["category_id"] for annotation in part["annotations"])
        assert abs(found[2] - 10 * share) <= 1  # cats, with two pairs of repeated images
        assert found[1] == 4 * share
        assert found[3] == counts[name]
        assert [c["name"] for c in part["categories"]] == ["bird", "cat", "dog"]
        listed = {image["id"] for image in part["images"]}
        assert {annotation["image_id"] for annotation in part["annotations"]} == listed
        for index in range(8):
            pair = {f"{index:02}.jpg", f"{index + 32}.jpg"}
            assert len(pair & names_of(part)) in (0, 2)
    assert load(outs[1] / "train.json") == parts["train"]
    assert load(outs[2] / "train.json") != parts["train"]


def test_a_split_does_not_depend_on_the_order_of_the_images(folder: Path) -> None:
    content = read_annotations(folder, None).content
    shares = {"train": 0.5, "val": 0.5}
    parts = split_content(content, folder / "JPEGImages", shares, seed=1)
    turned = content | {"images": content["images"][::-1]}
    again = split_content(turned, folder / "JPEGImages", shares, seed=1)
    assert names_of(again["train"]) == names_of(parts["train"])


@pytest.mark.parametrize("seed", range(4))
def test_a_large_group_is_assigned_before_single_images(seed: int) -> None:
    groups = [*([f"single {i}"] for i in range(6)), [f"alike {i}" for i in range(6)]]
    labels = {name: {"cat"} for group in groups for name in group}
    parts = _deal_out(groups, labels, {"train": 0.5, "val": 0.5}, random.Random(seed))
    assert Counter(parts.values()) == {"train": 6, "val": 6}


def test_pictures_that_look_alike_are_one_group(folder: Path) -> None:
    files = inspect_files(map(str, sorted((folder / "JPEGImages").iterdir())), "")
    groups = find_groups({Path(path).stem: file for path, file in files.items()})
    pairs = {tuple(sorted(group)) for group in groups if len(group) > 1}
    assert pairs == {(f"{i:02}", f"{i + 32}") for i in range(8)}
    assert len(groups) == 32


def test_a_set_of_one_scene_is_not_split(folder: Path, tmp_path: Path) -> None:
    content = read_annotations(folder, None).content
    picture = (folder / "JPEGImages" / "00.jpg").read_bytes()
    for image in content["images"]:
        (tmp_path / image["file_name"]).write_bytes(picture)
    with pytest.raises(
        ValueError, match=r"The 40 images make 1 groups .* left for 'val': split by"
    ):
        split_content(content, tmp_path, {"train": 0.5, "val": 0.5}, seed=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "0.8"], "--split is 0.8: give two or three shares"),
        (["--split", "0.8", "0.3"], "shares above 0 that add up to 1"),
        (["--split", "1.5", "-0.5"], "shares above 0"),
        (["--part", "dev"], "has no annotations of"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "empty", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_coco_with_a_byte_order_mark_is_converted(folder: Path, tmp_path: Path) -> None:
    assert convert(folder, tmp_path / "plain") == 0
    content = load(tmp_path / "plain" / "all.json")
    marked = tmp_path / "marked.json"
    marked.write_text(json.dumps(content), encoding="utf-8-sig")
    assert convert(marked, tmp_path / "out", "--images", folder / "JPEGImages") == 0
    assert load(tmp_path / "out" / "all.json") == content
