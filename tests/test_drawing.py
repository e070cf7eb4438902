# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Annotations, samples and results are drawn at the right positions, also on enlarged images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks
from PIL import Image
from pycocotools import mask as mask_util

from vovnet_d2.drawing import artist
from vovnet_d2.drawing.artist import Artist, Shown, _render
from vovnet_d2.drawing.sheet import write_sheet
from vovnet_d2.drawing.shown import from_record, from_results, from_sample

SIZE = (50, 70)  # height, width
GREY = np.full((*SIZE, 3), 100, np.uint8)
BLUE = {"thing_classes": ["a"], "thing_colors": [[0, 0, 250]]}
SQUARE = [[30.0, 20, 40, 20, 40, 40, 30, 40]]  # fills the box 30, 20, 10, 20


def rle(counts: str) -> dict:
    """Return the rectangle of SQUARE as RLE, which counts pixels down the columns."""
    column = [0] * 20 + [1] * 20 + [0] * 10
    mask = np.array([column if 30 <= x < 40 else [0] * 50 for x in range(70)], np.uint8).T
    if counts == "compressed":
        return mask_util.encode(np.asfortranarray(mask))
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": list(SIZE), "counts": np.diff([0, *edges, flat.size]).tolist()}


def blended(drawn: np.ndarray, scale: int) -> tuple[int, int, int, int]:
    """Return the last row, the first and last column, and the number of pixels of a blue mask."""
    mixed = (drawn == (175, 50, 50)).all(axis=2)  # half grey, half blue
    rows, columns = np.nonzero(mixed)
    return rows.max() // scale, columns.min() // scale, columns.max() // scale, mixed.sum()


