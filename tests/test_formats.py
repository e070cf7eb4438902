# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Annotations of each format, including unusual files of other tools and of people."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data.datasets import load_voc_instances
from detectron2.structures import BoxMode
from PIL import Image

from vovnet_d2.data.formats import FORMATS, Annotations, read_annotations, recognise
from vovnet_d2.data.formats.images import list_files
from vovnet_d2.data.formats.labelled import LabelledImage, LabelledObject, to_coco
from vovnet_d2.data.formats.notes import Notes

SIZE = (80, 50)
# The byte order mark of UTF-8, which some editors write.
BOM = "\ufeff"


def image(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


Found = dict[str, list[tuple[Any, ...]]]


def objects(found: Annotations) -> Found:
    """Return class, box, polygons and crowd of each object, by file."""
    names = {c["id"]: c["name"] for c in found.content["categories"]}
    files = {i["id"]: i["file_name"] for i in found.content["images"]}
    by_file: Found = {file: [] for file in files.values()}
    for a in found.content["annotations"]:
        row = names[a["category_id"]], a["bbox"], a.get("segmentation", []), a["iscrowd"]
        by_file[files[a["image_id"]]].append(row)
    return by_file


def classes(found: Annotations) -> list[tuple[int, str]]:
    return [(c["id"], c["name"]) for c in found.content["categories"]]


def sizes(found: Annotations) -> dict[str, tuple[int, int]]:
    return {i["file_name"]: (i["width"], i["height"]) for i in found.content["images"]}


# PASCAL VOC


def voc_object(name: str, *box: Any, more: str = "") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def voc(*found: str, size: tuple[int, int] | None = SIZE, filename: str = "x.jpg") -> str:
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation><filename>{filename}</filename>{sides}{''.join(found)}</annotation>"


def test_voc(tmp_path: Path) -> None:
    """Read boxes that count pixels from 1 and include the last pixel."""
    part = voc_object("head", 1, 1, 5, 5).replace("object>", "part>")
    write(
        tmp_path / "Annotations" / "b c.xml",
        voc(
            voc_object("dog, small", 1, 1, 80, 50, more=part),
            voc_object("cat", 11.5, 21.25, 30.5, 40.25, more="<difficult>1</difficult>"),
            filename=r"C:\data\old name.jpg",
        ),
    )
    write(tmp_path / "Annotations" / "a.xml", voc(filename="a.jpg"))
    for name in ("a.jpg", "b c.JPG", "other.jpg"):
        image(tmp_path / "JPEGImages" / name)
    found = read_annotations(tmp_path, None)
    assert found.title == "PASCAL VOC XML"
    assert found.images == tmp_path / "JPEGImages"
    assert classes(found) == [(1, "cat"), (2, "dog, small")]
    assert objects(found) == {
        "a.jpg": [],
        "b c.JPG": [
            ("dog, small", [0, 0, 80, 50], [], 0),
            ("cat", [10.5, 20.25, 20, 20], [], 1),
        ],
    }
    assert found.notes == []
    assert "2 images, 2 objects; the categories in their order are 1 cat, 2 dog" in found.describe()


def test_voc_boxes_equal_those_of_detectron2(tmp_path: Path) -> None:
    boxes = [(1, 1, 80, 50), (7, 9, 7, 9), (3, 4, 30, 20)]
    found = voc(*(voc_object("dog", *box, more="<difficult>0</difficult>") for box in boxes))
    for name in ("a", "b"):
        write(tmp_path / "Annotations" / f"{name}.xml", found)
        image(tmp_path / "JPEGImages" / f"{name}.jpg")
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "a\nb\n")
    peers = load_voc_instances(str(tmp_path), "train", ["dog"])[0]["annotations"]
    mine = objects(read_annotations(tmp_path, None, "train"))["a.jpg"]
    for (_, box, _, _), peer in zip(mine, peers, strict=True):
        assert box == BoxMode.convert(peer["bbox"], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def test_voc_lists_are_parts(tmp_path: Path) -> None:
    for name in ("a", "b 1", "c"):
        write(tmp_path / "Annotations" / f"{name}.xml", voc(voc_object("dog", 1, 1, 9, 9)))
        image(tmp_path / "JPEGImages" / f"{name}.png")
    lists = tmp_path / "ImageSets" / "Main"
    write(lists / "train.txt", BOM + "a\r\nb 1\r\n")
    write(lists / "test.txt", "c\n")
    assert list(objects(read_annotations(tmp_path, None, "train"))) == ["a.png", "b 1.png"]
    assert list(objects(read_annotations(lists / "test.txt", None, "train"))) == ["c.png"]
    assert len(objects(read_annotations(tmp_path, None))) == 3
    with pytest.raises(ValueError, match=r"no list of images 'val' .* but test, train: give"):
        read_annotations(tmp_path, None, "val")
    write(lists / "dog_train.txt", "a  1\nc -1\n")
    with pytest.raises(ValueError, match=r"dog_train.txt, line 1, is 'a  1': .* list for one cl"):
        read_annotations(lists / "dog_train.txt", None)


def test_voc_sizes_that_are_missing_come_from_the_images(tmp_path: Path) -> None:
    box = voc_object("dog", 1, 1, 9, 9)
    write(tmp_path / "xml" / "sub" / "a.xml", voc(box, size=None))
    write(tmp_path / "xml" / "sub" / "b.xml", voc(box, size=(0, 0)))
    write(tmp_path / "xml" / "c.xml", voc(box, size=(7, 9)))
    image(tmp_path / "images" / "sub" / "a.jpg", (60, 40), orientation=6)
    image(tmp_path / "images" / "sub" / "b.jpg", (30, 20))
    image(tmp_path / "images" / "c.jpg", (70, 90))
    found = read_annotations(tmp_path / "xml", tmp_path / "images")
    # Sizes in the annotations are kept. The check of data sets compares them with the images.
    assert sizes(found) == {"sub/a.jpg": (40, 60), "sub/b.jpg": (30, 20), "c.jpg": (7, 9)}


def test_voc_files_whose_image_has_another_name(tmp_path: Path) -> None:
    """Read files that were renamed without the name in the XML, and the reverse."""
    write(tmp_path / "xml" / "1.xml", voc(filename="old.jpg"))
    write(tmp_path / "xml" / "2.xml", voc(filename="D:\\pictures\\second.png"))
    write(tmp_path / "xml" / "3.xml", voc(filename="3"))
    for name in ("1.jpg", "second.png", "3.bmp"):
        image(tmp_path / "images" / name)
    assert list(objects(read_annotations(tmp_path / "xml", tmp_path / "images"))) == [
        *("1.jpg", "3.bmp", "second.png")
    ]


def test_voc_notes(tmp_path: Path) -> None:
    polygon = "<polygon><x1>1</x1><y1>1</y1></polygon>"
    text = voc(
        voc_object("dog", 30, 2, 11, 9),
        voc_object("dog", 30, 9, 11, 2),
        voc_object("dog", 0, 5, 9, 9, more=polygon),
        filename="",
    )
    write(tmp_path / "a.xml", BOM + text)
    found = read_annotations(tmp_path, tmp_path)
    assert objects(found) == {
        "a.jpg": [("dog", [10, 1, 20, 8], [], 0)] * 2 + [("dog", [-1, 4, 10, 5], [], 0)]
    }
    assert [note.partition("; first: ")[0] for note in found.notes] == [
        "2 boxes have their corners swapped and are corrected",
        "1 boxes begin before pixel 1, where VOC begins to count",
        "1 files have polygons, which VOC does not define: the boxes are read",
        "1 images are not in the folder of images",
    ]
    assert f"{tmp_path / 'a.xml'}, object 1." in found.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.xml: the file is empty. For an image without objects"),
        ("<annotations/>", "a.xml: its root is 'annotations', and VOC's is 'annotation'"),
        ("<annotation><object>", r"a.xml: this is not XML \(no element found: line 1"),
        (voc(voc_object("dog", 1, 2, "x", 9)), "has 'x' for 'bndbox/xmax' in its 'object'"),
        (voc(voc_object("dog", 1, 2, "nan", 9)), "has 'nan' for 'bndbox/xmax'"),
        (voc("<object><name>dog</name></object>"), "lacks 'bndbox/xmin' in its 'object'"),
        (voc(voc_object("", 1, 2, 3, 9)), "object 1 has no name"),
        (
            voc(voc_object("dog", 1, 2, 3, 9).replace("</object>", "<bndbox/></object>")),
            "object 1 has 2 boxes",
        ),
        (voc(size=None), "a.xml has no size, and there is no image 'a.jpg' in "),
    ],
)
def test_voc_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "a.xml", text)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        read_annotations(tmp_path, tmp_path)
    assert "\n" not in caught.value.args[0]
    for name in ("b.xml", "c.xml"):
        write(tmp_path / name, text)
    with pytest.raises((FileNotFoundError, ValueError), match=r" 2 more files have problems\.$"):
        read_annotations(tmp_path, tmp_path)


