# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Each documented limit is tested by one case on either side, close to the limit."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image
from test_single_shot_models import build_tiny

from vovnet_d2.checkpoint.metadata import BGR_255, InputConvention, check_input_convention
from vovnet_d2.data.check import Source, check_data_sets
from vovnet_d2.data.check.conventions import COCO, Sample, find_conventions
from vovnet_d2.data.check.files import inspect_files
from vovnet_d2.data.check.frames import _map_points
from vovnet_d2.data.check.orientation import compare_readings
from vovnet_d2.data.check.problems import Findings
from vovnet_d2.data.check.records import repair_categories
from vovnet_d2.data.check.values import Numbering
from vovnet_d2.data.image_file import read_labels
from vovnet_d2.data.records import check_records, find_absurd
from vovnet_d2.drawing.artist import Artist, Shown
from vovnet_d2.drawing.curves import read_metrics
from vovnet_d2.engine import load_config, rehearsal
from vovnet_d2.engine.own_data import _warn_of_contents
from vovnet_d2.export.masks import paste_masks
from vovnet_d2.modeling.single_shot.detections import select_detections

SIDE = 100
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def polygon(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def found(folder: Path, *annotations: dict[str, Any], side: int = SIDE, **image: Any) -> Counter:
    """Count the problems of a data set of one image with these annotations."""
    usual = {"bbox": [10, 10, 30, 40], "area": 1200, "image_id": 1, "category_id": 1, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE} | image],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": i} | usual | a for i, a in enumerate(annotations, start=1)],
    }
    height, width = image.get("height", side), image.get("width", side)
    Image.fromarray(np.resize(NOISE, (height, width, 3))).save(folder / "a.png")
    (folder / "a.json").write_text(json.dumps(content))
    source = Source("a", folder / "a.json", folder)
    ((checked,), _) = check_data_sets([source], resize=(SIDE, 2 * SIDE))
    return checked.findings.counts


# Limits of the check of data sets


@pytest.mark.parametrize(
    ("problem", "fine", "beyond"),
    [
        # Sides of less than 4 pixels after resizing. Here resizing does not change the size.
        ("tiny_box", {"bbox": [10, 10, 4, 40]}, {"bbox": [10, 10, 3.9, 40]}),
        # Boxes and polygons may reach one pixel out of the image.
        ("box_outside", {"bbox": [70, 10, 31, 40]}, {"bbox": [70, 10, 31.2, 40]}),
        (
            "polygon_outside",
            {"bbox": [70, 10, 30, 40], "segmentation": [polygon(70, 10, 101, 50)]},
            {"bbox": [70, 10, 30, 40], "segmentation": [polygon(70, 10, 101.2, 50)]},
        ),
        # Edges of box and mask may differ by a tenth of the side, but always by two pixels.
        (
            "box_and_mask",
            {"bbox": [10, 10, 60, 60], "segmentation": [polygon(10, 10, 64, 70)]},
            {"bbox": [10, 10, 60, 60], "segmentation": [polygon(10, 10, 63, 70)]},
        ),
        (
            "box_and_mask",
            {"bbox": [10, 10, 12, 60], "segmentation": [polygon(10, 10, 20, 70)]},
            {"bbox": [10, 10, 12, 60], "segmentation": [polygon(10, 10, 19.8, 70)]},
        ),
        # A keypoint may lie on the border of the image.
        (
            "keypoint_outside",
            {"keypoints": [100, 100, 2], "num_keypoints": 1},
            {"keypoints": [100, 100.1, 2], "num_keypoints": 1},
        ),
    ],
)
def test_annotations(
    tmp_path: Path, problem: str, fine: dict[str, Any], beyond: dict[str, Any]
) -> None:
    assert problem not in found(tmp_path, fine)
    assert found(tmp_path, beyond)[problem] == 1


@pytest.mark.parametrize(("number", "problem"), [(2**63 - 1, "large_id"), (2**63, "image_id_type")])
def test_ids_have_up_to_63_bits(tmp_path: Path, number: int, problem: str) -> None:
    counts = found(tmp_path, {"image_id": number}, id=number)
    assert {"large_id", "image_id_type"} & counts.keys() == {problem}


