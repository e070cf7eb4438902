# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversions from COCO and back keep all information that the other format can hold."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
import pytest
from format_writers import WRITERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vovnet_d2.data.formats import FORMATS, Notes, read_annotations
from vovnet_d2.errors import UserError

FILES = {
    "a.png": (31, 47),
    "b c.jpg": (60, 40),
    "sub/ä, x.png": (7, 9),
    "img.v2.jpeg": (640, 480),
}
# The path that is given to the reader of each format.
PATHS = {"coco": "all.json", "voc": "", "labelme": "", "csv": "all.csv", "yolo": "data.yaml"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name, size in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("L", size).save(root / name)
    return root


# Data sets

characters = st.characters(categories=["L", "N", "P", "S"]) | st.just(" ")
class_names = st.lists(
    st.text(characters, min_size=1).map(str.strip).filter(bool), min_size=1, max_size=4, unique=True
)
thousandths = st.integers(0, 1000).map(lambda n: n / 1000)
precise = st.floats(0, 1, allow_subnormal=False)


@st.composite
def data_sets(draw: Any, fractions: Any, scale: int) -> dict[str, Any]:
    """Draw data sets of boxes and polygons."""
    names = draw(class_names)
    content: dict[str, Any] = {
        "categories": [{"id": 3 * n + 5, "name": name} for n, name in enumerate(names)],
        "images": [
            {"id": n, "file_name": name, "width": size[0], "height": size[1]}
            for n, (name, size) in enumerate(FILES.items(), 7)
        ],
        "annotations": [],
    }
    for image in content["images"]:
        for _ in range(draw(st.integers(0, 3))):
            across, down = (scale * image[side] for side in ("width", "height"))
            if draw(st.booleans()):
                # Compute with whole thousandths, as for polygons, because 0.1 + 0.2 is not exact.
                x, y, width, height = (
                    round(draw(fractions) * side) / scale if scale > 1 else draw(fractions) * side
                    for side in (across, down, across, down)
                )
                annotation = {"bbox": [x, y, width, height]}
            else:
                count = draw(st.integers(1, 2))
                polygons = [
                    [
                        round(draw(fractions) * side) / scale
                        if scale > 1
                        else draw(fractions) * side
                        for _ in range(draw(st.integers(3, 4)))
                        for side in (across, down)
                    ]
                    for _ in range(count)
                ]
                xs, ys = ([v for p in polygons for v in p[i::2]] for i in (0, 1))
                sides = max(xs) - min(xs), max(ys) - min(ys)
                if scale > 1:
                    sides = tuple(round(side, 3) for side in sides)
                annotation = {"bbox": [min(xs), min(ys), *sides], "segmentation": polygons}
            annotation |= {
                "id": len(content["annotations"]) + 1,
                "image_id": image["id"],
                "category_id": draw(st.sampled_from(content["categories"]))["id"],
                "iscrowd": int(draw(st.booleans())),
                "area": 1.0,
            }
            content["annotations"].append(annotation)
    return content


def there_and_back(
    key: str, content: dict[str, Any], images: Path
) -> tuple[dict[str, Any], list[str]]:
    notes = Notes()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        WRITERS[key](out, {"all": content}, notes)
        found = read_annotations(out / PATHS[key], images)
    assert found.notes == []
    return found.content, notes.lines()


Row = tuple[str, str, list[float], list[list[float]], int]


def rows(content: dict[str, Any]) -> list[Row]:
    names = {c["id"]: c["name"] for c in content["categories"]}
    files = {i["id"]: i["file_name"] for i in content["images"]}
    return sorted(
        (
            files[a["image_id"]],
            names[a["category_id"]],
            [float(n) for n in a["bbox"]],
            a.get("segmentation", []),
            a["iscrowd"],
        )
        for a in content["annotations"]
    )


def held(key: str, row: Row) -> Iterator[Row]:
    """Yield the part of an object that a format can hold."""
    file, name, box, polygons, crowd = row
    if key == "coco" or key == "labelme":
        yield row
    elif key in ("voc", "csv"):
        yield file, name, box, [], crowd
    elif not crowd and len(polygons) < 2:  # YOLO joins several polygons into one
        yield row


def lost(key: str, content: dict[str, Any]) -> set[str]:
    """Return the beginnings of the notes that a conversion must give."""
    found = rows(content)
    masks, crowds = any(polygons for *_, polygons, _ in found), any(crowd for *_, crowd in found)
    several = any(len(polygons) > 1 for *_, polygons, crowd in found if not crowd)
    used = {name for _, name, *_ in found}
    unused = {c["name"] for c in content["categories"]} - used
    empty = set(FILES) - {file for file, *_ in found}
    due = {
        "coco": {},
        "labelme": {},
        "voc": {"masks are lost": masks},
        "csv": {
            "masks are lost": masks,
            "images without objects are lost": empty,
            "classes without objects in all are lost": unused,
        },
        "yolo": {"crowds are left out": crowds, "objects of several polygons": several},
    }
    return {text for text, is_due in due[key].items() if is_due}


fast = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("key", list(FORMATS))
def test_numbers_of_three_decimals_do_not_change(key: str, images: Path) -> None:
    @fast
    @given(data_sets(thousandths, 1000))
    def check(content: dict[str, Any]) -> None:
        if key in ("coco", "csv") and not content["annotations"]:  # an empty data set is refused
            return
        before = json.dumps(content)
        found, notes = there_and_back(key, content, images)
        assert json.dumps(content) == before
        expected = [row for old in rows(content) for row in held(key, old)]
        kept = [row for row in rows(found) if row in expected]
        assert kept == expected
        if not any("several polygons" in note for note in notes):
            assert rows(found) == expected
        due = lost(key, content)
        assert len(notes) == len(due)
        for text in due:
            assert any(note.split(" ", 1)[1].startswith(text) for note in notes), (text, notes)
        sizes = {i["file_name"]: (i["width"], i["height"]) for i in found["images"]}
        with_objects = {file for file, *_ in expected} if key == "csv" else set(FILES)
        assert sizes == {name: size for name, size in FILES.items() if name in with_objects}
        names = [c["name"] for c in found["categories"]]
        if key in ("coco", "yolo"):
            assert names == [c["name"] for c in content["categories"]]
        else:
            assert names == sorted({name for _, name, *_ in rows(content)})

    check()


@pytest.mark.parametrize("key", list(FORMATS))
def test_numbers_of_many_digits_change_little(key: str, images: Path) -> None:
    @fast
    @given(data_sets(precise, 1))
    def check(content: dict[str, Any]) -> None:
        content["annotations"] = [
            a | {"iscrowd": 0}
            for a in content["annotations"]
            if len(a.get("segmentation", [])) < 2
        ]  # fmt: skip
        if not content["annotations"]:
            return
        found, _ = there_and_back(key, content, images)
        old = content["annotations"]
        if key in ("voc", "csv", "labelme", "yolo"):  # sorted by file name
            files = {i["id"]: i["file_name"] for i in content["images"]}
            old = sorted(old, key=lambda a: files[a["image_id"]])
        for mine, theirs in zip(found["annotations"], old, strict=True):
            assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=1e-9)
            for one, other in zip(
                mine.get("segmentation", []), theirs.get("segmentation", []), strict=False
            ):
                assert one == pytest.approx(other, abs=1e-9)

    check()