def test_voc_in_another_encoding(tmp_path: Path) -> None:
    """Read a file that names its encoding, and refuse a file that does not."""
    head = '<?xml version="1.0" encoding="iso-8859-1"?>'
    text = voc(voc_object("Bär", 1, 1, 9, 9))
    write(tmp_path / "a.xml", head + text, "latin-1")
    assert objects(read_annotations(tmp_path, tmp_path))["a.jpg"][0][0] == "Bär"
    write(tmp_path / "a.xml", text, "latin-1")
    with pytest.raises(ValueError, match=r"a.xml: this is not XML \(not well-formed"):
        read_annotations(tmp_path, tmp_path)


# YOLO


def yolo(root: Path, *lines: str, names: Any = ("dog", "cat, big")) -> Path:
    """Write a data set of one image in the layout of Roboflow."""
    image(root / "train" / "images" / "a b.jpg")
    write(root / "train" / "labels" / "a b.txt", "\n".join(lines))
    described = {"train": "../train/images", "val": "..\\valid\\images", "nc": 2, "names": names}
    return write(root / "data.yaml", json.dumps(described))


def test_yolo(tmp_path: Path) -> None:
    lines = ["0 0.5 0.5 1 1", "1 0.25 0.5 0.1 0.2", "", "1 0.1 0.2 0.5 0.2 0.5 1.0"]
    file = yolo(tmp_path, *lines)
    image(tmp_path / "train" / "images" / "empty.png", (60, 40))
    write(tmp_path / "train" / "labels" / "empty.txt", "")
    image(tmp_path / "train" / "images" / "none.png", (60, 40), orientation=6)
    image(tmp_path / "valid" / "images" / "v.jpg")
    write(tmp_path / "valid" / "labels" / "v.txt", "1 .5 .5 .5 .5")
    found = read_annotations(file, None, "train")
    assert found.title == "YOLO text"
    assert found.images == tmp_path / "train" / "images"
    assert classes(found) == [(1, "dog"), (2, "cat, big")]
    assert objects(found) == {
        "a b.jpg": [
            ("dog", [0, 0, 80, 50], [], 0),
            ("cat, big", [16, 20, 8, 10], [], 0),
            ("cat, big", [8, 10, 32, 40], [[8, 10, 40, 10, 40, 50]], 0),
        ],
        "empty.png": [],
        "none.png": [],
    }
    assert [a["area"] for a in found.content["annotations"]] == [4000, 80, 32 * 40 / 2]
    # Training and labelling tools turn images as EXIF says.
    assert sizes(found)["none.png"] == (40, 60)
    assert found.notes == ["1 images have no text file and so no objects; first: none.png."]
    assert objects(read_annotations(file, None, "val")) == {
        "v.jpg": [("cat, big", [20, 12.5, 40, 25], [], 0)]
    }
    # A given folder is used instead of the folder in the file.
    given = read_annotations(file, tmp_path, "val")
    assert (given.images, list(objects(given))) == (tmp_path, ["valid/images/v.jpg"])
    assert list(objects(read_annotations(tmp_path, None))) == [
        *("train/images/a b.jpg", "train/images/empty.png", "train/images/none.png"),
        "valid/images/v.jpg",
    ]


