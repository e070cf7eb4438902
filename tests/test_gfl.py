# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The assignment of ATSS, and head, losses and boxes of GFL, are compared with plain loops."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from test_fcos import sample, thin_config
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from vovnet_d2.modeling.atss import match_adaptively
from vovnet_d2.modeling.fcos import FCOS
from vovnet_d2.modeling.gfl import (
    DistributionTransform,
    distribution_focal_loss,
    quality_focal_loss,
)

CLASSES, REG_MAX = 3, 4
GFL = {"ASSIGNMENT": "atss", "LOSSES": "gfl", "NUM_CONVS": 1, "REG_MAX": REG_MAX}


def build_gfl(**changes: object) -> FCOS:
    torch.manual_seed(0)
    return build_model(thin_config(**GFL | {"NUM_CLASSES": CLASSES} | changes))


# ATSS ---------------------------------------------------------------------------------------------


def make_cells(shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """Return squares with sides of one stride around all locations.

    A shape is the (stride, rows, columns) of a feature map.
    """
    return [
        torch.tensor(
            [
                [s * (x - 0.5), s * (y - 0.5), s * (x + 0.5), s * (y + 0.5)]
                for y, x in product(range(rows), range(columns))
            ]
        )
        for s, rows, columns in shapes
    ]


def slow_iou(a: list[Fraction], b: list[Fraction]) -> Fraction:
    width = max(Fraction(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(Fraction(0), min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def slow_candidates(
    box: list[Fraction], shapes: list[tuple[int, int, int]], topk: int
) -> Iterator[tuple[int, Fraction, bool]]:
    """Yield the index of each candidate, its IoU, and whether its center is inside the box."""
    start = 0
    for stride, rows, columns in shapes:
        centers = [(stride * x, stride * y) for y, x in product(range(rows), range(columns))]

        def distance(index: int, centers: list[tuple[int, int]] = centers) -> tuple[Fraction, int]:
            x, y = centers[index]
            dx, dy = x - (box[0] + box[2]) / 2, y - (box[1] + box[3]) / 2
            return dx * dx + dy * dy, index

        for index in sorted(range(len(centers)), key=distance)[:topk]:
            (x, y), half = centers[index], 4 * stride
            anchor = [Fraction(v) for v in (x - half, y - half, x + half, y + half)]
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            yield start + index, slow_iou(box, anchor), inside
        start += len(centers)


def slow_atss(
    boxes: list[list[float]], shapes: list[tuple[int, int, int]], topk: int
) -> list[tuple[int, Fraction] | None]:
    """Return the index of the object of each location and the exact IoU of its anchor, or None."""
    best: list[tuple[int, Fraction] | None] = [None] * sum(h * w for _, h, w in shapes)
    for number, box in enumerate(boxes):
        found = list(slow_candidates([Fraction(v) for v in box], shapes, topk))
        mean = sum(iou for _, iou, _ in found) / len(found)
        squares = sum((iou - mean) ** 2 for _, iou, _ in found)
        for index, iou, inside in found:
            above = iou >= mean and (iou - mean) ** 2 * (len(found) - 1) >= squares
            held = best[index]
            if above and inside and (held is None or iou > held[1]):
                best[index] = number, iou
    return best


def random_boxes(number: int, size: float, *, smallest: float = 1) -> list[list[float]]:
    """Return boxes with corners in quarters of a pixel, which floats represent exactly."""
    corners = torch.rand(number, 2) * size
    sides = torch.rand(number, 2) ** 2 * size + smallest
    return ((torch.cat([corners, corners + sides], dim=1) * 4).round() / 4).tolist()


LEVELS = [(8, 9, 12), (16, 5, 6), (32, 3, 3)]
ASSIGNMENTS: dict[str, tuple[Callable[[], list[list[float]]], list[tuple[int, int, int]]]] = {
    "random": (lambda: random_boxes(8, 70), LEVELS),
    "crowd": (lambda: [b for b in random_boxes(9, 12, smallest=20) for _ in range(2)], LEVELS),
    "on the grid, with equal distances": (
        lambda: [[8, 8, 40, 40], [4, 4, 20, 20], [0, 0, 96, 72], [62, 20, 82, 28]],
        LEVELS,
    ),
    "tiny": (lambda: [[15.75, 15.75, 16.25, 16.25], [33, 33, 34, 34], [7, 7, 9, 9]], LEVELS),
    "one feature map": (lambda: random_boxes(5, 60), [(8, 8, 8)]),
    "all candidates alike": (lambda: [[30, 30, 34, 34], [20, 20, 29, 29]], [(8, 8, 8)]),
    "one location": (lambda: [[-20, -20, 20, 20], [1, 1, 20, 20]], [(128, 1, 1)]),
    "outside": (lambda: [[500, 500, 600, 600], [-9, -9, -1, -1]], LEVELS),
}


@pytest.mark.parametrize("topk", [1, 9])
@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_atss_against_exact_numbers(case: str, topk: int) -> None:
    torch.manual_seed(0)
    make, shapes = ASSIGNMENTS[case]
    boxes = make()
    expected = slow_atss(boxes, shapes, topk)
    quality, index = match_adaptively(torch.tensor(boxes), make_cells(shapes), topk).max(dim=0)
    assert quality.shape == (len(expected),)
    for value, number, wanted in zip(quality.tolist(), index.tolist(), expected, strict=True):
        if wanted is None:
            assert value == 0
        else:
            assert number == wanted[0]
            assert value == pytest.approx(1 + float(wanted[1]), abs=1e-12)
    assert any(expected) == (case != "outside")


def test_assignment_of_images() -> None:
    """Check classes and boxes of several images, of which one has no objects."""
    model = build_gfl()
    shapes = [(9, 12), (5, 6), (3, 3), (2, 2), (1, 1)]
    anchors = model.anchor_generator([torch.empty(1, 1, *shape) for shape in shapes])
    boxes = [[4.0, 4.0, 60.0, 50.0], [40.0, 8.0, 90.0, 70.0]]
    images = [Instances((72, 96)) for _ in range(2)]
    for image, own in zip(images, (boxes, []), strict=True):
        image.gt_boxes = Boxes(torch.tensor(own).reshape(-1, 4))
        image.gt_classes = torch.tensor([2, 0])[: len(own)]
    labels, matched = model.label_anchors(anchors, images)
    quality, index = match_adaptively(torch.tensor(boxes), [a.tensor for a in anchors]).max(dim=0)
    found = quality > 0
    assert 0 < found.sum() < len(found)
    assert torch.equal(labels[0], torch.where(found, torch.tensor([2, 0])[index], CLASSES))
    assert torch.equal(matched[0][found], torch.tensor(boxes)[index][found])
    assert (labels[1] == CLASSES).all()


# Losses -------------------------------------------------------------------------------------------


def test_quality_focal_loss_of_sharp_scores_is_focal_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 4, dtype=torch.float64) * 5
    labels = (torch.rand(50, 4) < 0.3).double()
    for beta in (1.5, 2.0):
        expected = sigmoid_focal_loss(logits, labels, alpha=-1, gamma=beta)
        torch.testing.assert_close(quality_focal_loss(logits, labels, beta), expected)


def test_quality_focal_loss_is_zero_at_the_quality() -> None:
    quality = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    logits = quality.logit().requires_grad_()
    loss = quality_focal_loss(logits, quality)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    torch.testing.assert_close(grad, torch.zeros_like(grad))


@pytest.mark.parametrize(
    ("distance", "weights"),
    [
        (0.0, [1, 0, 0, 0, 0]),
        (1.25, [0, 0.75, 0.25, 0, 0]),
        (3.0, [0, 0, 0, 1, 0]),
        (4.0, [0, 0, 0, 0, 1]),
        (7.5, [0, 0, 0, 0, 1]),  # beyond the largest distance of a distribution
        (-0.5, [1, 0, 0, 0, 0]),
    ],
)
def test_distribution_focal_loss_has_its_minimum_at_the_distance(
    distance: float, weights: list[float]
) -> None:
    """Compare with the gradient of a cross-entropy, which is softmax minus weights."""
    torch.manual_seed(0)
    logits = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    loss = distribution_focal_loss(logits, torch.tensor([distance], dtype=torch.float64))
    wanted = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(loss, -(wanted * logits.log_softmax(dim=1)).sum(dim=1))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(grad[0], logits.softmax(dim=1)[0] - wanted)


def slow_sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x) for x in logits]
    return [p / sum(powers) for p in powers]


def slow_box(cell: list[float], logits: list[float]) -> list[float]:
    bins, stride = REG_MAX + 1, cell[2] - cell[0]
    x, y = (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2
    left, top, right, bottom = (
        stride * sum(i * p for i, p in enumerate(slow_softmax(logits[k * bins : (k + 1) * bins])))
        for k in range(4)
    )
    return [x - left, y - top, x + right, y + bottom]


def slow_overlap(a: list[float], b: list[float]) -> tuple[float, float]:
    """Return IoU and GIoU."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union, width * height / union - (hull - union) / hull


Case = dict[str, list]


def slow_losses(
    case: Case, logits: list, distributions: list, constants: list | None = None
) -> tuple[list[float], list[tuple[float, float]]]:
    """Return the three losses with beta 1.5, and the quality and weight of each positive location.

    Quality and weight have no gradient. ``constants`` replaces them by those of another network.
    """
    positives, fixed = 0, []
    class_loss = box_loss = distribution_loss = total = 0.0
    for n, r in product(range(len(case["labels"])), range(len(case["anchors"]))):
        label, box, cell = case["labels"][n][r], case["boxes"][n][r], case["anchors"][r]
        quality = 0.0
        if label < CLASSES:
            predicted = slow_box(cell, distributions[n][r])
            iou, giou = slow_overlap(predicted, box)
            weight = slow_sigmoid(max(logits[n][r]))
            quality, weight = (iou, weight) if constants is None else constants[positives]
            fixed.append((quality, weight))
            positives += 1
            total += weight
            box_loss += weight * (1 - giou)
            stride, x, y = cell[2] - cell[0], (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2
            for k, side in enumerate((x - box[0], y - box[1], box[2] - x, box[3] - y)):
                distance = min(side / stride, REG_MAX)
                p = slow_softmax(distributions[n][r][k * (REG_MAX + 1) : (k + 1) * (REG_MAX + 1)])
                for i, probability in enumerate(p):
                    share = max(0.0, 1 - abs(i - distance))
                    distribution_loss -= weight * share * math.log(probability) / 4
        for c in range(CLASSES):
            s, y = slow_sigmoid(logits[n][r][c]), quality if c == label else 0.0
            entropy = -y * math.log(s) - (1 - y) * math.log(1 - s)
            class_loss += abs(s - y) ** 1.5 * entropy
    normalizer = 0.9 * 300 + 0.1 * max(positives, 1)
    total = max(total, 1)
    losses = [class_loss / normalizer, 2 * box_loss / total, distribution_loss / total / 4]
    return losses, fixed


def make_case(kind: str) -> Case:
    """Return two images, each with four locations of stride 8 and one location of stride 16."""
    centers = [(0, 0, 8), (8, 0, 8), (0, 8, 8), (8, 8, 8), (16, 16, 16)]
    anchors = [[x - s / 2, y - s / 2, x + s / 2, y + s / 2] for x, y, s in centers]
    labels = {
        "random": [[0, 3, 2, 2, 1], [3, 1, 3, 0, 3]],
        "no objects": [[3] * 5] * 2,
        "one object": [[3] * 5, [3, 3, 3, 3, 0]],
        "objects everywhere": [[1] * 5, [0, 1, 2, 1, 0]],
    }[kind]
    reach = torch.rand(2, 5, 4, dtype=torch.float64) * 40 + 1  # some are greater than 4 strides
    boxes = [
        [[x - a, y - b, x + c, y + d] for (x, y, _), (a, b, c, d) in zip(centers, own, strict=True)]
        for own in reach.tolist()
    ]
    return {"anchors": anchors, "labels": labels, "boxes": boxes}


@pytest.mark.parametrize("kind", ["random", "no objects", "one object", "objects everywhere"])
def test_losses_and_gradients_against_loops(kind: str) -> None:
    model = build_gfl(LOSS_GAMMA=1.5)
    case = make_case(kind)
    logits = torch.randn(2, 5, CLASSES, dtype=torch.float64, requires_grad=True)
    shape = (2, 5, 4 * (REG_MAX + 1))
    distributions = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with EventStorage() as storage:
        losses = model.gfl_losses(
            torch.tensor(case["anchors"], dtype=torch.float64),
            logits,
            distributions,
            torch.tensor(case["labels"]),
            torch.tensor(case["boxes"], dtype=torch.float64),
        )
    positive = sum(label != CLASSES for labels in case["labels"] for label in labels)
    assert storage.latest()["num_pos_anchors"] == (positive / 2, 0)  # per image
    assert list(losses) == ["loss_gfl_cls", "loss_gfl_loc", "loss_gfl_dfl"]
    values = (logits.tolist(), distributions.tolist())
    expected, constants = slow_losses(case, *values)
    assert [loss.item() for loss in losses.values()] == pytest.approx(expected, rel=1e-6)

    sum(losses.values()).backward()
    for tensor, nested in zip((logits, distributions), values, strict=True):
        for n, r, k in [(0, 0, 0), (0, 1, 1), (0, 3, 2), (0, 4, 1), (1, 1, 0), (1, 4, 2)]:
            ends = []
            for step in (1e-5, -1e-5):
                nested[n][r][k] += step
                ends.append(sum(slow_losses(case, *values, constants)[0]))
                nested[n][r][k] -= step
            slope = (ends[0] - ends[1]) / 2e-5
            assert float(tensor.grad[n, r, k]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


# The detector -------------------------------------------------------------------------------------


def test_boxes_are_expected_distances() -> None:
    torch.manual_seed(0)
    cells = torch.tensor([[-4.0, -4.0, 4.0, 4.0], [24.0, 8.0, 40.0, 24.0]])
    logits = torch.randn(2, 4 * (REG_MAX + 1)) * 3
    boxes = DistributionTransform(REG_MAX).apply_deltas(logits, cells)
    expected = [slow_box(*pair) for pair in zip(cells.tolist(), logits.tolist(), strict=True)]
    torch.testing.assert_close(boxes, torch.tensor(expected))
    with torch.autocast("cpu", torch.bfloat16):  # it would round boxes to whole pixels
        again = DistributionTransform(REG_MAX).apply_deltas(logits, cells)
    torch.testing.assert_close(again, boxes, rtol=0, atol=0)


def test_detections_against_loops() -> None:
    """Compare all detections above the threshold in two images that are padded to one size."""
    model = build_gfl(INFERENCE_TH_TEST=0.5, NMS_TH=1.0, PRE_NMS_TOPK_TEST=10**6).eval()
    model.max_detections_per_image = 10**6
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.5)
    inputs = [{"image": torch.rand(3, *size) * 255} for size in ((96, 128), (64, 96))]
    with torch.no_grad():
        results = model(inputs)
        features = model.backbone(model.preprocess_image(inputs).tensor)
        logits, distributions = model.head([features[name] for name in model.head_in_features])
    for n, result in enumerate(results):
        height, width = inputs[n]["image"].shape[1:]
        expected = []
        for stride, scores, sides in zip((8, 16, 32, 64, 128), logits, distributions, strict=True):
            for y, x in product(*map(range, scores.shape[2:])):
                cell = [stride * (v + o) for o in (0, 1) for v in (x, y)]
                x0, y0, x1, y1 = slow_box(cell, sides[n, :, y, x].tolist())
                box = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
                if box[0] < box[2] and box[1] < box[3]:
                    each = enumerate(map(slow_sigmoid, scores[n, :, y, x].tolist()))
                    expected += [(score, c, *box) for c, score in each if score > 0.5]
        found = result["instances"]
        rows = [
            (score, c, *box)
            for score, c, box in zip(
                found.scores.tolist(),
                found.pred_classes.tolist(),
                found.pred_boxes.tensor.tolist(),
                strict=True,
            )
        ]
        assert len(rows) == len(expected) > 20
        for row, wanted in zip(sorted(rows), sorted(expected), strict=True):
            assert row == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
def test_it_can_overfit_one_image() -> None:
    """Train on one image until both objects are found with high scores."""
    model = build_gfl(REG_MAX=16)
    inputs = [sample()]
    inputs[0]["instances"].gt_classes = torch.tensor([2, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with EventStorage():
        for _ in range(60):
            loss = sum(model(inputs).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = model.eval()(inputs)[0]["instances"]
    assert found.scores.min() > 0.9  # the default threshold is 0.2
    wanted = dict(zip([2, 0], inputs[0]["instances"].gt_boxes.tensor, strict=True))
    assert sorted(found.pred_classes.tolist()) == [0, 2]
    for label, box in zip(found.pred_classes.tolist(), found.pred_boxes, strict=True):
        assert (box - wanted[label]).abs().max() < 4


def test_keys_reach_the_network() -> None:
    """Check that assignment and losses can be chosen separately."""
    center = build_gfl(ASSIGNMENT="center")
    assert center.head.bbox_pred.out_channels == 4 * (REG_MAX + 1)
    assert (center.assignment, center.learns_distributions) == ("center", True)
    atss = build_gfl(LOSSES="fcos")
    assert atss.head.bbox_pred.out_channels == 4
    assert (atss.assignment, atss.learns_distributions) == ("atss", False)
    anchors = [Boxes(cells) for cells in make_cells(LEVELS)]
    boxes = Boxes(torch.tensor(random_boxes(8, 70)))
    assert not torch.equal(*(m._match_anchors(boxes, anchors) > 0 for m in (center, atss)))
    with EventStorage():
        assert "loss_fcos_ctr" in atss([sample() | {"instances": sample()["instances"][:0]}])