def test_new_ids_are_above_0() -> None:
    numbering = Numbering([-5, None, "a"])
    given = [numbering.of(value) for value in (-5, "a", "b")]
    assert [*given, numbering.new()] == [-5, 1, 2, 3]


def test_the_shorter_side_of_a_tall_picture_is_its_width(tmp_path: Path) -> None:
    """Use an image of 50 × 150 pixels. Its longer side limits the scale in training to 4/3."""
    for side, tiny in ((3.1, False), (2.9, True)):
        counts = found(tmp_path, {"bbox": [10, 10, side, 40]}, width=50, height=150)
        assert ("tiny_box" in counts) == tiny


def test_a_problem_of_half_of_the_annotations_is_systematic(tmp_path: Path) -> None:
    wrong, right = {"category_id": 2}, {}
    for number, systematic in ((9, False), (10, True), (11, True)):
        counts = found(tmp_path, *[wrong] * number, *[right] * (20 - number))
        assert counts["unknown_category"] == number
        assert ("systematic" in counts) == systematic, number


@pytest.mark.parametrize(("side", "resized"), [(104, False), (106, True)])
def test_a_picture_counts_as_resized_from_a_twentieth_on(
    tmp_path: Path, side: int, resized: bool
) -> None:
    annotations = [{"bbox": [10 * i, 10, 20, 30]} for i in range(4)]
    counts = found(tmp_path, *annotations, side=side)
    assert ("resized" in counts) == resized


@pytest.mark.parametrize(("largest", "dark"), [(4095, True), (4096, False)])
def test_12_bits_of_16_are_dark(tmp_path: Path, largest: int, dark: bool) -> None:
    pixels = RNG.integers(0, largest, (8, 8)).astype(np.uint16)
    pixels[0, 0] = largest
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray((pixels >> 8).astype(np.uint8)).save(tmp_path / "b.png")
    file, of_8_bits = inspect_files([str(tmp_path / f"{n}.png") for n in "ab"], "").values()
    assert (file.bits, file.dark) == (16, dark)
    assert (of_8_bits.bits, of_8_bits.dark) == (8, False)


@pytest.mark.parametrize(("deviation", "flat"), [(3, True), (5, False)])
def test_flat_pictures_are_not_compared(tmp_path: Path, deviation: int, flat: bool) -> None:
    """Check that images are only compared if their standard deviation is 4 grey levels or more."""
    pixels = np.full((160, 170, 3), 100 - deviation, np.uint8)
    pixels[80:] = 100 + deviation
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (file,) = inspect_files([str(tmp_path / "a.png")], "").values()
    assert (file.look is None) == flat


@pytest.mark.parametrize(("fitting", "is_coco"), [(3, True), (2, False)])
def test_boxes_are_those_of_coco_if_three_of_four_fit(fitting: int, is_coco: bool) -> None:
    corners = [[5, 5, 40, 30]] * fitting + [[60, 70, 90, 85]] * (4 - fitting)
    readings = find_conventions([Sample(box, (SIDE, SIDE), None, None) for box in corners])
    assert (readings == [COCO]) == is_coco


def test_edges_in_noise_decide_nothing(tmp_path: Path) -> None:
    """Compare on noise, where a reading is rarely better by three standard errors."""
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    verdicts = []
    for _ in range(20):
        boxes = RNG.integers(10, 60, (2, 8, 4)).tolist()
        verdicts.append(compare_readings([(str(tmp_path / "a.png"), boxes)]))
    assert verdicts.count(None) >= 18


@pytest.mark.parametrize(("number", "told"), [(2, False), (3, True)])
def test_three_boxes_are_enough_to_compare_readings(
    tmp_path: Path, number: int, told: bool
) -> None:
    boxes = [[10.0 + 30 * i, 20.0, 12.0, 30.0 + i] for i in range(number)]
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    for x, y, width, height in np.array(boxes, int).tolist():
        pixels[y : y + height, x : x + width] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    elsewhere = [[x, y + 10, width, height] for x, y, width, height in boxes]
    found = compare_readings([(str(tmp_path / "a.png"), [elsewhere, boxes])])
    assert found == (1 if told else None)


