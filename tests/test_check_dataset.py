# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The check of one data set finds each fault and repairs it."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_dataset
import numpy as np
import pytest
from coco_tree import write_coco_tree
from dataset_faults import (
    BOX,
    FAULTS,
    HOPELESS,
    NAMES,
    SIZE,
    DataSet,
    add_supercategory,
    adding,
    file,
    names_of,
    polygon_of,
    require_trainable,
    rle_of,
    setting,
    spoil,
    without,
)
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from vovnet_d2.data import build_digits
from vovnet_d2.data.check import PROBLEMS
from vovnet_d2.data.check.masks import is_box_mask
from vovnet_d2.data.check.problems import Findings
from vovnet_d2.data.check.report import _format

pytest_plugins = ["dataset_faults", "engine_fixtures"]


def crowding(data: DataSet) -> None:
    """Add a hundred objects to the first image, which has two, and one object to the second."""
    one = data.content["annotations"][0]
    for index in range(101):
        box = [index % 50, 2 + 20 * (index // 50), 5, 5 + index % 3]
        changed = {"id": 100 + index, "bbox": box, "segmentation": polygon_of(box)}
        image_id = 1 + (index == 100)
        data.content["annotations"].append(one | changed | {"image_id": image_id})
    data.content["annotations"][-1]["segmentation"] = [[0, 42, 5, 42, 4, 49]]


def text_ids(data: DataSet) -> None:
    for image in data.content["images"]:
        image["id"] = f"0{image['id']}"
    for annotation in data.content["annotations"]:
        annotation["image_id"] = f"0{annotation['image_id']}"


def category_ids(change: Callable[[int], Any]) -> Callable[[DataSet], None]:
    def apply(data: DataSet) -> None:
        for category in data.content["categories"]:
            category["id"] = change(category["id"])
        for annotation in data.content["annotations"]:
            annotation["category_id"] = change(annotation["category_id"])

    return apply


# name: (function that changes the set, name of the note)
NOTES = {
    "category ids as text": (category_ids(lambda number: f"0{number}"), "category_ids_text"),
    "ids of 60 bits": (category_ids(lambda number: 2**60 + number), "large_id"),
    "image ids as text": (text_ids, "image_ids_text"),
    "category ids with gaps": (adding("categories", id=9, name="fox"), "category_gaps"),
    "a category without annotations": (adding("categories", id=3, name="fox"), "unused_category"),
    "an image without annotations": (
        lambda d: d.content["annotations"].__delitem__(slice(0, 2)),
        "no_annotations",
    ),
    "a crowd": (setting("annotations", "iscrowd", 1), "crowd"),
    "compressed RLE": (
        setting("annotations", "segmentation", rle_of(BOX, compressed=True)),
        "rle_masks",
    ),
    "RLE of numbers": (
        setting("annotations", "segmentation", rle_of(BOX, compressed=False)),
        "rle_masks",
    ),
    "16 bits": (
        lambda d: Image.fromarray(np.full(SIZE, 9999, dtype=np.uint16)).save(d.images / "b.png"),
        "deep_pixels",
    ),
    "a file twice": (
        lambda d: shutil.copy(d.images / "b.png", d.images / "d.png"),
        "same_content",
    ),
    "more objects than are counted": (crowding, "crowded"),
    "a tiny box": (
        lambda d: d.content["annotations"][0].update(
            bbox=[4, 6, 0.2, 20], segmentation=polygon_of([4, 6, 0.2, 20])
        ),
        "tiny_box",
    ),
}
# Problems that test_check_dataset_pairs.py tests.
BETWEEN = {"leaked_file", "near_duplicate", "all_alike", "same_name"}
BETWEEN |= {"categories_differ", "category_ids_differ"}
# Problems that test_annotation_frames.py tests.
TOGETHER = {"box_convention", "box_convention_unclear", "polygon_convention", "systematic"}
TOGETHER |= {"turn_unclear", "resized", "dark_pixels"}
ALSO = {"lost_with_image", "box_without_mask", "box_masks", "box_masks_unused", "foreign_file"}


def test_every_problem_has_a_test() -> None:
    found = set().union(*(problems for _, problems in FAULTS.values()))
    found |= {note for _, note in NOTES.values()} | ALSO | BETWEEN | TOGETHER
    assert found == set(PROBLEMS)


def test_a_good_set(data: DataSet, capsys: pytest.CaptureFixture) -> None:
    data.write()
    assert data.check() == (0, [])
    assert capsys.readouterr().out.endswith("No problems.\n")
    assert data.check("--fix", str(data.folder / "fixed.json")) == (0, [])
    assert json.loads((data.folder / "fixed.json").read_text()) == data.content


def test_images_may_be_links(data: DataSet) -> None:
    """Use links like those of DVC and git-annex, whose store keeps equal files only once."""
    shutil.copy(data.images / "b.png", data.images / "d.png")
    store = data.folder / "store"
    store.mkdir()
    for name in NAMES:
        stored = store / hashlib.sha256((data.images / name).read_bytes()).hexdigest()
        (data.images / name).rename(stored)
        (data.images / name).symlink_to(stored)
    data.write()
    fixed = data.folder / "fixed.json"
    status, findings = data.check("--fix", str(fixed))
    assert (status, names_of(findings), names_of(findings, notes=True)) == (
        *(0, set()),
        {"same_content"},
    )
    assert json.loads(fixed.read_text()) == data.content


@pytest.mark.parametrize(("note", "name"), [(v[1], k) for k, v in NOTES.items()], ids=NOTES)
def test_notes_are_no_problems(data: DataSet, note: str, name: str) -> None:
    spoil(data, NOTES[name][0])
    status, findings = data.check()
    assert names_of(findings) == set()
    assert note in names_of(findings, notes=True)
    assert status == 0


def test_objects_beyond_the_default_limit_are_counted(data: DataSet) -> None:
    spoil(data, crowding)
    _, findings = data.check()
    (finding,) = (f for f in findings if f["problem"] == "crowded")
    assert finding["count"] == 1
    assert finding["examples"] == [
        "1 image has more than 100 objects, so 2 of the 109 objects always count as missed: "
        "set TEST.DETECTIONS_PER_IMAGE 102 (a.jpg has most)"
    ]


@pytest.mark.parametrize("encoded", [False, True])
def test_masks_that_equal_their_boxes_are_reported(
    data: DataSet, encoded: bool, capsys: pytest.CaptureFixture
) -> None:
    first = data.content["annotations"][0]
    data.content["annotations"] += [
        first
        | {
            "id": 20 + i,
            "bbox": [30, 5 * i, 16, 20],
            "segmentation": polygon_of([30, 5 * i, 16, 20]),
        }
        for i in (0, 3)
    ]
    if encoded:
        for annotation in data.content["annotations"]:
            annotation["segmentation"] = rle_of(annotation["bbox"], compressed=True)
    data.write()
    status, findings = data.check()
    assert (status, names_of(findings)) == (1, {"box_masks"})
    assert capsys.readouterr().out.endswith("10 problems.\n")
    words = ["--train-json", str(data.json), "--train-images", str(data.images)]
    assert check_dataset.main(words) == 0
    # There is no finding if one mask is not a rectangle, or if there are too few masks.
    x, y, w, h = first["bbox"]
    first["segmentation"] = [[x, y, x + w, y, x + w, y + h, x + 5, y + h, x, y + 5]]
    data.write()
    assert "box_masks" not in names_of(data.check()[1])
    data.content["annotations"] = data.content["annotations"][1:]
    data.write()
    assert "box_masks" not in names_of(data.check()[1])


def test_one_problem_is_singular(data: DataSet, capsys: pytest.CaptureFixture) -> None:
    spoil(data, add_supercategory)
    data.check()
    assert capsys.readouterr().out.endswith("\n1 problem.\n")
    data.content["categories"] = data.content["categories"][1:2]
    for annotation in data.content["annotations"]:
        annotation["category_id"] = 1
    data.write()
    data.check()
    assert "\n  1 category, 4 images, 8 annotations\n" in capsys.readouterr().out


def test_at_most_five_examples_are_shown() -> None:
    findings = Findings()
    for number in range(6):
        findings.add("area", f"annotation {number}")
        shown = [line.strip() for line in _format(findings, False)[1:]]
        examples = [f"annotation {n}" for n in range(min(number + 1, 5))]
        assert shown == examples + ["..."] * (number == 5)


def test_annotations_dropped_with_their_image_are_counted(data: DataSet) -> None:
    spoil(data, file(Path.unlink))
    first = data.content["images"][0]["id"]
    expected = sum(a["image_id"] == first for a in data.content["annotations"])
    _, findings = data.check()
    counts = {f["problem"]: f["count"] for f in findings}
    assert counts["missing_file"] == 1
    assert counts["lost_with_image"] == expected > 0


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_and_fixed(data: DataSet, name: str) -> None:
    fault, problems = FAULTS[name]
    spoil(data, fault)
    fixed = data.folder / "fixed.json"
    if name in HOPELESS:
        status, findings = data.check()
        arguments = ["--train-json", data.json, "--train-images", data.images, "--fix", fixed]
        with pytest.raises(SystemExit, match="2"):
            check_dataset.main(list(map(str, arguments)))
        assert not fixed.exists()
    else:
        status, findings = data.check("--fix", str(fixed))
    assert names_of(findings) == problems
    assert status == 1
    if name not in HOPELESS:
        data.json = fixed
        status, findings = data.check()
        assert (status, names_of(findings)) == (0, set())
        require_trainable(data)


NO_MASKS = {"[[]]": [[]], "[]": [], "null": None, "two points": [[1, 2, 3, 4]], "text": "x"}


@pytest.mark.parametrize("all_of_them", [False, True])
@pytest.mark.parametrize("mask", NO_MASKS)
def test_boxes_need_no_masks(data: DataSet, mask: str, all_of_them: bool) -> None:
    """Keep objects without masks, unless the check is for a network that learns masks."""
    for annotation in data.content["annotations"][: None if all_of_them else 3]:
        annotation["segmentation"] = NO_MASKS[mask]
    data.write()
    fixed = data.folder / "fixed.json"
    words = ["--train-json", data.json, "--train-images", data.images, "--fix", fixed]
    assert check_dataset.main(list(map(str, words))) == (mask in ("two points", "text"))
    kept = json.loads(fixed.read_text())["annotations"]
    assert [a["bbox"] for a in kept] == [a["bbox"] for a in data.content["annotations"]]
    if not all_of_them:
        fixed.unlink()
        assert data.check("--fix", str(fixed))[0] == 1
        assert len(json.loads(fixed.read_text())["annotations"]) == 5


def test_a_missing_area_is_that_of_the_mask_or_the_box(data: DataSet) -> None:
    fixed = data.folder / "fixed.json"
    spoil(data, without("annotations", "area"))
    data.content["annotations"][0]["segmentation"] = [[4, 6, 20, 6, 20, 26]]  # half of the box
    data.write()
    data.check("--fix", str(fixed))
    truth = COCO(str(fixed))
    assert truth.anns[1]["area"] == truth.annToMask(truth.anns[1]).sum() < 200
    for annotation in data.content["annotations"]:
        del annotation["segmentation"]
    data.write()
    fixed.unlink()
    files = ["--train-json", str(data.json), "--train-images", str(data.images)]
    assert check_dataset.main([*files, "--fix", str(fixed)]) == 1
    assert COCO(str(fixed)).anns[1]["area"] == BOX[2] * BOX[3]


def test_a_network_of_masks_needs_masks(data: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    """Check a set without any mask for a network of boxes, and for a network of masks."""
    for annotation in data.content["annotations"]:
        annotation["segmentation"] = [[]]
    data.write()
    files = ["--train-json", str(data.json), "--train-images", str(data.images)]
    assert check_dataset.main(files) == 0
    assert check_dataset.main([*files, "--masks"]) == 1
    assert f"{len(data.content['annotations'])}  annotations without a mask" in (
        capsys.readouterr().out
    )


def test_polygons_of_points_are_made_flat(data: DataSet, tmp_path: Path) -> None:
    plain = copy.deepcopy(data.content["annotations"])
    for index, annotation in enumerate(data.content["annotations"]):
        (numbers,) = annotation["segmentation"]
        points = [list(point) for point in zip(numbers[::2], numbers[1::2], strict=True)]
        annotation["segmentation"] = [points] if index % 2 else points
    data.write()
    status, findings = data.check("--fix", str(tmp_path / "fixed.json"))
    assert (status, {finding["problem"] for finding in findings}) == (1, {"flat_polygon"})
    assert json.loads((tmp_path / "fixed.json").read_text())["annotations"] == plain


# Real sets and the command line


def test_the_size_that_a_training_resizes_to_is_given(
    data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.write()
    check, sizes = check_dataset.check_data_sets, []

    def note(sources: Any, *, resize: tuple[int, int], masks: bool) -> Any:
        sizes.append(resize)
        return check(sources, resize=resize, masks=masks)

    monkeypatch.setattr(check_dataset, "check_data_sets", note)
    data.check()
    data.check("--min-size", "640", "--max-size", "1024")
    assert sizes == [(800, 1333), (640, 1024)]


def test_the_digits_are_clean_by_name(tmp_path: Path, catalogs: None, monkeypatch, capsys) -> None:
    build_digits(tmp_path, num_train=2, num_val=2, image_size=128)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    # Use a small version of the digits, which takes less time to build.
    monkeypatch.setattr("vovnet_d2.data.digits.build_digits", lambda root: root)
    assert check_dataset.main(["digits_train", "digits_val"]) == 0
    assert "2 images" in capsys.readouterr().out


def test_the_miniature_coco_is_clean(tmp_path: Path, capsys) -> None:
    root = write_coco_tree(tmp_path) / "coco"
    files = ["--train-json", root / "annotations" / "instances_train2017.json"]
    files += ["--train-images", root / "train2017"]
    assert check_dataset.main(list(map(str, files))) == 0
    assert "crowds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to check"),
        (["digits_trian"], "'digits_trian' is not registered. Close to it: 'digits_train"),
        (["voc_2007_val"], "Data set voc_2007_val: There is no list of images "),
        (["--train-json", "{json}"], "go together"),
        (["--train-json", "x.json", "--train-images", "."], "There is no annotation file"),
        (["--train-json", "{json}s", "--train-images", "."], ".jsons. Close to it: '"),
        (["--train-json", "{json}", "--train-images", "{images}s"], "s. Close to it: '"),
        (["--train-json", "{json}", "--train-images", "nowhere"], "There is no folder of images"),
        (
            ["--train-json", "{json}", "--train-images", "{images}", "--fix", "a", "b"],
            "a file for each data set: 1",
        ),
        (
            ["--train-json", "{json}", "--train-images", "{images}", "--fix", "{json}"],
            "exists already",
        ),
        (
            ["--train-json", "{json}", "--train-images", "{images}", "--fix", "no/where"],
            "no folder no",
        ),
        (
            ["--train-json", "{json}", "--train-images", "{images}", "--json", "no/where"],
            "no folder no",
        ),
    ],
)
def test_mistakes(
    data: DataSet, words: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*args: object) -> None:
        pytest.fail("images are read before the arguments are checked")

    monkeypatch.setattr("vovnet_d2.data.check.records.inspect_files", look)
    data.write()
    before = data.json.read_bytes()
    words = [word.format(json=data.json, images=data.images) for word in words]
    with pytest.raises(SystemExit, match="2"):
        check_dataset.main(words)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert data.json.read_bytes() == before


def test_file_names_cannot_write_to_the_terminal(data: DataSet, capsys) -> None:
    spoil(data, setting("images", "file_name", "\x1b[2J\nNo problems."))
    data.check()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\nNo problems.") == 0


@pytest.mark.parametrize("filled", [True, False])
def test_masks_of_rectangles_are_recognised(filled: bool) -> None:
    """Check RLE and polygons of a rectangle and of a triangle that is half of the rectangle."""
    corners = [[10, 5], [22, 5], [22, 15], *([[10, 15]] if filled else [])]
    polygons = [[float(number) for corner in corners for number in corner]]
    (encoded,) = mask_util.frPyObjects(polygons, 100, 120)
    for mask in (polygons, encoded | {"counts": encoded["counts"].decode()}):
        assert is_box_mask(mask, [10, 5, 12, 10]) == filled