def test_yolo_by_lists_and_paths_of_another_machine(tmp_path: Path) -> None:
    for name in ("a", "b"):
        image(tmp_path / "images" / f"{name}.jpg")
        write(tmp_path / "labels" / f"{name}.txt", "0 .5 .5 .5 .5")
    write(tmp_path / "train.txt", BOM + "C:\\Users\\me\\data\\images\\a.jpg\r\n")
    text = "path: /content/data\ntrain: train.txt\nval: [images]\nnames: {0: dog}\n"
    file = write(tmp_path / "my.yml", BOM + text)
    assert list(objects(read_annotations(file, None, "train"))) == ["a.jpg"]
    assert list(objects(read_annotations(file, None, "val"))) == ["a.jpg", "b.jpg"]
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"train.txt lists .*a.jpg', which does not exist"):
        read_annotations(file, None, "train")
    found = read_annotations(file, tmp_path / "moved", "train")
    assert objects(found) == {"a.jpg": [("dog", [20, 12.5, 40, 25], [], 0)]}


def test_yolo_folders_without_a_description(tmp_path: Path) -> None:
    for part, name in (("train", "a"), ("val", "b")):
        image(tmp_path / "images" / part / f"{name}.jpg")
        write(tmp_path / "labels" / part / f"{name}.txt", "1.0 .5 .5 .5 .5")
    write(tmp_path / "labels" / "train" / "gone.txt", "0 .5 .5 .5 .5")
    write(tmp_path / "classes.txt", BOM + "dog\ncat, big\n\n")
    found = read_annotations(tmp_path, None, "train")
    assert objects(found) == {"a.jpg": [("cat, big", [20, 12.5, 40, 25], [], 0)]}
    assert classes(found) == [(1, "dog"), (2, "cat, big")]
    gone = tmp_path / "labels" / "train" / "gone.txt"
    assert found.notes == [f"1 text files have no image and are left out; first: {gone}."]
    both = read_annotations(tmp_path, tmp_path / "images", "val")
    assert list(objects(both)) == ["val/b.jpg"]
    labels, images = tmp_path / "labels" / "val", tmp_path / "images" / "val"
    assert objects(read_annotations(labels, images)) == {
        "b.jpg": [("cat, big", [20, 12.5, 40, 25], [], 0)]
    }
    with pytest.raises(FileNotFoundError, match=r"None of the 1 images in .* has a text file, "):
        read_annotations(labels, tmp_path / "images" / "train")
    (tmp_path / "classes.txt").unlink()
    write(tmp_path / "other.yaml", "a: !!python/name:os.system ")
    with pytest.raises(FileNotFoundError, match=r"no names of classes in .*: write them to .*/val"):
        read_annotations(labels, images)


