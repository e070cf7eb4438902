# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Predictor is compared with Detectron2's DefaultPredictor."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from engine_runs import tiny_config
from export_models import MASK_RCNN, RETINANET, small_config
from PIL import Image
from predictor_runs import DETECTORS, PICTURES, assert_close, save

from vovnet_d2 import Predictor, VoVNetCheckpointer
from vovnet_d2.data.mapper import build_mapper
from vovnet_d2.engine.any_config import load_network
from vovnet_d2.predictor import read_image

pytest_plugins = ["engine_fixtures"]


@pytest.fixture(scope="module")
def mask_rcnn(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    return save(tmp_path_factory.mktemp("mask_rcnn"))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Return BGR images. Two of them are padded to the same size, and the others are not."""
    china, flower = (read_image(file) for file in PICTURES)
    return [china[::3, ::3], flower[:300, :200], flower[::4, 1::4], china[200:300, 10:500]]


@pytest.mark.parametrize("detector", DETECTORS)
def test_predictions_equal_those_of_default_predictor(
    detector: str, tmp_path: Path, images: list[np.ndarray]
) -> None:
    config, options = DETECTORS[detector]
    cfg = save(tmp_path, config, **options)
    predictor = Predictor(cfg, batch_size=3)
    found = predictor(images)
    peer = DefaultPredictor(cfg)
    with_our_model = DefaultPredictor(cfg)
    with_our_model.model = predictor.model
    for image, prediction in zip(images, found, strict=True):
        expected = peer(image)
        assert_close(prediction, expected)
        if "instances" in expected:
            assert len(expected["instances"]) > 3
        # The code around the model makes no difference.
        exact = with_our_model(image)
        alone = predictor(image)
        if "instances" in exact:
            assert torch.equal(alone["instances"].scores, exact["instances"].scores)
        else:
            assert torch.equal(alone["sem_seg"], exact["sem_seg"])
        assert_close(prediction, alone)
    if detector == "panoptic FPN":
        assert all({s["isthing"] for s in p["panoptic_seg"][1]} == {True, False} for p in found)


def test_grouping_keeps_predictions_independent_of_other_images(
    mask_rcnn: CfgNode, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that images of other padded sizes would change predictions in the same batch."""
    predictor = Predictor(mask_rcnn)
    alone = predictor(images[1])
    assert_close(predictor(images)[1], alone)
    monkeypatch.setattr(predictor, "_padded_size", lambda image: (0, 0))
    with pytest.raises(AssertionError):
        assert_close(predictor(images)[1], alone)


def test_batches(
    mask_rcnn: CfgNode, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(mask_rcnn, batch_size=3)
    model, sizes = predictor.model, []

    def count(inputs: list[dict]) -> list[dict]:
        sizes.append(len(inputs))
        return model(inputs)

    monkeypatch.setattr(predictor, "model", count)
    monkeypatch.setattr(predictor, "_padded_size", lambda image: image.shape[1:])
    a, b = images[:2]
    assert len(predictor([a, a, b, a, a, a, a])) == 7
    assert sizes == [2, 1, 3, 1]
    assert predictor([]) == []


def test_files_give_the_same_as_arrays(mask_rcnn: CfgNode, tmp_path: Path) -> None:
    predictor = Predictor(mask_rcnn)
    pixels = read_image(PICTURES[0])[:, :480]
    rotated = tmp_path / "rotated.png"
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels[:, :, ::-1])).save(rotated, exif=exif)
    upright, from_file = predictor([pixels, rotated])
    assert from_file["instances"].image_size == pixels.shape[:2]
    assert_close(from_file, upright)
    assert len(upright["instances"]) > 3


@pytest.mark.parametrize(
    "sizes",
    [
        {"INPUT.MIN_SIZE_TEST": 70, "INPUT.MAX_SIZE_TEST": 100},
        {"INPUT.MIN_SIZE_TEST": 0},
        {"INPUT.FIXED_SIZE": 96},
    ],
    ids=str,
)
def test_sizes_equal_those_of_an_evaluation(sizes: dict, tmp_path: Path) -> None:
    cfg = save(tmp_path, RETINANET, **sizes)
    predictor, seen = Predictor(cfg), []
    predictor.model.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    predictor(PICTURES[0])
    expected = build_mapper(cfg, is_train=False)({"file_name": str(PICTURES[0])})
    assert torch.equal(seen[0]["image"], expected["image"])
    assert (seen[0]["height"], seen[0]["width"]) == (427, 640)


def test_thin_line(mask_rcnn: CfgNode) -> None:
    """Predict on a very thin image, which DefaultPredictor scales to a height of 0 pixels."""
    line = np.zeros((1, 5000, 3), np.uint8)
    assert Predictor(mask_rcnn)(line)["instances"].image_size == (1, 5000)