# Limits of the check of records before a training


@pytest.mark.parametrize(("number", "absurd"), [(1000, False), (1001, True), (-1001, True)])
def test_numbers_are_absurd_beyond_ten_sides(number: float, absurd: bool) -> None:
    assert bool(find_absurd({"bbox": [number, 0, 5, 5]}, SIDE, 40)) == absurd


def test_the_last_category_is_one_less_than_their_number() -> None:
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": 1}
    for category, fits in ((2, True), (3, False), (0, True), (-1, False)):
        records = [{"width": 64, "height": 64, "annotations": [box | {"category_id": category}]}]
        if fits:
            check_records(records, "set", num_classes=3)
            continue
        with pytest.raises(ValueError, match=f"category {category}, where the network has 3"):
            check_records(records, "set", num_classes=3)


@pytest.mark.parametrize(("runs", "fits"), [([3, 5, 4], True), ([3, 5, 3], False), ([13], False)])
def test_an_rle_has_the_pixels_of_its_image(runs: list[int], fits: bool) -> None:
    mask = {"size": [3, 4], "counts": runs}
    assert (find_absurd({"segmentation": mask}, 4, 3) == "") == fits


# Limits of the comparison of weights and config


@pytest.mark.parametrize(("off", "warned"), [(0.5, False), (0.65, True)])
def test_a_mean_may_be_off_by_a_percent_of_the_deviation(off: float, warned: bool) -> None:
    """Use weights into which the deviation of about 57 is folded."""
    cfg = get_cfg()
    cfg.MODEL.PIXEL_MEAN = [BGR_255.pixel_mean[0] + off, *BGR_255.pixel_mean[1:]]
    assert (check_input_convention(cfg, BGR_255) is not None) == warned


@pytest.mark.parametrize(("off", "warned"), [(0.5, False), (0.65, True)])
def test_a_deviation_may_be_off_by_a_percent(off: float, warned: bool) -> None:
    cfg = get_cfg()
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0 + off]
    convention = InputConvention("BGR", BGR_255.pixel_mean, (57.0,) * 3)
    assert (check_input_convention(cfg, convention) is not None) == warned


# Limits of predictions


def test_keypoints_are_drawn_above_a_score_of_a_twentieth() -> None:
    box = Boxes(torch.tensor([[5.0, 5.0, 90.0, 90.0]]))
    instances = Instances((SIDE, SIDE), pred_boxes=box, scores=torch.ones(1))
    instances.pred_classes = torch.zeros(1).long()
    for score, drawn in ((0.05, False), (0.06, True)):
        instances.pred_keypoints = torch.tensor([[[50.0, 60.0, score]]])
        canvas = np.full((SIDE, SIDE, 3), 100, np.uint8)
        artist = Artist(Metadata(thing_classes=["a"]))
        for scale in (1, 2):  # the image is enlarged; the score stays
            picture = artist.draw(canvas, Shown(instances, None, None), scale=scale)
            assert (picture[60 * scale, 50 * scale].tolist() == [0, 0, 255]) == drawn


def test_a_mask_is_where_its_probability_is_at_least_a_half() -> None:
    masks, boxes = torch.full((1, 4, 4), 0.5), torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    assert paste_masks(masks, boxes, 8, 8)[0, 2:6, 2:6].all()
    assert not paste_masks(masks - 1e-3, boxes, 8, 8).any()


def test_anchors_at_the_threshold_of_objectness_take_part() -> None:
    """Set the logits of RefineDet to zero, so that the objectness of each anchor is a half."""
    model = build_tiny("refinedet", MODEL__SINGLE_SHOT__SCORE_THRESH_TEST=0.0).eval()
    for parameter in model.head.arm.parameters():
        torch.nn.init.zeros_(parameter)
    image = {"image": torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)}
    for threshold, some in ((0.5, True), (0.5001, False)):
        model.objectness_threshold = threshold
        with torch.no_grad():
            assert (len(model([image])[0]["instances"]) > 0) == some