def test_the_last_folder_named_images_has_labels_beside_it(tmp_path: Path) -> None:
    root = tmp_path / "images" / "mine"
    image(root / "images" / "train" / "a.jpg")
    write(root / "labels" / "train" / "a.txt", "0 .5 .5 .5 .5")
    write(root / "data.yaml", "names: [dog]\ntrain: images/train\n")
    found = read_annotations(root / "data.yaml", None, "train")
    assert [len(each) for each in objects(found).values()] == [1]


def test_yolo_beside_the_images(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    write(tmp_path / "a.txt", "0 .5 .5 -.5 .5")
    write(tmp_path / "classes.txt", "dog")
    found = read_annotations(tmp_path, None)
    assert objects(found) == {"a.jpg": [("dog", [20, 12.5, 40, 25], [], 0)]}
    assert "1 boxes have a negative width or height, which is taken as positive" in found.notes[0]


def test_yolo_names_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    file = yolo(tmp_path, "0 .5 .5 .5 .5", names={"1": "cat", "0": "dog"})
    found = read_annotations(file, None, "train")
    assert classes(found) == [(1, "dog"), (2, "cat")]
    assert [name for name, *_ in objects(found)["a b.jpg"]] == ["dog"]


def test_yolo_keypoints_are_left_out(tmp_path: Path) -> None:
    file = yolo(tmp_path, "0 .5 .5 .5 .5 .1 .1 2 .2 .2 1")
    file.write_text(file.read_text().replace('"nc"', '"kpt_shape": [2, 3], "nc"'))
    found = read_annotations(file, None, "train")
    assert objects(found)["a b.jpg"] == [("dog", [20, 12.5, 40, 25], [], 0)]
    assert "1 objects have keypoints, which are not read" in found.notes[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 .5 .5 .5 .5", r"line 2, is of class 2, but .*data.yaml names 2 classes, 0 to 1"),
        ("-1 .5 .5 .5 .5", "is of class -1"),
        ("0.5 .5 .5 .5 .5", "is of class 0.5"),
        ("dog .5 .5 .5 .5", "line 2 has 'dog' where a number is needed"),
        ("0 .5 .5 .5", "line 2, has 4 numbers: a box has 5"),
        ("0 .5 .5", "line 2, has 3 numbers: a box has 5"),
        ("0 .5 .5 .5 .5 .9", r"has 6 numbers: .*\(remove the score at the end\)"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "line 2, has 8 numbers"),
        ("0 40 25 40 25", "line 2, has 40: the numbers after the class are fractions"),
        ("0 0,5 .5 .5 .5", "'0,5' where a number is needed: write a point in place of the comma"),
        ("0 .5 .5 nan .5", "'nan' where a number is needed"),
        ("0 .5 .5 0_1 .5", "'0_1' where a number is needed"),
    ],
)
def test_yolo_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    file = yolo(tmp_path, "0 .5 .5 .5 .5", line)
    with pytest.raises(ValueError, match=message) as caught:
        read_annotations(file, None, "train")
    assert str(tmp_path / "train" / "labels" / "a b.txt") in caught.value.args[0]
    assert "\n" not in caught.value.args[0]


