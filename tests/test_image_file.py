# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The one function that reads image files, for every mode, orientation and depth."""

import re
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.modeling import DatasetMapperTTA
from PIL import Image, ImageOps

from vovnet_d2.data.image_file import (
    ORIENTATION,
    is_heic,
    read_header,
    read_image,
    read_labels,
    why_unreadable,
)
from vovnet_d2.data.mapper import AugmentedTestMapper, Mapper, build_mapper
from vovnet_d2.data.unreadable import ReadableOnly
from vovnet_d2.engine import load_config
from vovnet_d2.engine.lazy import _name_unreadable_images
from vovnet_d2.engine.lazy_config import load_lazy_config

SIZE = (12, 20)  # height, width


def scene() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


# Modes of 8 bits, which are read as in Detectron2, and a file type for each.
EIGHT_BITS = {
    "1": "png", "L": "png", "P": "png", "RGB": "png", "RGBA": "png", "LA": "png", "CMYK": "tif",
}  # fmt: skip
if int(PIL.__version__.partition(".")[0]) > 10:  # Pillow 10 cannot read its own file
    EIGHT_BITS["YCbCr"] = "tif"


@pytest.mark.parametrize("mode", EIGHT_BITS)
@pytest.mark.parametrize("format", ["BGR", "RGB", "L", "YUV-BT.601"])
def test_eight_bits_are_read_as_detectron2_does(tmp_path: Path, mode: str, format: str) -> None:
    path = tmp_path / f"a.{EIGHT_BITS[mode]}"
    Image.fromarray(scene()).convert(mode).save(path)
    assert np.array_equal(read_image(path, format), utils.read_image(str(path), format))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_applied_as_in_pillow(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(scene()).save(path, exif=exif)
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(read_image(path, "RGB"), expected)
    header = read_header(path)
    assert (header.orientation, header.stored_size) == (orientation, SIZE[::-1])
    assert header.size == expected.shape[1::-1]
    assert np.array_equal(read_labels(save_labels(tmp_path, exif)), expected[..., 0])


def save_labels(folder: Path, exif: Image.Exif) -> Path:
    path = folder / "labels.png"
    Image.fromarray(scene()[..., 0]).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_reduced_to_the_upper_8(tmp_path: Path, suffix: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, SIZE).astype(np.uint16)
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), values)
    expected = np.repeat((values // 256)[..., None], 3, axis=2)
    assert np.array_equal(read_image(path), expected)
    assert read_header(path).bits == 16
    # Users read arrays for Predictor with OpenCV, which converts to 8 bits in the same way.
    assert np.abs(cv2.imread(str(path)).astype(int) - expected).max() <= 1
    colours = np.stack([values, values[::-1], values.T.reshape(SIZE)], axis=2)
    if suffix == "png":
        cv2.imwrite(str(path), colours)
        assert np.array_equal(read_image(path), colours // 256)


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=r"a\.tif has 32 bits per pixel, whose range is not"):
            read_image(tmp_path / "a.tif")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*b\.png\."):
        read_image(tmp_path / "b.png")
    (tmp_path / "b.png").write_text("404")
    with pytest.raises(ValueError, match=r"b\.png is not a picture .*\(of no known format\)"):
        read_image(tmp_path / "b.png")


# Label maps


def as_palette(labels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(labels.astype(np.uint8), mode="P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    return picture


LABELS = np.random.default_rng(1).integers(0, 4, SIZE)
LABEL_FILES = {
    "grey": Image.fromarray(LABELS.astype(np.uint8)),
    "palette": as_palette(LABELS),
    "16 bits": Image.fromarray(LABELS.astype(np.uint16)),
    "grey thrice": Image.fromarray(np.repeat(LABELS.astype(np.uint8)[..., None], 3, axis=2)),
    "with alpha": Image.fromarray(LABELS.astype(np.uint8)).convert("LA"),
}


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_labels_equal_the_numbers_in_the_file(tmp_path: Path, kind: str) -> None:
    """Check all kinds of label files. Detectron2's mapper reads the luminance of a palette."""
    path = tmp_path / "a.png"
    LABEL_FILES[kind].save(path)
    assert np.array_equal(read_labels(path), LABELS)
    Image.fromarray(scene()).save(tmp_path / "picture.png")
    record = {"file_name": str(tmp_path / "picture.png"), "sem_seg_file_name": str(path)}
    mapper = Mapper(True, augmentations=[T.ResizeShortestEdge(24)], image_format="BGR")
    expected = np.repeat(np.repeat(LABELS, 2, axis=0), 2, axis=1)
    assert np.array_equal(mapper(record)["sem_seg"], expected)
    theirs = DatasetMapper(True, augmentations=[], image_format="BGR")
    if kind == "palette":
        assert set(theirs(record)["sem_seg"].unique().tolist()) == {0, 38, 75, 113}


def test_labels_beyond_8_bits(tmp_path: Path) -> None:
    numbers = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE)
    Image.fromarray(scene()).save(tmp_path / "b.png")
    record = {"file_name": str(tmp_path / "b.png"), "sem_seg_file_name": str(tmp_path / "a.png")}
    mapper = Mapper(
        True, augmentations=[T.RandomFlip(1.0), T.ResizeShortestEdge(24)], image_format="BGR"
    )
    for labels in (numbers * 273, 254 + numbers % 3):  # up to the largest number, and around 255
        Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "a.png")
        expected = np.repeat(np.repeat(labels[:, ::-1], 2, axis=0), 2, axis=1)
        assert np.array_equal(mapper(record)["sem_seg"], expected)


def test_floating_point_labels_are_whole_numbers(tmp_path: Path) -> None:
    Image.fromarray(LABELS.astype(np.float32)).save(tmp_path / "a.tif")
    assert np.array_equal(read_labels(tmp_path / "a.tif"), LABELS)
    Image.fromarray(LABELS.astype(np.float32) / 2).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match=r"b\.tif .* not whole numbers \(Pillow's mode F\)"):
        read_labels(tmp_path / "b.tif")


def test_colours_are_no_labels(tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is not a label map: its pixels have .* colours"):
        read_labels(tmp_path / "a.png")


def test_the_formats_that_the_page_lists_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "own_data.md").read_text(encoding="utf-8")
    names = page.partition("files that Pillow reads: ")[2].partition(" and others")[0]
    formats = [re.sub(r"\(.*\)", "", name).replace(" ", "") for name in names.split(",")]
    assert len(formats) >= 8
    for name in formats:
        Image.new("RGB", (4, 3), (200, 0, 0)).save(tmp_path / name, format=name)
        assert read_image(tmp_path / name, "RGB")[..., 0].mean() > 150


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_pictures_of_phones_are_told(tmp_path: Path, name: str) -> None:
    """Read the first bytes of a HEIC file, as libheif writes them."""
    file = tmp_path / name
    file.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for read in (read_image, read_header, read_labels):
        with pytest.raises(ValueError, match=r"it is HEIC, .*: convert it to JPEG or PNG"):
            read(file)
    assert why_unreadable(file).startswith("it is HEIC, which Pillow does not read")


@pytest.mark.parametrize(
    ("brands", "expected"),
    [
        ("heic mif1 MiHE miaf heic", True),  # of a phone
        *(("hevx hevx", True), ("hevc", True), ("mif1 miaf heic", True), ("msf1 hevc msf1", True)),
        *(("avif mif1 miaf MA1B", False), ("mif1 avif miaf MA1B", False), ("msf1 avis", False)),
        *(("mif1", False), ("mp42 isom hvc1", False)),
    ],
)
def test_heic_is_told_by_its_brands(tmp_path: Path, brands: str, expected: bool) -> None:
    """Write the first box of a file: its size, "ftyp", the major brand, a version and the
    compatible brands. The next box is damaged: it holds the name of a brand."""
    major, *compatible = (brand.encode() for brand in brands.split())
    content = b"ftyp" + major + bytes(4) + b"".join(compatible)
    box = (len(content) + 4).to_bytes(4, "big") + content
    file = tmp_path / "a.heic"
    file.write_bytes(box + b"heicheic")
    assert is_heic(file) == expected
    for length in (0, 4, 9):
        file.write_bytes(box[:length])
        assert not is_heic(file)


# The mapper


def test_the_mapper_equals_that_of_detectron2(tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.png")
    box = {"bbox": [2, 3, 9, 8], "bbox_mode": 0, "category_id": 1, "iscrowd": 0}
    record = {"file_name": str(tmp_path / "a.png"), "annotations": [box]}
    cfg = load_config()
    for train in (True, False):
        found = []
        for mapper in (build_mapper(cfg, train), DatasetMapper(cfg, train)):
            np.random.seed(3)  # noqa: NPY002
            found.append(mapper(record))
        ours, theirs = found
        assert ours.keys() == theirs.keys()
        assert np.array_equal(ours["image"], theirs["image"])
        if train:
            assert ours["instances"].gt_boxes.tensor.equal(theirs["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("size", [(2, 6000), (6000, 2), (1, 3000)])
def test_thin_lines_keep_a_pixel(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "annotations": []}
    cfg = load_config()
    for train in (True, False):
        image = build_mapper(cfg, train)(record)["image"]
        assert min(image.shape[1:]) == 1
        assert max(image.shape[1:]) == 1333
        with pytest.raises((RuntimeError, ValueError)):
            DatasetMapper(cfg, train)(record)


@pytest.mark.parametrize("flip", [True, False])
def test_test_time_augmentation_equals_that_of_detectron2(flip: bool) -> None:
    """Compare with Detectron2's mapper, which raises an error for very thin images."""
    pixels = torch.from_numpy(scene().transpose(2, 0, 1).copy())
    ours = AugmentedTestMapper((8, 30), 40, flip=flip)
    theirs = DatasetMapperTTA((8, 30), 40, flip)
    corners = np.array([[1.0, 2, 11, 9], [0, 0, 20, 12]])
    for size in ((12, 20), (24, 50)):  # size of the original image
        record = {"image": pixels, "height": size[0], "width": size[1], "image_id": 3}
        found, expected = ours(record), theirs(record)
        assert len(found) == len(expected) == 2 + 2 * flip
        for one, other in zip(found, expected, strict=True):
            assert one["image"].equal(other["image"])
            assert one.keys() == other.keys()
            for way in (lambda t: t, lambda t: t.inverse()):
                boxes = [way(each["transforms"]).apply_box(corners) for each in (one, other)]
                np.testing.assert_array_equal(*boxes)
    thin = {"image": pixels[:, :1].repeat(1, 1, 50), "height": 2, "width": 3000}
    assert [tuple(each["image"].shape[1:]) for each in ours(thin)] == [(1, 40)] * (2 + 2 * flip)
    with pytest.raises((RuntimeError, ValueError)):
        theirs(thin)


def test_a_file_that_is_refused_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    mapper = ReadableOnly(Mapper(True, augmentations=[], image_format="BGR"))
    with pytest.raises(ValueError, match=r"a\.tif cannot be used: it has 32 bits per pixel"):
        mapper({"file_name": str(tmp_path / "a.tif")})


def test_lazy_configs_read_images_in_the_same_way() -> None:
    """Check that the mapper of Detectron2, which their files name, is replaced by ours."""
    config = load_lazy_config("lazy/COCO-Detection/faster_rcnn_V_39_eSE_FPN_1x.py")
    for loader in (config.dataloader.train, config.dataloader.test):
        assert type(instantiate(loader.mapper)) is DatasetMapper
        _name_unreadable_images(loader, [])
        mapper = instantiate(loader.mapper)
        assert isinstance(mapper, ReadableOnly)
        assert type(mapper.mapper) is Mapper