def test_polygons_that_yolo_joins_cover_the_same_pixels(images: Path) -> None:
    squares = [[x, y, x + 30, y, x + 30, y + 40, x, y + 40] for x, y in ((5, 5), (90, 20), (9, 99))]
    content = {
        "categories": [{"id": 1, "name": "dog"}],
        "images": [{"id": 1, "file_name": "img.v2.jpeg", "width": 640, "height": 480}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 3600.0}
            | {"bbox": [5, 5, 115, 134], "segmentation": squares}
        ],
    }
    found, notes = there_and_back("yolo", content, images)
    assert "1 objects of several polygons become one polygon, joined by lines" in notes[0]
    (annotation,) = found["annotations"]
    assert annotation["bbox"] == [5, 5, 115, 134]
    assert annotation["area"] == pytest.approx(3600)

    def pixels(polygons: list[list[float]]) -> Any:
        return mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, 480, 640)))

    (joined,) = annotation["segmentation"]
    different = pixels([joined]) != pixels(squares)
    assert different.sum() <= 200  # pycocotools draws the line of no width
    assert pixels(squares).sum() > 3000


def test_information_that_no_other_format_holds_is_noted(images: Path) -> None:
    mask = mask_util.encode(mask_util.decode(mask_util.frPyObjects([[1, 1, 9, 1, 9, 9]], 47, 31)))
    rle = {"size": [47, 31], "counts": mask[0]["counts"].decode()}
    annotation = {"id": 4, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 9.0}
    content = {
        "categories": [{"id": 1, "name": "dog", "supercategory": "animal"}],
        "images": [
            {"id": 1, "file_name": "a.png", "width": 31, "height": 47, "license": 3, "url": ""}
        ],
        "annotations": [
            annotation | {"bbox": [1, 1, 8, 8], "segmentation": rle, "keypoints": [1, 2, 2]},
            annotation | {"id": 5, "bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 9]]},
            annotation | {"id": 6, "image_id": 2, "bbox": [1, 1, 8, 8]},
        ],
    }
    for key in ("voc", "labelme", "csv", "yolo"):
        found, notes = there_and_back(key, content, images)
        assert [a["bbox"] for a in found["annotations"]] == [[1, 1, 8, 8]] * 2
        assert notes == [
            '1 annotations whose "keypoints" is lost; first: annotations id 4.',
            '1 images whose "license" is lost; first: images id 1.',
            '1 categories whose "supercategory" is lost; first: categories id 1.',
            "1 RLE masks are lost, and their boxes kept (no such format has RLE); first: "
            "annotation 4.",
            "1 objects lose polygons of fewer than three points; first: annotation 5.",
            "1 images are not listed, and their objects are lost; first: image id 2.",
        ]
    back, notes = there_and_back("coco", content, images)
    assert back == content
    assert notes == []


@pytest.mark.parametrize("name", ["../a.png", "/a.png", ".", "C:\\a.png", "sub\\..\\..\\a.png"])
def test_names_that_lead_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    """Refuse such file names, because the names of written files are derived from them."""
    content = {
        "categories": [{"id": 1, "name": "dog"}],
        "images": [{"id": 1, "file_name": name, "width": 31, "height": 47}],
        "annotations": [],
    }
    for key in ("voc", "labelme", "yolo"):
        with pytest.raises(ValueError, match="leads to no file in the folder of images"):
            WRITERS[key](tmp_path / "out" / "deep", {"all": content}, Notes())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_images_of_one_stem(tmp_path: Path) -> None:
    sizes = {"width": 31, "height": 47}
    content = {
        "categories": [{"id": 1, "name": "dog"}],
        "images": [{"id": n, "file_name": f"a.{n}g"} | sizes for n in ("jp", "pn")],
        "annotations": [],
    }
    for key in ("voc", "labelme", "yolo", "csv"):
        with pytest.raises(ValueError, match="Two images are called 'a' but for their suffixes"):
            WRITERS[key](tmp_path, {"all": content}, Notes())


# Damaged files

TEXTS = {
    "a.xml": "<annotation><size><width>31</width><height>47</height></size><object><name>dog</name>"
    "<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax>"
    "</bndbox></object></annotation>",
    "a.txt": "0 0.5 0.5 0.25 0.2\n1 0.1 0.1 0.2 0.1 0.2 0.3\n",
    "data.yaml": "train: .\nnc: 2\nkpt_shape: [2, 3]\nnames:\n  0: dog\n  1: 'cat, big'\n",
    "a.json": '{"shapes": [{"label": "dog", "points": [[1, 2.5], [3, 4], [5, 9]], "group_id": 1,'
    ' "shape_type": "polygon", "flags": {}}], "imagePath": "a.png", "imageWidth": 31, "imageHeight"'
    ": 47}",
    "boxes.csv": "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\na,dog,0.1,0.2,0.3,0.4,0\n",
}
PIECES = ["", "-", "null", "[]", "{}", "nan", "1e999", "\n", '"', "<", "\0", "ä", "a.png", "../x"]


@pytest.mark.parametrize("file", list(TEXTS))
def test_the_message_of_a_damaged_file_is_one_sentence(file: str, images: Path) -> None:
    @settings(fast, max_examples=80)
    @given(
        st.lists(
            st.tuples(st.integers(0, 400), st.integers(0, 40), st.sampled_from(PIECES)),
            min_size=1,
            max_size=3,
        )
    )
    def check(edits: list[tuple[int, int, str]]) -> None:
        text = TEXTS[file]
        for start, length, piece in edits:
            place = start % (len(text) + 1)
            text = text[:place] + piece + text[place + length :]
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(images / "a.png", folder)
            for name in ("a.txt", "data.yaml") if file in ("a.txt", "data.yaml") else (file,):
                Path(folder, name).write_text(TEXTS[name], encoding="utf-8")
            path = Path(folder, file)
            path.write_text(text, encoding="utf-8")
            given = path if file in ("data.yaml", "boxes.csv") else Path(folder)
            try:
                found = read_annotations(given, Path(folder))
            except (FileNotFoundError, ValueError) as error:
                assert isinstance(error, UserError)  # noqa: PT017
                assert "\n" not in error.args[0]  # noqa: PT017
                return
        for annotation in found.content["annotations"]:
            assert len(annotation["bbox"]) == 4
            assert all(abs(number) < 1e6 for number in annotation["bbox"])
            assert min(annotation["bbox"][2:]) >= 0

    check()