def test_a_line_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = yolo(tmp_path, "0 .5 .5 .5 .5")
    (tmp_path / "train" / "labels" / "a b.txt").write_bytes(b"0 .5 .5 .5 .5\n0 .5 \xe9 .5 .5\n")
    message = r"a b.txt, line 2, is not in UTF-8 \(byte 0xe9\): save the file as UTF-8"
    with pytest.raises(ValueError, match=message):
        read_annotations(file, None, "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"0": "dog", "2": "cat"}, r"names has the numbers \['0', '2'\], which must count from 0"),
        (["dog"], "has nc 2 and 1 name:"),
        (["dog", "dog"], "the name 'dog' for two classes"),
        (["dog", " "], "has no name for class 1"),
        ("dog", 'has no list "names"'),
    ],
)
def test_yolo_names_that_are_refused(tmp_path: Path, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_annotations(yolo(tmp_path, "0 .5 .5 .5 .5", names=names), None, "train")


def test_yolo_parts_that_are_refused(tmp_path: Path) -> None:
    file = yolo(tmp_path, "0 .5 .5 .5 .5")
    with pytest.raises(ValueError, match=r"data.yaml has no 'test', but train, val: add it, or"):
        read_annotations(file, None, "test")
    image(tmp_path / "images" / "a b.jpg")  # not in the folder that the file names
    with pytest.raises(FileNotFoundError, match=r"names '..\\\\valid\\\\images', which does not"):
        read_annotations(file, None, "val")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"which is not in the folder of images .*other"):
        read_annotations(file, tmp_path / "other", "train")
    write(file, "names: [a\n")
    with pytest.raises(ValueError, match=r"data.yaml is not YAML: ") as caught:
        read_annotations(file, None)
    assert "\n" not in caught.value.args[0]


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    """Refuse images without a readable size, which YOLO annotations need."""
    file = yolo(tmp_path, "0 .5 .5 .5 .5")
    (tmp_path / "train" / "images" / "a b.jpg").write_bytes(b"GIF89a")
    (tmp_path / "train" / "images" / "c.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a b.jpg is not a picture .* 1 more files have problems"):
        read_annotations(file, None, "train")


# Labelme


def shape(label: str, *points: Any, kind: str | None = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": list(points), "shape_type": kind, **more}


def labelme(*shapes: Any, path: str | None = "a.jpg", size: Any = SIZE) -> str:
    width, height = size or (None, None)
    content = {"version": "5.4.1", "flags": {}, "shapes": list(shapes), "imageData": None}
    content |= {"imagePath": path, "imageWidth": width, "imageHeight": height}
    return json.dumps(content)


TRIANGLE = ([1, 2], [9.5, 2], [9.5, 6])


def test_labelme(tmp_path: Path) -> None:
    shapes = [
        shape("dog", [40.25, 30], [10, 5.5], kind="rectangle", group_id=None),
        shape("cat, big", *TRIANGLE, kind=None),
        shape("dog", *TRIANGLE, group_id=3),
        shape("cat", *TRIANGLE, group_id=3, flags={"iscrowd": True}),
        shape("dog", [20, 10], [30, 10], [30, 20], group_id=3),
    ]
    text = labelme(*shapes, path="..\\images\\a b.jpg", size=None)
    write(tmp_path / "json" / "a b.json", BOM + text)
    image(tmp_path / "images" / "a b.jpg")
    found = read_annotations(tmp_path / "json", None)
    assert found.title == "Labelme JSON"
    assert found.images.resolve() == tmp_path / "images"
    assert classes(found) == [(1, "cat"), (2, "cat, big"), (3, "dog")]
    triangle = [1, 2, 9.5, 2, 9.5, 6]
    assert objects(found) == {
        "a b.jpg": [
            ("dog", [10, 5.5, 30.25, 24.5], [], 0),
            ("cat, big", [1, 2, 8.5, 4], [triangle], 0),
            ("dog", [1, 2, 29, 18], [triangle, [20, 10, 30, 10, 30, 20]], 0),
            ("cat", [1, 2, 8.5, 4], [triangle], 1),
        ]
    }
    assert [a["area"] for a in found.content["annotations"]] == [30.25 * 24.5, 17, 67, 17]
    assert sizes(found) == {"a b.jpg": SIZE}
    assert found.notes == []


def test_labelme_notes(tmp_path: Path) -> None:
    shapes = [
        shape("dog", [1, 2], [9, 2]),
        shape("dog", [5, 5], kind="point"),
        shape("dog", [20, 10], [23, 14], kind="circle"),
        shape("dog", [1, 2], [9, 7], kind="mask", mask="iVBOR"),
    ]
    write(tmp_path / "a.json", labelme(*shapes))
    found = read_annotations(tmp_path / "a.json", tmp_path)
    boxes = [box for _, box, _, _ in objects(found)["a.jpg"]]
    assert boxes == [[15, 5, 10, 10], [1, 2, 8, 5]]
    assert [note.partition("; first: ")[0] for note in found.notes] == [
        "1 polygons of fewer than three points are left out",
        "1 shapes of type 'point' have no area and are left out",
        "1 shapes of type 'circle' are read as their boxes",
        "1 shapes of type 'mask' are read as their boxes",
        "1 images are not in the folder of images",
    ]
    assert f"{tmp_path / 'a.json'}, shapes[0]." in found.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.json is empty: remove it"),
        (labelme()[:-9], r"a.json, line 1, is not JSON \("),
        ('{"version": "5", "shapes": 7}', 'a.json has no list of "shapes"'),
        ('["shapes"]', 'a.json has no list of "shapes"'),
        (labelme(shape("", *TRIANGLE)), r"shapes\[0\] has no label"),
        (labelme(7), r"shapes\[0\] has no label"),
        (labelme(shape("dog", [1, "2"])), r'shapes\[0\]: "points" is \[\[1, \'2\'\]\]'),
        (labelme(shape("dog", *TRIANGLE, kind="rectangle")), "of type 'rectangle' with 3 points"),
        (labelme(shape("dog", [1, 2], [3, 4], kind="star")), "of type 'star' with 2 points"),
        (labelme(size=None), "a.json has no image size, and there is no image 'a.jpg'"),
    ],
)
def test_labelme_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "a.json", text)
    write(tmp_path / "b.json", labelme(path="b.jpg"))  # shows the format
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        read_annotations(tmp_path, tmp_path)
    assert str(tmp_path / "a.json") in caught.value.args[0]
    assert "\n" not in caught.value.args[0]


