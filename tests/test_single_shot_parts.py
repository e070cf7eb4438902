# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Anchors, coding, matching, mining, losses and the selection of detections are compared with plain
loops."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vovnet_d2.engine import load_config
from vovnet_d2.modeling.single_shot import matching
from vovnet_d2.modeling.single_shot.anchors import SSDAnchorGenerator
from vovnet_d2.modeling.single_shot.detections import select_detections
from vovnet_d2.modeling.single_shot.losses import mine_hard_negatives, single_shot_losses
from vovnet_d2.modeling.single_shot.matching import (
    BACKGROUND,
    IGNORED,
    assign_targets,
    match_anchors,
)

Box = list[float]


def slow_iou(a: Box, b: Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if width * height > 0 else 0.0


def slow_encode(anchor: Box, box: Box) -> list[float]:
    """Encode boxes by centre and size as in SSD, with variances 0.1 and 0.2."""
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    dx = (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / w
    dy = (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / h
    dw, dh = math.log((box[2] - box[0]) / w), math.log((box[3] - box[1]) / h)
    return [dx / 0.1, dy / 0.1, dw / 0.2, dh / 0.2]


def slow_match(objects: list[Box], anchors: list[Box], negative: float, positive: float):
    iou = [[slow_iou(o, a) for a in anchors] for o in objects]
    result = [None] * len(anchors)
    taken: set[int] = set()
    while True:
        best = (1e-6, -1, -1)
        for i, j in itertools.product(range(len(objects)), range(len(anchors))):
            if i not in taken and result[j] is None and iou[i][j] > best[0]:
                best = (iou[i][j], i, j)
        if best[1] < 0:
            break
        taken.add(best[1])
        result[best[2]] = best[1]
    for j in range(len(anchors)):
        if result[j] is None:
            column = [row[j] for row in iou]
            top = max(column, default=0.0)
            if column and top >= positive:
                result[j] = column.index(top)
            else:
                result[j] = BACKGROUND if top < negative else IGNORED
    return result


def random_boxes(number: int, size: float = 100.0, grid: float = 0.0) -> Tensor:
    """Return random boxes. ``grid`` rounds to its multiples, so that overlaps are often equal."""
    corners = torch.rand(number, 2, dtype=torch.float64) * size
    sides = torch.rand(number, 2, dtype=torch.float64) * size / 2 + 4
    boxes = torch.cat([corners, corners + sides], dim=1)
    if grid:
        boxes = (boxes / grid).round() * grid
        boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + grid)
    return boxes


def instances(boxes: Tensor, classes: list[int]) -> Instances:
    return Instances(
        (100, 100),
        gt_boxes=Boxes(boxes.reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


# Anchors ------------------------------------------------------------------------------------------

REFINEDET = "COCO-Detection/refinedet320_V_39_400k.yaml"
DSOD = "PascalVOC-Detection/dsod300_V_27_slim_100k.yaml"


def make_anchors(config: str, maps: list[tuple[int, int]], strides: list[int]) -> Tensor:
    from detectron2.layers import ShapeSpec

    generator = build_anchor_generator(load_config(config), [ShapeSpec(stride=s) for s in strides])
    features = [torch.empty(1, 1, *size) for size in maps]
    return Boxes.cat(generator(features)).tensor


@pytest.mark.parametrize(("side", "number"), [(320, 6375), (512, 16320)])
def test_refinedet_anchors(side: int, number: int) -> None:
    strides = [8, 16, 32, 64]
    anchors = make_anchors(REFINEDET, [(side // s,) * 2 for s in strides], strides)
    expected = []
    for stride, size in zip(strides, (32, 64, 128, 256), strict=True):
        for y, x in itertools.product(range(side // stride), repeat=2):
            for ratio in (1, 2, 0.5):
                w, h = size * math.sqrt(ratio), size / math.sqrt(ratio)
                cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
                expected.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    assert len(expected) == number
    assert torch.allclose(anchors, torch.tensor(expected), atol=1e-3)


@pytest.mark.parametrize(
    ("sides", "number"),
    [((37, 18, 9, 5, 3, 2), 8108), ((38, 19, 10, 5, 3, 2), 8744)],
    ids=["VoVNet", "DenseNet-67"],
)
def test_dsod_anchors(sides: tuple[int, ...], number: int) -> None:
    anchors = make_anchors(DSOD, [(side, side) for side in sides], [8, 16, 32, 64, 128, 256])
    limits = (30, 60, 111, 162, 213, 264, 315)
    ratios = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    expected = []
    for level, (side, step) in enumerate(zip(sides, (8, 16, 32, 64, 100, 300), strict=True)):
        low, high = limits[level : level + 2]
        for y, x in itertools.product(range(side), repeat=2):
            shapes = [(low, low), ((low * high) ** 0.5,) * 2]
            for r in ratios[level]:
                shapes += [(low * r**0.5, low / r**0.5), (low / r**0.5, low * r**0.5)]
            for w, h in shapes:
                cx, cy = (x + 0.5) * step, (y + 0.5) * step
                expected.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    assert len(expected) == number
    assert torch.allclose(anchors, torch.tensor(expected), atol=1e-3)


def test_anchors_without_second_size() -> None:
    generator = SSDAnchorGenerator(sizes=[[60]], aspect_ratios=[[2]], strides=[16])
    assert generator.num_anchors == [3]


def test_anchors_of_a_feature_map_that_is_used_twice() -> None:
    twice = SSDAnchorGenerator(sizes=[[30, 60, 60, 112]], aspect_ratios=[[2, 3]], strides=[16])
    once = SSDAnchorGenerator(sizes=[[30, 60], [60, 112]], aspect_ratios=[[2, 3]], strides=[16, 16])
    assert twice.num_anchors == [12]
    (found,) = twice.cell_anchors
    assert torch.equal(found, torch.cat(list(once.cell_anchors)))


# Coding -------------------------------------------------------------------------------------------


def test_coding() -> None:
    weights = load_config(REFINEDET).MODEL.SINGLE_SHOT.BBOX_REG_WEIGHTS
    transform = Box2BoxTransform(weights=weights)
    anchors, boxes = random_boxes(50), random_boxes(50)
    deltas = transform.get_deltas(anchors, boxes)
    expected = [slow_encode(*pair) for pair in zip(anchors.tolist(), boxes.tolist(), strict=True)]
    assert torch.allclose(deltas, torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(transform.apply_deltas(deltas, anchors), boxes.float(), atol=1e-3)


# Matching -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize(("objects", "anchors"), [(1, 1), (1, 40), (7, 40), (12, 5), (0, 6)])
@pytest.mark.parametrize("grid", [0.0, 20.0], ids=["random", "ties"])
def test_matching(objects: int, anchors: int, grid: float, thresholds: tuple[float, float]) -> None:
    for _ in range(10):
        truth, own = random_boxes(objects, grid=grid), random_boxes(anchors, grid=grid)
        # Use the same numbers, because rounding must not decide between equal overlaps.
        iou = [[slow_iou(t, a) for a in own.tolist()] for t in truth.tolist()]
        overlaps = torch.tensor(iou, dtype=torch.float64).reshape(1, objects, anchors)
        found = match_anchors(overlaps, *thresholds)[0]
        assert found.tolist() == slow_match(truth.tolist(), own.tolist(), *thresholds)


def test_an_object_without_a_good_anchor_gets_the_best_one() -> None:
    iou = torch.tensor([[0.9, 0.8, 0.0], [0.2, 0.7, 0.1]])
    assert match_anchors(iou[None], 0.5, 0.5).tolist() == [[0, 1, BACKGROUND]]
    # The first object gets the anchor that is best for the second object, too.
    iou = torch.tensor([[0.9, 0.0, 0.0], [0.8, 0.1, 0.0]])
    assert match_anchors(iou[None], 0.5, 0.5).tolist() == [[0, 1, BACKGROUND]]


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operators_do_not_grow_with_objects_and_images() -> None:
    """Count operators, because each one launches a kernel on a GPU."""
    counts = []
    for images, objects in ((1, 2), (8, 50)):
        iou = torch.full((images, objects, 60), 0.01).triu().tril()
        with _Operators() as operators:
            matched = match_anchors(iou, 0.5, 0.5)
        assert (matched >= 0).sum() == images * objects
        counts.append(operators.count)
    assert counts[0] == counts[1]


def test_anchors_at_the_thresholds() -> None:
    """Check overlaps at the thresholds. Background is below the lower, objects from the upper."""
    iou = torch.tensor([[[0.875, 0.25, 0.5]]])
    assert match_anchors(iou, 0.25, 0.5).tolist() == [[0, IGNORED, 0]]


def test_an_object_without_area_has_no_match() -> None:
    anchors = random_boxes(20).float()
    truth = torch.tensor([[50.0, 50.0, 50.0, 80.0], [10.0, 10.0, 10.0, 10.0]])
    targets = assign_targets(anchors, [instances(truth, [1, 2])], (0.5, 0.5))
    assert not targets.positive.any()
    assert targets.negative.all()


@pytest.mark.parametrize("of_each_image", [False, True])
def test_many_overlaps_are_computed_in_chunks(
    of_each_image: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the size of chunks, and that an image has the same targets as alone."""
    numbers = (4, 0, 9, 2, 0, 0, 1)
    anchors = random_boxes(60)
    if of_each_image:
        anchors = torch.stack([random_boxes(60) for _ in numbers])
    images = [instances(random_boxes(n).float(), list(range(n))) for n in numbers]
    whole = assign_targets(anchors, images, (0.3, 0.6))
    sizes = []
    match = matching.match_anchors
    monkeypatch.setattr(
        matching,
        "match_anchors",
        lambda iou, *limits: sizes.append(iou.shape) or match(iou, *limits),
    )
    monkeypatch.setattr(matching, "_MAX_OVERLAPS", 2 * 9 * 60)
    found = assign_targets(anchors, images, (0.3, 0.6))
    assert sizes == [(2, 4, 60), (2, 9, 60), (2, 0, 60), (1, 1, 60)]
    for name, expected in whole._asdict().items():
        torch.testing.assert_close(getattr(found, name), expected, rtol=0, atol=0, msg=name)
    monkeypatch.setattr(matching, "_MAX_OVERLAPS", 1)
    found = assign_targets(anchors, images, (0.3, 0.6))
    assert [size[0] for size in sizes[4:]] == [1] * 7
    assert all(map(torch.equal, found, whole))


@pytest.mark.parametrize("of_each_image", [False, True])
def test_targets(of_each_image: bool) -> None:
    anchors = random_boxes(60)
    if of_each_image:
        anchors = torch.stack([anchors, random_boxes(60), random_boxes(60)])
    truths = [random_boxes(number).float() for number in (4, 0, 9)]  # the dtype of Boxes
    labels = [[3, 1, 2, 0], [], list(range(9))]
    images = [instances(t, c) for t, c in zip(truths, labels, strict=True)]
    targets = assign_targets(anchors, images, (0.3, 0.6))
    for n, (truth, classes) in enumerate(zip(truths, labels, strict=True)):
        own = anchors[n] if of_each_image else anchors
        matched = slow_match(truth.tolist(), own.tolist(), 0.3, 0.6)
        for a, m in enumerate(matched):
            assert targets.positive[n, a] == (m >= 0)
            assert targets.negative[n, a] == (m == BACKGROUND)
            if m >= 0:
                assert targets.boxes[n, a].tolist() == truth[m].tolist()
                assert targets.classes[n, a] == classes[m]


# Mining and losses --------------------------------------------------------------------------------


def slow_mining(loss: list[float], positive: list[bool], candidates: list[bool], ratio: float):
    order = sorted((i for i, c in enumerate(candidates) if c), key=lambda i: -loss[i])
    chosen = set(order[: math.floor(ratio * sum(positive))])
    return [i in chosen for i in range(len(loss))]


@pytest.mark.parametrize("ratio", [3.0, 1.5, 0.0])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("digits", [None, 1], ids=["random", "ties"])
def test_mining(ratio: float, share: float, digits: int | None) -> None:
    loss = torch.rand(5, 40)
    loss = loss if digits is None else loss.round(decimals=digits)
    positive = torch.rand(5, 40) < share
    candidates = ~positive & (torch.rand(5, 40) < 0.6)
    chosen = mine_hard_negatives(loss, positive, candidates, ratio)
    rows = zip(loss.tolist(), positive.tolist(), candidates.tolist(), strict=True)
    assert chosen.tolist() == [slow_mining(*row, ratio) for row in rows]


def slow_losses(logits, deltas, anchors, truths, labels, ratio, thresholds, excluded=None):
    """Sum the losses over images and anchors."""
    classes = boxes = positives = 0
    for n, own in enumerate(anchors):
        matched = slow_match(truths[n], own, *thresholds)
        entropy = []
        for a, m in enumerate(matched):
            exps = [math.exp(v) for v in logits[n][a]]
            target = labels[n][m] if m >= 0 else len(exps) - 1
            entropy.append(-math.log(exps[target] / sum(exps)))
        positive = [m >= 0 for m in matched]
        candidates = [
            m == BACKGROUND and not (excluded and excluded[n][a]) for a, m in enumerate(matched)
        ]
        # The cross-entropy of a candidate is that of background.
        mined = slow_mining(entropy, positive, candidates, ratio)
        classes += sum(e for e, p, q in zip(entropy, positive, mined, strict=True) if p or q)
        positives += sum(positive)
        for a, m in enumerate(matched):
            if m >= 0:
                wanted = slow_encode(own[a], truths[n][m])
                for d, w in zip(deltas[n][a], wanted, strict=True):
                    diff = abs(d - w)
                    boxes += diff**2 / 2 if diff < 1 else diff - 0.5
    return classes / max(1, positives), boxes / max(1, positives)


@pytest.mark.parametrize("numbers", [(3, 0, 6), (0, 0, 0), (1, 1, 1)])
def test_losses(numbers: tuple[int, ...]) -> None:
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    anchors = random_boxes(50)
    truths = [random_boxes(number) for number in numbers]
    labels = [[i % 4 for i in range(number)] for number in numbers]
    logits, deltas = torch.randn(3, 50, 5) * 3, torch.randn(3, 50, 4) * 2
    logits.requires_grad_()
    images = [instances(t, c) for t, c in zip(truths, labels, strict=True)]
    losses = single_shot_losses(
        logits,
        deltas,
        anchors,
        assign_targets(anchors, images, (0.5, 0.5)),
        box2box_transform=transform,
        negative_ratio=3.0,
    )
    expected = slow_losses(
        logits.tolist(),
        deltas.tolist(),
        [anchors.tolist()] * 3,
        [t.tolist() for t in truths],
        labels,
        3.0,
        (0.5, 0.5),
    )
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)
    losses[0].backward()
    for n, number in enumerate(numbers):
        assert logits.grad[n].any() == (number > 0)  # an image without objects has no gradient


# Detections ---------------------------------------------------------------------------------------


def slow_detections(boxes, scores, threshold, topk, nms, most):
    kept = []
    for label in range(len(scores[0])):
        own = [(row[label], i) for i, row in enumerate(scores)]
        own = [item for item in sorted(own, reverse=True)[:topk] if item[0] > threshold]
        chosen: list[tuple[float, int]] = []
        for score, i in own:
            if all(slow_iou(boxes[i], boxes[j]) <= nms for _, j in chosen):
                chosen.append((score, i))
        kept += [(score, i, label) for score, i in chosen]
    return sorted(kept, reverse=True)[:most]


@pytest.mark.parametrize(("topk", "most"), [(1000, 500), (10, 500), (1000, 7)])
@pytest.mark.parametrize("threshold", [0.3, 2.0], ids=["some", "none"])
def test_detections(topk: int, most: int, threshold: float) -> None:
    boxes, scores = random_boxes(60).float(), torch.rand(60, 3)
    found = select_detections(
        boxes,
        scores,
        (100, 120),
        score_threshold=threshold,
        topk_candidates=topk,
        nms_threshold=0.45,
        max_detections=most,
    )
    expected = slow_detections(boxes.tolist(), scores.tolist(), threshold, topk, 0.45, most)
    assert found.image_size == (100, 120)
    assert found.pred_classes.tolist() == [label for _, _, label in expected]
    assert np.allclose(found.scores, [score for score, _, _ in expected])
    assert found.pred_boxes.tensor.tolist() == [boxes[i].tolist() for _, i, _ in expected]
    assert bool(expected) == (threshold < 1)