@pytest.mark.parametrize("format", ["L", "YUV-BT.601"])
def test_other_formats(format: str, tmp_path: Path) -> None:
    one = {"MODEL.PIXEL_MEAN": [100.0], "MODEL.PIXEL_STD": [50.0]} if format == "L" else {}
    cfg = small_config(RETINANET, **{"INPUT.FORMAT": format, "INPUT.MIN_SIZE_TEST": 0}, **one)
    DetectionCheckpointer(build_model(cfg), str(tmp_path)).save("weights")
    predictor = Predictor(cfg, tmp_path / "weights.pth")
    seen = []
    predictor.model.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    predictor(PICTURES[0])
    expected = (
        detection_utils.read_image(str(PICTURES[0]), format).astype("float32").transpose(2, 0, 1)
    )
    np.testing.assert_array_equal(seen[0]["image"].numpy(), expected)


def test_weights_with_another_input_are_a_warning(
    mask_rcnn: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load_network(mask_rcnn, mask_rcnn)
    VoVNetCheckpointer(model, str(tmp_path)).save("weights")
    cfg = mask_rcnn.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    for order in ("BGR", "RGB"):
        caplog.clear()
        cfg.INPUT.FORMAT = order
        load_network(cfg, cfg)
        assert ("The weights expect another input" in caplog.text) == (order == "RGB")


def test_dtype_and_compile_reach_the_network(
    mask_rcnn: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **kw: compiled.append(kw) or forward)
    predictor = Predictor(mask_rcnn, dtype=torch.bfloat16, compile=True)
    assert compiled == [{"dynamic": False, "options": {"triton.cudagraphs": False}}]
    assert {p.dtype for p in predictor.model.backbone.parameters()} == {torch.bfloat16}


def test_predictions_are_on_the_requested_device(
    mask_rcnn: CfgNode, images: list[np.ndarray]
) -> None:
    found = Predictor(mask_rcnn, output_device="meta")(images[0])["instances"]
    assert len(found) > 0
    for name in ("scores", "pred_boxes", "pred_masks"):
        assert found.get(name).device.type == "meta", name


@pytest.mark.gpu
def test_on_a_gpu(mask_rcnn: CfgNode, images: list[np.ndarray]) -> None:
    torch.backends.cudnn.allow_tf32 = False
    expected = Predictor(mask_rcnn)(images)
    predictor = Predictor(mask_rcnn, device="cuda")
    found = predictor(images)
    assert found[0]["instances"].scores.device.type == "cpu"
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    kept = Predictor(mask_rcnn, device="cuda", output_device="cuda")(images[0])
    assert kept["instances"].scores.device.type == "cuda"


# Categories


def test_names_of_the_data_set_of_the_config(mask_rcnn: CfgNode, catalogs: None) -> None:
    cfg = mask_rcnn.clone()
    cfg.DATASETS.TEST = ("nowhere", "mine")
    names = [*"abcde"]  # known once the data set is loaded, as in COCO
    DatasetCatalog.register("mine", lambda: MetadataCatalog.get("mine").set(thing_classes=names))
    assert Predictor(cfg).metadata.thing_classes == names


def test_digits_are_known(tmp_path: Path, catalogs: None) -> None:
    options = {"MODEL.ROI_HEADS.NUM_CLASSES": 10, "DATASETS.TEST": "('digits_val',)"}
    metadata = Predictor(save(tmp_path, **options)).metadata
    assert metadata.thing_classes == [*"0123456789"]
    assert metadata.thing_dataset_id_to_contiguous_id[8] == 7


def test_numbers_instead_of_missing_names(
    mask_rcnn: CfgNode, catalogs: None, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = mask_rcnn.clone()
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = ("nowhere", "broken"), ("other",)
    DatasetCatalog.register("broken", lambda: 1 / 0)
    DatasetCatalog.register("other", list)
    MetadataCatalog.get("other").thing_classes = ["a", "b"]
    with caplog.at_level("WARNING", logger="vovnet_d2"):
        predictor = Predictor(cfg)
    assert predictor.metadata.thing_classes == ["0", "1", "2", "3", "4"]
    (message,) = [m for m in caplog.messages if "Categories" in m]
    assert message == (
        "Categories go by their numbers: nowhere is not registered here; broken cannot be loaded "
        "(ZeroDivisionError: division by zero); other has 2 thing_classes and the network 5."
    )
    assert "nowhere" not in MetadataCatalog


# Mistakes


def test_weights_of_a_backbone_alone(tmp_path: Path) -> None:
    cfg = tiny_config(MASK_RCNN, tmp_path)
    model = build_model(cfg)
    torch.save(model.backbone.bottom_up.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"backbone.pth has no weights for \d+ tensors outside"):
        Predictor(cfg, tmp_path / "backbone.pth")
    assert Predictor(cfg, tmp_path / "backbone.pth", allow_partial=True)(PICTURES[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": ""}, ValueError, "There are no weights: set MODEL.WEIGHTS"),
        ({"weights": "gone.pth"}, FileNotFoundError, "gone.pth"),
        ({"config": "gone.yaml"}, FileNotFoundError, "gone.yaml"),
        ({"device": "gpu"}, ValueError, "MODEL.DEVICE 'gpu' is no device"),
        ({"device": "meta"}, ValueError, "MODEL.DEVICE 'meta' is no device"),
        ({"dtype": torch.float64}, ValueError, "float64"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_arguments(
    arguments: dict, error: type[Exception], message: str, mask_rcnn: CfgNode
) -> None:
    cfg = mask_rcnn.clone()
    if arguments.get("weights") == "":
        cfg.MODEL.WEIGHTS = ""
    with pytest.raises(error, match=message):
        Predictor(**({"config": cfg} | arguments))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("gone.jpg", FileNotFoundError, "There is no file gone.jpg"),
        (__file__, ValueError, "test_predictor.py is not a picture .*of no known format"),
        (".", ValueError, "not a picture"),
        (np.zeros((4, 4, 3)), ValueError, r"not ndarray of float64 and shape \(4, 4, 3\)"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"not ndarray of uint8 and shape \(4, 4, 2\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, "give a list of several images"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"shape \(0, 4, 3\)"),
        (torch.zeros(3, 4, 4), ValueError, r"not Tensor of torch.float32 .*: give tensor\.permute"),
        ([torch.zeros(3, 4, 4)], ValueError, r"a file, not Tensor of torch.float32"),
        (None, ValueError, r"a file, not NoneType\. cv2\.imread returns None"),
        ([None], ValueError, r"a file, not NoneType\. cv2\.imread returns None"),
        (3, ValueError, "a file, not int"),
        ({"image": "x.jpg"}, ValueError, "a file, not dict"),
        (Image.new("I;16", (4, 4)), ValueError, "mode I;16, with more than 8 bits per pixel"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bad_images(
    image: object, error: type[Exception], message: str, mask_rcnn: CfgNode
) -> None:
    with pytest.raises(error, match=message):
        Predictor(mask_rcnn)(image)


def test_arrays_and_pillow_images_give_the_same(
    mask_rcnn: CfgNode, images: list[np.ndarray]
) -> None:
    """Give the same picture as an OpenCV array and as a Pillow image with an EXIF orientation."""
    image = images[0]
    predictor = Predictor(mask_rcnn)
    expected, grey = predictor(image), predictor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))
    rgb = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
    exif = Image.Exif()
    exif[274] = 6
    turned = io.BytesIO()
    rgb.rotate(90, expand=True).save(turned, "PNG", exif=exif)
    alpha = cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)
    assert len(expected["instances"])
    for same in (rgb, Image.open(turned), rgb.convert("RGBA"), alpha, (i for i in [image])):
        found = predictor(same)
        assert_close(found[0] if isinstance(found, list) else found, expected)
    flat = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    assert_close(predictor(flat[:, :, None]), grey)
    assert_close(predictor(cv2.merge([flat] * 3)), grey)


# Files


def write_modes(folder: Path) -> dict[str, Path]:
    """Save a small photograph in the usual modes of image files."""
    with Image.open(PICTURES[0]) as photo:
        rgb = photo.resize((61, 47)).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    grey16 = Image.fromarray(np.arange(47 * 61, dtype=np.uint16).reshape(47, 61) * 22)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(128)
    pictures = {
        "grey.png": rgb.convert("L"),
        "one_bit.png": rgb.convert("1"),
        "palette.png": rgb.quantize(16),
        "alpha.png": alpha,
        "grey_alpha.png": rgb.convert("LA"),
        "sixteen_bit.png": grey16,
        "sixteen_bit.tif": grey16,
        "cmyk.jpg": rgb.convert("CMYK"),
        "rotated.jpg": rgb,
        "rotated_sixteen_bit.png": grey16,
    }
    for name, picture in pictures.items():
        options = {"exif": exif} if "rotated" in name else {}
        picture.save(folder / name, **options)
    return {name: folder / name for name in pictures}


def test_modes_are_read_as_in_opencv(tmp_path: Path) -> None:
    for name, path in write_modes(tmp_path).items():
        found = read_image(path)
        assert found.dtype == np.uint8
        assert found.shape == ((61, 47, 3) if "rotated" in name else (47, 61, 3))
        expected = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if name == "rotated_sixteen_bit.png" and expected.shape != found.shape:
            expected = cv2.rotate(expected, cv2.ROTATE_90_CLOCKWISE)
        # Formulas for CMYK and decoders of JPEG differ slightly.
        limit = 3 if path.suffix == ".jpg" else 0.5
        assert np.abs(found.astype(int) - expected).mean() <= limit, name
        assert np.ptp(found) > 100, name


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_a_range(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif has 32 bits per pixel, whose range is not known"):
        read_image(tmp_path / "x.tif")