# CSV of Open Images

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf"


def test_open_images(tmp_path: Path) -> None:
    rows = [
        "b c,xclick,/m/1,1,0.25,0.5,0.2,0.6,1,0",
        'a.v2,xclick,"cat, big",1,0,1,0,1,0,1',
        "b c,xclick,/m/2,1,0.5,0.25,0.6,0.2,0,0",
    ]
    file = write(tmp_path / "boxes.csv", BOM + "\r\n".join([HEADER, *rows]))
    write(tmp_path / "class-descriptions-boxable.csv", BOM + '/m/1,"dog, small"\n/m/2,bird\n')
    image(tmp_path / "images" / "b c.jpg")
    image(tmp_path / "images" / "a.v2.png", (30, 20))
    image(tmp_path / "images" / "other.png")
    found = read_annotations(file, tmp_path / "images")
    assert found.title == "CSV of Open Images"
    assert classes(found) == [(1, "bird"), (2, "cat, big"), (3, "dog, small")]
    assert objects(found) == {
        "a.v2.png": [("cat, big", [0, 0, 30, 20], [], 1)],
        "b c.jpg": [
            ("dog, small", [20, 10, 20, 20], [], 0),
            ("bird", [20, 10, 20, 20], [], 0),
        ],
    }
    assert found.notes == [
        f"1 boxes have their corners swapped and are corrected; first: {file}, line 4."
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, has no column ImageID, LabelName, XMin"),
        ("filename,width,height,class,xmin\n", "line 1, has no column ImageID, LabelName, XMin"),
        (HEADER, "has no row below its header"),
        (f"{HEADER}\na,,dog,1,0.1,?,0.1,0.2,0,0", "line 2, column XMax, has '[?]' where a number"),
        (f"{HEADER}\na,,dog,1,0.1", "line 2, column XMax, has nothing where a number"),
        (f"{HEADER}\na,,,1,0.1,0.2,0.1,0.2,0,0", "line 2, has no LabelName"),
        (
            f"{HEADER}\na,,dog,1,10,20,10,20,0,0",
            "line 2, has 10, 20, 10, 20 for a box, which must be",
        ),
        (
            f"{HEADER}\nz,,dog,1,0.1,0.2,0.1,0.2,0,0\nz,,dog,1,0.1,0.2,0.1,0.2,0,0",
            "line 2, is of image 'z', which is missing or ambiguous",
        ),
        (
            f'{HEADER}\n"a,,dog,1,0.1,0.2,0.1,0.2,0,0',
            "boxes.csv, line 1, is not CSV: unexpected end",
        ),
    ],
)
def test_csv_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "boxes.csv", text)
    image(tmp_path / "images" / "a.jpg")
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        read_annotations(file, tmp_path / "images")
    assert str(file) in caught.value.args[0]
    assert "\n" not in caught.value.args[0]


