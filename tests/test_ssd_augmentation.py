# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The augmentation of SSD, and the mapper that uses it."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from PIL import Image

from vovnet_d2.data.mapper import Mapper, SSDMapper, build_augmentations, build_mapper
from vovnet_d2.data.ssd_augmentation import (
    _CHANGES,
    Distort,
    Expand,
    RandomInterpolationResize,
    SamplerCrop,
    ssd_augmentations,
)
from vovnet_d2.engine import load_config

REFINEDET = "COCO-Detection/refinedet320_V_39_400k.yaml"


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3)).astype(np.uint8)


# Colours ------------------------------------------------------------------------------------------


def changed(order: str, index: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return RGB pixels from 0 to 1 before and after one change."""
    image, change = picture(8, 12), _CHANGES[index][0]
    result = Distort(order)._change([(change, factor)], image)
    assert result.dtype == np.uint8
    rgb = (x if order == "RGB" else x[..., ::-1] for x in (image, result))
    before, after = (x.reshape(-1, 3) / 255 for x in rgb)
    return before, after


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_brightness_and_contrast(order: str) -> None:
    before, after = changed(order, 0, 1.125)
    assert np.abs((before * 1.125).clip(0, 1) - after).max() < 0.01
    before, after = changed(order, 1, 0.5)
    mean = (before @ (0.2989, 0.587, 0.114)).mean()
    assert np.abs(0.5 * before + 0.5 * mean - after).max() < 0.01


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_saturation_and_hue(order: str) -> None:
    """Compare the hue with Python's colorsys."""
    before, after = changed(order, 2, 0.5)
    grey = before @ (0.2989, 0.587, 0.114)
    assert np.abs(0.5 * before + 0.5 * grey[:, None] - after).max() < 0.01
    for shift in (-0.1, 0.1):
        before, after = changed(order, 3, shift)
        for one, other in zip(before, after, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*one)
            assert np.abs(colorsys.hsv_to_rgb((h + shift) % 1, s, v) - other).max() < 0.02


# In SSD, hue changes by 18 of the 180 steps that a circle has in OpenCV.
RANGES = {
    "adjust_brightness": (0.875, 1.125),
    "adjust_contrast": (0.5, 1.5),
    "adjust_saturation": (0.5, 1.5),
    "adjust_hue": (-18 / 180, 18 / 180),
}


def test_distortion_draws_each_change_half_of_the_time() -> None:
    image, counts, orders = picture(), [], set()
    factors: dict[str, list[float]] = {name: [] for name in RANGES}
    for _ in range(400):
        (changes,) = Distort("BGR").get_transform(image).op.args
        used = [change.__name__ for change, _ in changes]
        counts.append([name in used for name in RANGES])
        for change, factor in changes:
            factors[change.__name__].append(factor)
        if len(used) == 4:
            orders.add(tuple(used))
    assert np.allclose(np.mean(counts, axis=0), 0.5, atol=0.1)
    assert {used.index("adjust_contrast") for used in orders} == {1, 3}
    for name, (low, high) in RANGES.items():  # about 200 factors each
        near = 0.1 * (high - low)
        assert low <= min(factors[name]) < low + near
        assert high - near < max(factors[name]) <= high


def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'L'.*SSD_AUGMENTATION False"):
        Distort("L")


# Geometry -----------------------------------------------------------------------------------------


def test_half_of_the_images_are_expanded() -> None:
    (expansion,) = [
        augmentation
        for augmentation in ssd_augmentations(64, (104.0, 117.0, 123.0), "BGR")
        if isinstance(augmentation, T.RandomApply)
    ]
    sizes = [expansion.get_transform(picture()).apply_image(picture()).shape for _ in range(200)]
    assert 70 < sum(size == picture().shape for size in sizes) < 130


def test_expansion() -> None:
    image, mean = picture(), (104.0, 117.0, 123.0)
    ratios, places = [], []
    for _ in range(200):
        transform = Expand(mean).get_transform(image)
        result = transform.apply_image(image)
        (left, top, right, bottom) = transform.apply_box(np.array([[0, 0, 90, 60]]))[0].astype(int)
        assert (right - left, bottom - top) == (90, 60)
        assert (result[top:bottom, left:right] == image).all()
        outside = np.ones(result.shape[:2], dtype=bool)
        outside[top:bottom, left:right] = False
        assert (result[outside] == mean).all()
        mask = transform.apply_segmentation(np.ones((60, 90), dtype=np.uint8))
        assert (mask == ~outside).all()
        assert result.shape[0] / 60 == pytest.approx(result.shape[1] / 90, abs=1 / 60)
        ratios.append(result.shape[1] / 90)
        room = np.subtract(result.shape[1::-1], (90, 60))
        places.append(np.array([left, top]) / np.maximum(room, 1))
    # The image is anywhere on the canvas, in both directions.
    assert np.mean(places, axis=0) == pytest.approx([0.5, 0.5], abs=0.08)
    assert np.max(places, axis=0) == pytest.approx([1, 1], abs=0.05)
    assert min(ratios) >= 1
    assert max(ratios) <= 4
    assert np.mean(ratios) == pytest.approx(2.5, abs=0.2)


def best_iou(crop: T.CropTransform, boxes: np.ndarray) -> float:
    """Return the best IoU by counting pixels."""
    found = []
    for left, top, right, bottom in boxes.astype(int):
        grid = np.zeros((60, 90), dtype=int)
        grid[top:bottom, left:right] += 1
        grid[crop.y0 : crop.y0 + crop.h, crop.x0 : crop.x0 + crop.w] += 2
        found.append((grid == 3).sum() / (grid > 0).sum())
    return max(found)


@pytest.mark.parametrize("min_iou", [0.1, 0.3, 0.5, 0.7, 0.9, 0.0])
def test_crop(min_iou: float) -> None:
    boxes = np.array([[10.0, 5.0, 60.0, 50.0], [0.0, 0.0, 90.0, 60.0], [80.0, 50.0, 88.0, 58.0]])
    crops = []
    for _ in range(100):
        transform = SamplerCrop(min_iou=[min_iou]).get_transform(picture(), boxes)
        if isinstance(transform, T.CropTransform):
            crops.append(transform)
    assert 25 < len(crops) < 75  # the other choice is the whole image
    for crop in crops:
        assert 0 <= crop.x0 < crop.x0 + crop.w <= 90
        assert 0 <= crop.y0 < crop.y0 + crop.h <= 60
        assert best_iou(crop, boxes) >= min_iou - 1e-9
        scale = np.sqrt(crop.w * crop.h / (90 * 60))
        ratio = (crop.w / 90) / (crop.h / 60)
        assert 0.3 - 0.02 <= scale <= 1
        assert 0.5 * 0.93 <= ratio <= 2 * 1.07  # sides are whole pixels
    if min_iou < 0.5:
        widths = [crop.w / 90 for crop in crops]
        assert min(widths) < 0.6
        assert max(widths) > 0.8


def test_crop_without_boxes_is_the_whole_image() -> None:
    for _ in range(20):
        transform = SamplerCrop().get_transform(picture(), np.zeros((0, 4)))
        assert isinstance(transform, T.NoOpTransform)


def test_crop_chooses_among_the_samplers_that_succeed() -> None:
    """Use a box that no crop overlaps by a tenth. Only random crops and the image remain."""
    boxes = np.array([[0.0, 0.0, 3.0, 3.0]])
    found = [SamplerCrop().get_transform(picture(), boxes) for _ in range(300)]
    assert np.mean([isinstance(t, T.NoOpTransform) for t in found]) == pytest.approx(0.5, abs=0.1)


def test_resize_takes_every_interpolation() -> None:
    image = picture()
    resize = RandomInterpolationResize(32)
    found = {}
    for _ in range(100):
        transform = resize.get_transform(image)
        found[transform.interp] = transform.apply_image(image)
    assert set(found) == set(resize.METHODS)
    for method, result in found.items():
        assert (result == np.asarray(Image.fromarray(image).resize((32, 32), method))).all()


# Mapper -------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path) -> dict:
    """Return a record of an image with three rectangles and a crowd.

    The first channel has a different value in each rectangle.
    """
    image = np.zeros((120, 160, 3), dtype=np.uint8)
    boxes = [[8, 8, 60, 70], [70, 20, 150, 60], [90, 80, 120, 110]]
    for value, (left, top, right, bottom) in enumerate(boxes, start=1):
        image[top:bottom, left:right] = 80 * value
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    annotations = [
        {
            "bbox": [left, top, right - left, bottom - top],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": i,
            "iscrowd": 0,
            "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
        }
        for i, (left, top, right, bottom) in enumerate(boxes)
    ]
    crowd = {**annotations[0], "bbox": [0, 0, 160, 120], "iscrowd": 1, "category_id": 7}
    return {
        "file_name": str(path),
        "height": 120,
        "width": 160,
        "annotations": [*annotations, crowd],
    }


def mapper(*augmentations: T.Augmentation, mask_format: str = "bitmask") -> SSDMapper:
    return SSDMapper(
        True,
        augmentations=list(augmentations),
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format=mask_format,
    )


@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_boxes_and_masks_follow_the_image(record: dict, mask_format: str) -> None:
    """Compare boxes and masks with the pixels after expansion, crop and mirroring."""
    transform = mapper(
        Expand((250.0, 250.0, 250.0)), SamplerCrop(), T.RandomFlip(), mask_format=mask_format
    )
    seen = np.zeros(4, dtype=int)
    for _ in range(60):
        result = transform(record)
        pixels, objects = result["image"][0].numpy(), result["instances"]
        assert not (objects.gt_classes == 7).any()
        seen[len(objects)] += 1
        if mask_format == "polygon" and len(objects):
            objects.gt_masks = polygons_to_bitmasks(objects.gt_masks, pixels.shape)
        for i, label in enumerate(objects.gt_classes.tolist()):
            drawn = pixels == 80 * (label + 1)
            rows, columns = drawn.nonzero()
            visible = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert objects.gt_boxes.tensor[i].tolist() == visible
            mask = objects.gt_masks[i]
            mask = mask.tensor[0].numpy() if mask_format == "bitmask" else mask
            assert (mask == drawn).all()
        left = set(range(3)) - set(objects.gt_classes.tolist())
        for label in left:  # the centers of dropped objects are outside
            whole = [52 * 62, 80 * 40, 30 * 30][label]
            assert (pixels == 80 * (label + 1)).sum() <= whole / 2
    assert seen[1:].all()


def polygons_to_bitmasks(masks, shape) -> list[np.ndarray]:
    from pycocotools import mask as coco

    result = []
    for polygons in masks.polygons:
        rles = coco.frPyObjects([p.tolist() for p in polygons], *shape)
        result.append(coco.decode(coco.merge(rles)).astype(bool))
    return result


def test_boxes_with_their_center_outside_are_dropped(record: dict) -> None:
    class Crop(T.Augmentation):
        def get_transform(self, image: np.ndarray) -> T.Transform:
            return T.CropTransform(40, 0, 70, 120, 160, 120)

    result = mapper(Crop())(record)["instances"]
    # The centers are at x = 34, 110 (on the edge) and 105.
    assert result.gt_classes.tolist() == [2]
    assert result.gt_boxes.tensor.tolist() == [[50, 80, 70, 110]]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_result_depends_on_the_seed_only(record: dict, seed: int) -> None:
    build = build_mapper(load_config(REFINEDET), True)

    def run(seed: int) -> list[torch.Tensor]:
        seed_all_rng(seed)
        return [build(record)["image"] for _ in range(3)]

    first, again, other = run(seed), run(seed), run(seed + 10)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_config_chooses_the_mapper(record: dict) -> None:
    cfg = load_config(REFINEDET)
    train, test = build_mapper(cfg, True), build_mapper(cfg, False)
    kinds = [type(a) for a in build_augmentations(cfg, True)]
    assert kinds == [Distort, T.RandomApply, SamplerCrop, RandomInterpolationResize, T.RandomFlip]
    assert isinstance(train, SSDMapper)
    assert not isinstance(test, SSDMapper)
    for order in ("BGR", "RGB"):
        rgb = load_config(REFINEDET, ["INPUT.FORMAT", order, "MODEL.PIXEL_MEAN", "[1, 2, 3]"])
        distort, expand, *_ = build_augmentations(rgb, True)
        assert (distort.image_format, expand.aug.fill) == (order, [1, 2, 3])
    for each in (train, test):
        assert each(record)["image"].shape == (3, 320, 320)
    expected = Image.open(record["file_name"]).resize((320, 320), Image.Resampling.BILINEAR)
    expected = np.asarray(expected)[..., ::-1].transpose(2, 0, 1)
    assert (test(record)["image"].numpy() == expected).all()

    cfg.INPUT.RANDOM_FLIP = "none"
    assert not any(isinstance(a, T.RandomFlip) for a in build_augmentations(cfg, True))
    cfg.INPUT.SSD_AUGMENTATION = False
    assert type(build_mapper(cfg, True)) is Mapper
    assert build_mapper(cfg, True)(record)["image"].shape == (3, 320, 320)
    cfg.INPUT.FIXED_SIZE = 0
    resize = build_augmentations(cfg, False)
    assert len(resize) == 1
    assert isinstance(resize[0], T.ResizeShortestEdge)


def test_ssd_augmentation_needs_a_size() -> None:
    cfg = load_config(REFINEDET, ["INPUT.FIXED_SIZE", "0"])
    with pytest.raises(ValueError, match=r"INPUT\.FIXED_SIZE"):
        build_mapper(cfg, True)
    build_mapper(cfg, False)