def annotation(**fields: object) -> dict:
    box = {"bbox": [30, 20, 10, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    return box | fields


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("mask", [SQUARE, rle("compressed"), rle("numbers")], ids=["p", "c", "n"])
def test_masks_of_a_record(mask: object, scale: int) -> None:
    record = {"file_name": "a", "annotations": [annotation(segmentation=mask), annotation()]}
    shown = from_record(record, SIZE, Metadata(**BLUE))
    assert [m is None for m in shown.instances.pred_masks] == [False, True]
    drawn = Artist(Metadata(**BLUE)).draw(GREY, shown, scale=scale)
    assert drawn.shape == (50 * scale, 70 * scale, 3)
    bottom, left, right, _ = blended(drawn, scale)
    assert bottom in (38, 39)  # the edge of the box may hide the last row
    assert left in (30, 31)
    assert right in (38, 39)
    rows, columns = np.nonzero((drawn == (250, 0, 0)).all(axis=2))
    assert abs(rows.max() - 40 * scale) <= 1
    assert abs(columns.min() - 30 * scale) <= 1
    assert (GREY == 100).all()


def test_masks_at_the_border_and_of_three_points() -> None:
    triangle = [[0.0, 0, 30, 0, 0, 40]]
    box = {"bbox": [0, 0, 30, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": "a", "annotations": [box | {"segmentation": triangle}]}
    shown = from_record(record, SIZE, Metadata(**BLUE))
    (mask,) = shown.instances.pred_masks
    assert abs(int(mask_util.area(mask)) - 30 * 40 / 2) < 30
    *_, covered = blended(Artist(Metadata(**BLUE)).draw(GREY, shown), 1)
    assert covered > 300  # the label hides a part


@pytest.mark.parametrize(
    ("crowd", "text"), [({}, "a"), ({"iscrowd": 0}, "a"), ({"iscrowd": 1}, "a|crowd")]
)
def test_crowds_have_crowd_in_their_label(crowd: dict[str, int], text: str) -> None:
    record = {"file_name": "a", "annotations": [annotation(**crowd)]}
    assert from_record(record, SIZE, Metadata(**BLUE)).instances.texts == [text]


def test_a_name_stands_in_the_larger_part_of_its_region(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[int, int]] = []
    monkeypatch.setattr(artist, "_write", lambda canvas, letters, x, y: places.append((x, y)))
    labels = torch.full(SIZE, 1)
    labels[10:20, 10:21] = labels[40:50, 66:70] = 0
    Artist(Metadata(stuff_classes=["sky"])).draw(GREY, Shown(labels=labels))
    ((x, y),) = places
    assert labels[y, x] == 0


def test_masks_of_samples_and_results_equal_those_of_records() -> None:
    record = {"file_name": "a", "annotations": [annotation(segmentation=SQUARE)]}
    expected = mask_util.decode(from_record(record, SIZE, Metadata(**BLUE)).instances.pred_masks[0])
    assert expected.sum() == 10 * 20
    sample = Instances(SIZE, gt_boxes=Boxes(torch.tensor([[30.0, 20, 40, 40]])))
    sample.gt_classes = torch.zeros(1, dtype=torch.int64)
    polygons = [[np.array(SQUARE[0])]]
    for masks in (PolygonMasks(polygons), BitMasks.from_polygon_masks(polygons, *SIZE)):
        sample.gt_masks = masks
        (found,) = from_sample({"instances": sample}).instances.pred_masks
        pixels = mask_util.decode(found) if isinstance(found, dict) else found.numpy()
        assert np.array_equal(pixels, expected)
    result = {"bbox": [30, 20, 10, 20], "category_id": 0, "score": 0.5, "segmentation": SQUARE}
    shown = from_results([result], SIZE, Metadata(**BLUE))
    assert shown.instances.texts == ["a 50%"]
    assert shown.instances.pred_boxes.tensor.tolist() == [[30, 20, 40, 40]]
    assert np.array_equal(mask_util.decode(shown.instances.pred_masks[0]), expected)


def test_keypoints_that_are_labelled_are_drawn() -> None:
    points = [12, 34, 2, 50, 10, 0]
    record = {"file_name": "a", "annotations": [annotation(keypoints=points), annotation()]}
    shown = from_record(record, SIZE, Metadata(**BLUE))
    drawn = Artist(Metadata(**BLUE)).draw(GREY, shown, scale=2)
    assert (drawn[68, 24] == (0, 0, 255)).all()
    assert not (drawn[20, 100] == (0, 0, 255)).all()
    sample = Instances(SIZE, gt_boxes=Boxes(torch.tensor([[30.0, 20, 40, 40]])))
    sample.gt_classes = torch.zeros(1, dtype=torch.int64)
    sample.gt_keypoints = Keypoints(np.reshape(points, (1, 2, 3)))
    drawn = Artist(Metadata(**BLUE)).draw(GREY, from_sample({"instances": sample}))
    assert (drawn[34, 12] == (0, 0, 255)).all()


def test_categories_without_names_are_shown_by_number() -> None:
    record = {"file_name": "a", "annotations": [annotation(category_id=300, iscrowd=1)]}
    shown = from_record(record, SIZE, Metadata())
    assert shown.instances.texts == ["300|crowd"]
    assert (Artist(Metadata()).draw(GREY, shown) != GREY).any()


@pytest.mark.parametrize(("across", "is_labelled"), [(4, True), (16, False)])
def test_labels_do_not_hide_many_small_objects(across: int, is_labelled: bool) -> None:
    """Draw boxes of 12 pixels in a grid, and one object that is large enough for its label."""
    corners = [(30.0 + 24 * i, 30.0 + 48 * j) for i in range(across) for j in range(across // 2)]
    boxes = [[x, y, x + 12, y + 12] for x, y in corners] + [[2.0, 2.0, 398.0, 398.0]]
    instances = Instances((400, 440))
    instances.pred_boxes = Boxes(torch.tensor(boxes))
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.long)
    instances.scores = torch.ones(len(boxes))
    grey = np.full((400, 440, 3), 100, np.uint8)
    drawn = Artist(Metadata(**BLUE)).draw(grey, Shown(instances))
    is_white = (drawn > 200).all(axis=2)
    assert is_white[:20].any()
    assert is_white[25:].any() == is_labelled
    lower_edge = drawn[42, 32:40]  # the lower edge of the first box
    assert (lower_edge == (250, 0, 0)).all() != is_labelled


@pytest.mark.parametrize("first", ["small", "large"])
def test_large_objects_do_not_hide_small_ones(first: str) -> None:
    """Draw a small box whose right and lower edges lie on the edges of a large box."""
    small, large = annotation(bbox=[40, 25, 25, 20]), annotation(bbox=[5, 5, 60, 40], category_id=1)
    listed = [small, large] if first == "small" else [large, small]
    metadata = Metadata(thing_classes=["a", "b"], thing_colors=[[0, 0, 250], [0, 250, 0]])
    shown = from_record({"file_name": "a", "annotations": listed}, SIZE, metadata)
    drawn = Artist(metadata).draw(GREY, shown)
    assert drawn[45, 60].tolist() == [250, 0, 0]  # BGR
    assert drawn[45, 20].tolist() == [0, 250, 0]


@pytest.mark.parametrize(("size", "height"), [((60, 120), 712), ((120, 60), 996)])
def test_a_sheet_has_the_shape_of_its_pictures(
    tmp_path: Path, size: tuple[int, int], height: int
) -> None:
    """Check the grid of a sheet that is 16 x 120 pixels wide.

    There are two rows of three wide images, or one row of four tall images. A title is 0.3 x 120
    pixels high."""
    write_sheet(tmp_path / "a.png", [("", np.zeros((*size, 3), np.uint8))] * 4)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width == 1920
        assert sheet.height == pytest.approx(height, abs=1)


def test_label_maps_are_enlarged_by_nearest_neighbour() -> None:
    labels = torch.zeros(SIZE, dtype=torch.int64)
    labels[:, 35:] = 1
    stuff = Metadata(stuff_classes=["x", "y"], stuff_colors=[[200, 0, 0], [0, 200, 0]])
    drawn = Artist(stuff).draw(GREY, Shown(labels=labels), scale=3)
    assert (drawn[3, :105] == (50, 50, 150)).all()
    assert (drawn[3, 105:] == (50, 150, 50)).all()


@pytest.mark.parametrize("name", ["a\nb", "a\r\nb", "a\u2028b"])
def test_a_name_of_two_lines_is_written_on_one(name: str) -> None:
    assert np.array_equal(_render(name, 10), _render("a b", 10))
    assert _render(name, 10).any()
    assert not _render("\n", 10).any()


def test_limbs_have_the_colours_of_the_metadata() -> None:
    """Check the order of channels: the metadata has RGB, and the image is BGR."""
    metadata = Metadata(
        thing_classes=["a"],
        keypoint_names=("left", "right"),
        keypoint_connection_rules=[("left", "right", (250, 20, 0))],
    )
    points = [5.0, 10, 2, 65, 10, 2]
    record = {"file_name": "a", "annotations": [annotation(keypoints=points)]}
    drawn = Artist(metadata).draw(GREY, from_record(record, SIZE, metadata))
    assert drawn[10, 35].tolist() == [0, 20, 250]