# Unusual cases in all formats


def one_object(key: str, root: Path, box: tuple[Any, ...] | None, name: str = "a.jpg") -> Path:
    """Write annotations of one image with one object or none, and return the path to read.

    Args:
        box: left, top, right, bottom in the numbers of the format; None for no object.
        name: the name of the image sub/a.jpg in the annotations.
    """
    image(root / "images" / "sub" / "a.jpg")
    found: dict[str, Callable[[], Path]] = {
        "voc": lambda: write(
            root / "Annotations" / "sub" / "a.xml",
            voc(*([voc_object("dog", *box)] if box else []), filename=name),
        ).parents[1],
        "labelme": lambda: (
            write(
                root / "json" / "a.json",
                labelme(
                    *([shape("dog", box[:2], box[2:], kind="rectangle")] if box else []), path=name
                ),
            ).parent
        ),
        "csv": lambda: write(
            root / "boxes.csv",
            f"{HEADER}\n{name},,dog,1,{box[0]},{box[2]},{box[1]},{box[3]},0,0" if box else HEADER,
        ),
        "yolo": lambda: write(
            write(root / "classes.txt", "dog").parent / "labels" / "sub" / "a.txt",
            "0 {} {} {} {}".format(*box) if box else "",
        ).parents[1],
        "coco": lambda: write(
            root / "a.json",
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": name, "width": 80, "height": 50}],
                    "categories": [{"id": 1, "name": "dog"}],
                    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}]
                    if box
                    else [],
                }
            ),
        ),
    }
    return found[key]()


# The same box in each format. It begins 8 pixels left of the 80x50 image and 5 pixels above it.
OUTSIDE = {
    "voc": (-7, -4, 16, 10),
    "labelme": (-8, -5, 16, 10),
    "csv": (-0.1, -0.1, 0.2, 0.2),
    "yolo": (0.05, 0.05, 0.3, 0.3),
}


@pytest.mark.parametrize("key", list(OUTSIDE))
def test_corners_below_zero_are_kept(key: str, tmp_path: Path) -> None:
    """Read boxes outside the image, which the check of data sets reports and training clips."""
    path = one_object(key, tmp_path, OUTSIDE[key], "sub/a.jpg")
    ((_, box, _, _),) = objects(read_annotations(path, tmp_path / "images"))["sub/a.jpg"]
    assert box == [-8, -5, 24, 15]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("key", list(OUTSIDE))
def test_files_as_editors_on_windows_write_them(key: str, encoding: str, tmp_path: Path) -> None:
    path = one_object(key, tmp_path, OUTSIDE[key], "sub/a.jpg")
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix != ".jpg":
            file.write_text(file.read_text().replace("\n", "\r\n"), encoding, newline="")
    ((name, box, _, _),) = objects(read_annotations(path, tmp_path / "images"))["sub/a.jpg"]
    assert (name, box) == ("dog", [-8, -5, 24, 15])


@pytest.mark.parametrize("name", [r"sub\a.jpg", r".\sub\a.jpg", r"D:\my data\sub\a.jpg"])
@pytest.mark.parametrize("key", ["voc", "labelme", "csv"])
def test_paths_of_windows_lead_to_the_image(key: str, name: str, tmp_path: Path) -> None:
    path = one_object(key, tmp_path, OUTSIDE[key], name)
    assert list(objects(read_annotations(path, tmp_path / "images"))) == ["sub/a.jpg"]


@pytest.mark.parametrize("key", ["voc", "labelme", "yolo"])
def test_an_image_without_objects_is_kept(key: str, tmp_path: Path) -> None:
    path = one_object(key, tmp_path, None, "sub/a.jpg")
    assert objects(read_annotations(path, tmp_path / "images")) == {"sub/a.jpg": []}


@pytest.mark.parametrize(
    ("key", "file", "message"),
    [
        ("voc", "ImageSets/Main/train.txt", r"train.txt lists no image\.$"),
        ("yolo", "data.yaml", "data.yaml does not describe a data set: write names, and"),
        ("yolo", "classes.txt", "classes.txt has no name for class 0: add it"),
        ("coco", "a.json", r"a.json is not in COCO's format: .* it may be truncated"),
    ],
)
def test_an_empty_file_is_named(key: str, file: str, message: str, tmp_path: Path) -> None:
    path = one_object(key, tmp_path, OUTSIDE.get(key), "sub/a.jpg")
    empty = write(tmp_path / file, "")
    given = path if file == "classes.txt" else empty
    with pytest.raises(ValueError, match=message):
        read_annotations(given, tmp_path / "images")