@pytest.mark.parametrize(("score", "said"), [(98.9, True), (99.0, False)])
def test_perfect_predictions_score_99(
    caplog: pytest.LogCaptureFixture, score: float, said: bool
) -> None:
    rehearsal._say_if_imperfect("a", {"segm": {"AP": score}}, 3)
    assert ("Perfect predictions" in caplog.text) == said


def test_a_score_at_the_threshold_is_no_detection() -> None:
    """Check scores at the threshold. A score of 0 at a threshold of 0 is no detection, either."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 29, 29], [40, 40, 49, 49]])
    scores = torch.tensor([[0.5], [0.25], [0.0]])
    for threshold, number in ((0.5, 0), (0.25, 1), (0.0, 2)):
        found = select_detections(
            boxes,
            scores,
            (50, 50),
            score_threshold=threshold,
            topk_candidates=9,
            nms_threshold=0.5,
            max_detections=9,
        )
        assert len(found) == number


# Special cases of rules


def test_an_input_of_unknown_format_agrees_with_both() -> None:
    mean, std = (100.0,) * 3, (50.0,) * 3
    known = {name: InputConvention(name, mean, std) for name in ("", "RGB", "BGR")}
    agreeing = {(a, b) for a in known for b in known if known[a].agrees_with(known[b])}
    assert {(a, b) for a in known for b in known} - agreeing == {("RGB", "BGR"), ("BGR", "RGB")}


def test_a_polygon_with_half_a_point_does_not_change() -> None:
    for polygon in ([1, 2, 3], [1, "2", 3, 4], None):
        assert _map_points(polygon, lambda points: points + 1) == polygon
    assert _map_points([1, 2, 3, 4], lambda points: points + 1) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"images": [1, 2', "at its end, so it may be truncated"),
        ('{"images": [1, 2}', "at its end, so it may be truncated"),
        ('{"images": [1; 2]}', "at line 1, column 14"),
    ],
)
def test_a_file_that_may_be_truncated(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "a.json").write_text(text)
    findings = check_data_sets([Source("a", tmp_path / "a.json", tmp_path)])[0][0].findings
    assert any(place in example for example in findings.examples["json"])


def test_a_repeated_step_counts_once(tmp_path: Path) -> None:
    rows = [(19, 3.0), (39, 2.0), (39, 1.5), (59, 1.0)]
    lines = [json.dumps({"iteration": step, "total_loss": loss}) for step, loss in rows]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert read_metrics(tmp_path / "metrics.json") == {
        "total_loss": [(19, 3.0), (39, 1.5), (59, 1.0)]
    }


def test_label_maps_in_colour_are_refused(tmp_path: Path) -> None:
    """Check images of which only two of three channels are equal."""
    for channels in ([1, 1, 2], [1, 2, 1], [2, 1, 1]):
        Image.fromarray(np.full((4, 4, 3), channels, np.uint8)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match="colour"):
            read_labels(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(tmp_path / "a.png")
    assert (read_labels(tmp_path / "a.png") == 7).all()


def test_the_last_of_two_categories_with_one_id_counts() -> None:
    """Check the name of an id that two categories have. pycocotools uses the last one, too."""
    records = [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]
    assert repair_categories(records, Findings())[1]["name"] == "b"


@pytest.mark.parametrize(("objects", "rectangles", "warned"), [(10, 10, 1), (9, 9, 0), (11, 10, 0)])
def test_masks_that_are_all_rectangles(
    objects: int, rectangles: int, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Check when there is a warning. Crowds are not counted."""
    cfg = load_config("", ["MODEL.MASK_ON", "True"])
    counts = {"num_annotations": objects + 1, "num_crowds": 1, "num_box_masks": rectangles}
    _warn_of_contents(cfg, "a.json", SimpleNamespace(**counts, unused_supercategories=[]))
    assert caplog.text.count("are rectangles") == warned
