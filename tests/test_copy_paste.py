# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: NPY002 (augmentations draw from the global generator)
"""Copy-paste augmentation, compared with loops over pixels, and in the loaders of a training."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from engine_runs import FASTER_RCNN, MASK_RCNN, launch, tiny_config
from omegaconf import OmegaConf
from torch import Tensor

from vovnet_d2.data.copy_paste import CopyPaste, paste_objects
from vovnet_d2.data.stream import TrainingStream
from vovnet_d2.data.unreadable import ReadableOnly
from vovnet_d2.engine import Trainer
from vovnet_d2.engine.hooks import UnreadableCount
from vovnet_d2.engine.lazy import LazyTrainer
from vovnet_d2.engine.lazy_config import load_lazy_config, to_cfg
from vovnet_d2.engine.run_checks import check_config

pytest_plugins = ["engine_fixtures"]

LAZY = "lazy/COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.py"


def make_sample(masks: Tensor, value: int = 0, **more: Any) -> dict[str, Any]:
    """Return a sample with these masks. Pixels count up from ``value``, and classes from 0."""
    size = tuple(masks.shape[1:])
    pixels = (torch.arange(3 * size[0] * size[1]) + value) % 256
    instances = Instances(size)
    instances.gt_masks = BitMasks(masks)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.arange(len(masks))
    return {"image": pixels.reshape(3, *size).to(torch.uint8), "instances": instances, **more}


def random_masks(number: int, height: int, width: int) -> Tensor:
    """Return rectangles with holes. Some of them overlap."""
    masks = torch.zeros(number, height, width, dtype=torch.bool)
    for mask in masks:
        y, x = np.random.randint(height - 1), np.random.randint(width - 1)
        mask[y : y + np.random.randint(2, 9), x : x + np.random.randint(2, 9)] = True
        mask &= torch.rand(height, width) < 0.8
        mask[y, x] = True
    return masks


def slow_paste(
    sample: dict, other: dict, chosen: list[int], share: float
) -> tuple[np.ndarray, list[tuple[int, set[tuple[int, int]]]]]:
    """Return the image, and the class and pixel positions of each object."""

    def places(owner: dict, index: int) -> set[tuple[int, int]]:
        return {tuple(p) for p in owner["instances"].gt_masks.tensor[index].nonzero().tolist()}

    image = sample["image"].numpy().copy()
    height, width = image.shape[1:]
    pasted, cover = [], set()
    for index in chosen:
        whole = places(other, index)
        seen = {(y, x) for y, x in whole if y < height and x < width}
        if seen and len(seen) >= share * len(whole):
            pasted.append((index, seen))
            cover |= seen
    for y, x in cover:
        image[:, y, x] = other["image"][:, y, x]
    objects = []
    for index in range(len(sample["instances"])):
        whole = places(sample, index)
        if whole - cover and len(whole - cover) >= share * len(whole):
            objects.append((index, whole - cover))
    return image, objects + pasted


@pytest.mark.parametrize("size", [(20, 30), (12, 30), (26, 14)], ids=["same", "lower", "narrower"])
@pytest.mark.parametrize("numbers", [(4, 4), (0, 3), (5, 1)])
def test_result_equals_loops_over_pixels(size: tuple[int, int], numbers: tuple[int, int]) -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    seen = 0
    for _ in range(10):
        sample = make_sample(random_masks(numbers[0], *size), image_id=7)
        other = make_sample(random_masks(numbers[1], 20, 30), 100, image_id=8)
        before = copy.deepcopy(sample)
        chosen = torch.randperm(numbers[1])[: np.random.randint(1, numbers[1] + 1)]
        found = paste_objects(sample, other, chosen, min_visible=0.3)
        image, objects = slow_paste(sample, other, chosen.tolist(), 0.3)
        assert found.keys() == sample.keys()
        assert found["image_id"] == 7
        assert np.array_equal(found["image"].numpy(), image)
        instances = found["instances"]
        assert instances.image_size == size
        assert instances.gt_classes.tolist() == [index for index, _ in objects]
        for mask, box, (_, places) in zip(
            instances.gt_masks.tensor, instances.gt_boxes.tensor.tolist(), objects, strict=True
        ):
            assert {tuple(p) for p in mask.nonzero().tolist()} == places
            ys, xs = zip(*places, strict=True)
            assert box == [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
        seen += len(objects)
        assert torch.equal(sample["image"], before["image"])  # the input is not changed
        assert torch.equal(sample["instances"].gt_masks.tensor, before["instances"].gt_masks.tensor)
    assert seen > 5


@pytest.mark.parametrize(("visible", "kept"), [(9, False), (10, True), (0, False)])
def test_the_least_visible_share(visible: int, kept: bool) -> None:
    """Check the limit of 10 of 100 pixels, for covered objects and at the border of the image."""
    masks = torch.zeros(1, 20, 100, dtype=torch.bool)
    masks[0, 3] = True
    cover = masks.clone()
    cover[0, 3, :visible] = False
    found = paste_objects(make_sample(masks), make_sample(cover), torch.tensor([0]))
    assert len(found["instances"]) == 1 + kept
    narrow = make_sample(torch.zeros(0, 20, max(visible, 1), dtype=torch.bool))
    if not visible:
        masks[0, 3, 0] = False
    found = paste_objects(narrow, make_sample(masks), torch.tensor([0]))
    assert len(found["instances"]) == kept
    assert torch.equal(found["image"], narrow["image"]) != kept


def test_polygons_and_images_without_objects() -> None:
    """Paste polygons. The results are bitmasks, because a cut polygon may not be a polygon."""
    square = PolygonMasks([[np.array([2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0])]])
    sample = make_sample(torch.zeros(0, 20, 30, dtype=torch.bool))
    for name in ("gt_masks", "gt_boxes", "gt_classes"):
        sample["instances"].remove(name)  # as in Detectron2's samples without annotations
    sample["instances"].gt_boxes = Boxes(torch.zeros(0, 4))
    sample["instances"].gt_classes = torch.zeros(0, dtype=torch.int64)
    other = make_sample(torch.zeros(1, 20, 30, dtype=torch.bool), 50)
    other["instances"].gt_masks = square
    found = paste_objects(sample, other, torch.tensor([0]))["instances"]
    assert found.gt_boxes.tensor.tolist() == [[2, 2, 10, 10]]
    assert found.gt_masks.tensor.sum() == 64
    nothing = make_sample(torch.zeros(1, 20, 30, dtype=torch.bool))  # an object without pixels
    assert len(paste_objects(nothing, nothing, torch.tensor([0]))["instances"]) == 0
    corner = torch.zeros(1, 20, 30, dtype=torch.bool)
    corner[0, 2:6, 2:10] = True
    found = paste_objects(other, make_sample(corner), torch.tensor([0]))["instances"]
    assert found.gt_boxes.tensor.tolist() == [[2, 6, 10, 10], [2, 2, 10, 6]]


def test_how_often_objects_are_pasted() -> None:
    """Check the share of images with pasted objects, and the numbers of objects."""
    np.random.seed(0)
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[range(4), range(4), range(4)] = True
    samples = {"target": make_sample(masks[:0]), "source": make_sample(masks)}
    mapper = CopyPaste(samples.__getitem__, ["source"], 0.75)
    numbers = [len(mapper("target")["instances"]) for _ in range(2000)]
    assert np.bincount(numbers) == pytest.approx([500] + [375] * 4, abs=75)
    classes = [c for _ in range(500) for c in mapper("target")["instances"].gt_classes.tolist()]
    assert np.bincount(classes) == pytest.approx([len(classes) / 4] * 4, rel=0.15)


def test_images_that_cannot_be_read() -> None:
    masks = torch.ones(1, 4, 4, dtype=torch.bool)
    samples = {"good": make_sample(masks), "empty": make_sample(masks[:0]), "bad": None}
    assert CopyPaste(samples.get, ["good"], 1.0)("bad") is None
    for other in ("bad", "empty"):
        assert CopyPaste(samples.get, [other], 1.0)("good") is samples["good"]


def test_images_that_cannot_be_read_are_counted() -> None:
    readable = type("TwoLeftOut", (ReadableOnly,), {"count": 2})(lambda record: record)
    loader = TrainingStream.__new__(TrainingStream)
    loader.mapper = CopyPaste(readable, [], 1.0)
    hook = UnreadableCount()
    with EventStorage() as storage:
        steps = SimpleNamespace(data_loader=loader)
        hook.trainer = SimpleNamespace(_trainer=steps, storage=storage)
        hook.after_step()
        assert storage.latest()["unreadable_images"][0] == 2


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"INPUT.COPY_PASTE is 1.5: give a probability"):
        CopyPaste(dict, [], 1.5)
    sample = make_sample(torch.ones(1, 4, 4, dtype=torch.bool))
    sample["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match=r"gt_masks, and these have gt_boxes, gt_classes: train"):
        paste_objects(sample, sample, torch.tensor([0]))
    cfg = tiny_config(FASTER_RCNN, tmp_path, "INPUT.COPY_PASTE", "0.5")
    check_config(cfg, training=False)
    with pytest.raises(ValueError, match=r"INPUT.COPY_PASTE 0.5 pastes .* MODEL.MASK_ON True"):
        check_config(cfg, training=True)


def first_samples(trainer: type[Trainer], cfg: Any, number: int) -> list[dict[str, Any]]:
    loader = iter(trainer.build_train_loader(cfg))
    return [sample for _ in range(number) for sample in next(loader)]


@pytest.mark.parametrize("lazy", [False, True])
def test_loaders(coco: Path, tmp_path: Path, lazy: bool) -> None:
    """Check that samples are the same in each run, and have more objects with tight boxes."""
    found = {}
    for probability in (0.0, 1.0):
        if lazy:
            config = load_lazy_config(LAZY, ["dataloader.train.num_workers=0"])
            OmegaConf.update(config, "dataloader.train.total_batch_size", 2)
            OmegaConf.update(config, "dataloader.train.copy_paste", probability, force_add=True)
            trainer, cfg = LazyTrainer.of(config), to_cfg(config)
            assert probability == cfg.INPUT.COPY_PASTE
        else:
            trainer = Trainer
            cfg = tiny_config(MASK_RCNN, tmp_path, "INPUT.COPY_PASTE", str(probability))
        found[probability], again = (first_samples(trainer, cfg, 3) for _ in range(2))
        for a, b in zip(found[probability], again, strict=True):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
    plain, pasted = found.values()
    assert [s["file_name"] for s in plain] == [s["file_name"] for s in pasted]
    counts = [sum(len(s["instances"]) for s in samples) for samples in (plain, pasted)]
    assert counts[1] > counts[0]
    changed = [s for s in pasted if isinstance(s["instances"].gt_masks, BitMasks)]
    assert changed
    for sample in changed:
        instances = sample["instances"]
        bounds = instances.gt_masks.get_bounding_boxes()
        assert torch.equal(instances.gt_boxes.tensor, bounds.tensor)
        assert instances.image_size == sample["image"].shape[1:]


def test_a_training_takes_images_with_and_without_pasted_objects(
    coco: Path, tmp_path: Path
) -> None:
    """Train on batches in which some masks are polygons and some are bitmasks."""
    launch(MASK_RCNN, tmp_path, "INPUT.COPY_PASTE", "0.5", "DATASETS.TEST", "()")
    lines = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    losses = [line["loss_mask"] for line in lines if "loss_mask" in line]
    assert losses
    assert all(0 < loss < 10 for loss in losses)