def test_hidden_files_are_no_part_of_a_data_set(tmp_path: Path) -> None:
    """Read a folder with hidden files of macOS and notebooks."""
    image(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", voc(voc_object("dog", 1, 1, 9, 9)))
    write(tmp_path / "._a.xml", "\0")
    write(tmp_path / ".ipynb_checkpoints" / "b.xml", "\0")
    assert list(objects(read_annotations(tmp_path, tmp_path))) == ["a.jpg"]


def test_files_are_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write(tmp_path / name, "") for name in ("a.txt", "b.txt", "c/d.txt")]
    walk = os.walk

    def walk_backwards(folder: Path, **options: Any) -> Iterator[Any]:
        for parent, folders, names in walk(folder, **options):
            yield parent, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", walk_backwards)
    assert list_files(tmp_path, [".txt"]) == files


def test_the_area_does_not_depend_on_the_direction_of_a_polygon() -> None:
    polygons = [[0.0, 0.0, 4.0, 0.0, 4.0, 3.0], [4.0, 3.0, 4.0, 0.0, 0.0, 0.0]]
    drawn = [LabelledObject("dog", [0.0, 0.0, 4.0, 3.0], [polygon]) for polygon in polygons]
    content = to_coco([LabelledImage("a.jpg", (8, 8), drawn)])
    assert [annotation["area"] for annotation in content["annotations"]] == [6, 6]


def test_notes_count_the_cases_and_name_the_first() -> None:
    notes = Notes()
    for what, where in (("boxes", "a, line 1"), ("names", "a, line 2"), ("boxes", "b, line 1")):
        notes.add(f"{what} are odd", where)
    assert notes.lines() == [
        "2 boxes are odd; first: a, line 1.",
        "1 names are odd; first: a, line 2.",
    ]


# Ids


def test_ids_count_from_1_in_the_order_of_the_names() -> None:
    """Check the ids. They must not be 0, which pycocotools treats as missing."""
    box = [0.0, 0.0, 1.0, 1.0]
    images = [
        LabelledImage("b.jpg", (4, 4), [LabelledObject(name, box) for name in ("dog", "cat")]),
        LabelledImage("a.jpg", (4, 4), [LabelledObject("dog", box)]),
    ]
    content = to_coco(images)
    assert [(i["id"], i["file_name"]) for i in content["images"]] == [(1, "a.jpg"), (2, "b.jpg")]
    assert [(c["id"], c["name"]) for c in content["categories"]] == [(1, "cat"), (2, "dog")]
    found = [(a["id"], a["image_id"], a["category_id"]) for a in content["annotations"]]
    assert found == [(1, 1, 2), (2, 2, 2), (3, 2, 1)]


# Recognition


def test_each_format_is_recognised(tmp_path: Path) -> None:
    samples: dict[str, Callable[[Path], Path]] = {
        "voc": lambda root: write(root / "Annotations" / "a.xml", voc()).parents[1],
        "yolo": lambda root: yolo(root, "0 .5 .5 .5 .5"),
        "labelme": lambda root: write(root / "a.json", labelme()).parent,
        "csv": lambda root: write(root / "boxes.csv", HEADER),
        "coco": lambda root: write(root / "a.json", json.dumps({"images": []})),
    }
    assert samples.keys() == FORMATS.keys()
    for key, sample in samples.items():
        assert recognise(sample(tmp_path / key)) == key


def test_files_that_are_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no annotation file .*missing\.$"):
        recognise(tmp_path / "missing")
    image(tmp_path / "images" / "a.jpg")
    one = write(tmp_path / "one.xml", voc())
    for path in (tmp_path / "images", one):
        with pytest.raises(ValueError, match=r"has no annotations of a known format \(PASCAL"):
            recognise(path)
    coco = write(tmp_path / "coco.json", "{}")
    with pytest.raises(FileNotFoundError, match=r"Close to it: '.*/coco\.json'\.$"):
        recognise(tmp_path / "cocoo.json")
    with pytest.raises(FileNotFoundError, match=r"images .*/image\. Close to it: '.*/images'\.$"):
        read_annotations(tmp_path, tmp_path / "image")
    with pytest.raises(ValueError, match=r"is COCO JSON, which does not say where its images are"):
        read_annotations(coco, None)
    with pytest.raises(FileNotFoundError, match=r"There is no folder of images .*nowhere"):
        read_annotations(tmp_path, tmp_path / "nowhere")
