# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Exported detectors are compared with the results of the detectors themselves on images."""

import copy
import re

import openvino
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from export_models import (
    GFL,
    MASK_RCNN,
    RETINANET,
    build_detector,
    pictures,
    small_config,
)
from torch import Tensor
from torchvision.ops import box_iou

from vovnet_d2.export import PARTS, DetectorTarget, check_format, export, load, select_target

slow = pytest.mark.slow


def eager(model, image: Tensor, size: tuple[int, int] | None = None) -> Instances:
    """Run a model by its usual interface."""
    inputs = {"image": image}
    if size is not None:
        inputs |= {"height": size[0], "width": size[1]}
    with torch.no_grad():
        return model([inputs])[0]["instances"]


def assert_same_detections(actual: dict[str, Tensor], expected: Instances) -> None:
    """Assert the same detections: number, classes, IoU >= 0.99 and scores within 1e-3."""
    assert len(actual["scores"]) == len(expected)
    same = box_iou(actual["pred_boxes"], expected.pred_boxes.tensor) >= 0.99
    same &= actual["pred_classes"][:, None] == expected.pred_classes
    same &= (actual["scores"][:, None] - expected.scores).abs() <= 1e-3
    assert (same.sum(0) == 1).all()
    assert (same.sum(1) == 1).all()
    if expected.has("pred_masks"):
        masks = actual["pred_masks"][same.int().argmax(0)]
        assert masks.shape == expected.pred_masks.shape
        assert masks.dtype == expected.pred_masks.dtype == torch.bool
        assert (masks != expected.pred_masks).float().mean() < 1e-3


def run(program, target: DetectorTarget, *inputs: Tensor) -> dict[str, Tensor]:
    return dict(zip(target.output_names, program(*inputs), strict=True))


@pytest.mark.parametrize(
    ("config", "format"),
    [
        pytest.param(RETINANET, "onnx", marks=slow),  # test_export_model.py also compares one
        (MASK_RCNN, "onnx"),
        (MASK_RCNN, "torchscript"),
        pytest.param(GFL, "onnx", marks=slow),
        pytest.param(GFL, "torchscript", marks=slow),
        pytest.param(RETINANET, "torchscript", marks=slow),
    ],
)
def test_same_detections_on_pictures(config, format, tmp_path):
    model = build_detector(small_config(config))
    target = select_target(model, "detector")
    assert target.input_names == ("image", "height", "width")
    file = export(target, format, tmp_path / "detector")
    assert not any("::" in name for name in file.operators) or format == "torchscript"
    program = load(format, file.path)
    for picture in pictures():
        image, size = picture[0], (3 * picture.shape[2] // 2, 2 * picture.shape[3])
        expected = eager(model, image, size)
        assert len(expected) > 50
        actual = run(program, target, image, *map(torch.tensor, size))
        assert_same_detections(actual, expected)
        assert tuple(actual["image_size"].tolist()) == size == expected.image_size


def test_without_preprocessing_and_postprocessing(tmp_path):
    model = build_detector(small_config(MASK_RCNN))
    target = select_target(model, "detector", preprocessing=False, postprocessing=False)
    assert target.input_names == ("image",)
    program = load("torchscript", export(target, "torchscript", tmp_path / "detector.ts").path)
    for picture in pictures():
        (image,) = target.inputs_from(picture)
        # The image is normalised and padded as in the model itself.
        (expected,) = model.preprocess_image([{"image": picture[0]}]).tensor
        torch.testing.assert_close(image, expected)
        assert not any(side % 32 for side in image.shape[1:])
        actual = run(program, target, image)
        # Pad the image first, so that the eager model sees the padding, too.
        padded = torch.zeros_like(image)
        padded[:] = image * model.pixel_std + model.pixel_mean
        with torch.no_grad():
            (expected,) = model.inference([{"image": padded}], do_postprocess=False)
        masks, expected_masks = actual.pop("pred_masks"), expected.pred_masks
        assert masks.shape == expected_masks.shape == (len(expected), 1, 28, 28)
        expected.remove("pred_masks")
        assert_same_detections(actual, expected)
        assert (masks.sort(0).values - expected_masks.sort(0).values).abs().max() < 1e-3


@slow
def test_image_without_detections(tmp_path):
    options = {"MODEL__ROI_HEADS__SCORE_THRESH_TEST": 1.0}
    model = build_detector(small_config(MASK_RCNN, **options))
    target = select_target(model, "detector")
    program = load("onnx", export(target, "onnx", tmp_path / "detector.onnx").path)
    outputs = run(program, target, *target.inputs_from(pictures()[1]))
    assert outputs["pred_boxes"].shape == (0, 4)
    assert outputs["pred_masks"].shape == (0, 202, 252)


@slow
def test_detections_after_a_trace_without_any(tmp_path):
    """Trace an image without detections, because a graph must not depend on the content."""
    model = build_detector(small_config(MASK_RCNN))
    bias = model.roi_heads.box_predictor.cls_score.bias
    target = select_target(model, "detector")
    found = copy.deepcopy(bias.data)
    blind = target.module.model.roi_heads.box_predictor.cls_score.bias
    blind.data[-1] = 1e4  # background
    assert len(target.module(*target.example)[0]) == 0
    program = load("torchscript", export(target, "torchscript", tmp_path / "blind.ts").path)
    for name, parameter in program.named_parameters():
        if name.endswith("cls_score.bias"):
            parameter.data.copy_(found)
    image = pictures()[0][0]
    size = (214, 320)
    actual = run(program, target, image, *map(torch.tensor, size))
    assert_same_detections(actual, eager(model, image, size))


@slow
@pytest.mark.parametrize("config", [RETINANET, MASK_RCNN])
def test_openvino_agrees(config, tmp_path):
    model = build_detector(small_config(config))
    target = select_target(model, "detector")
    path = export(target, "onnx", tmp_path / "detector.onnx").path
    # By default OpenVINO computes in bfloat16 if the processor can.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for picture in pictures():
        image, size = picture[0], tuple(picture.shape[2:])
        outputs = compiled([image.numpy(), *size])
        actual = {name: torch.from_numpy(outputs[name].copy()) for name in target.output_names}
        assert_same_detections(actual, eager(model, image, size))


@pytest.mark.parametrize("part", PARTS)
def test_the_model_is_not_changed(part):
    model = build_detector(small_config(RETINANET, MODEL__VOVNET__NORM="BN")).train()
    attributes = set(vars(model))
    state = copy.deepcopy(model.state_dict())
    select_target(model, part, preprocessing=False)
    assert vars(model).keys() == attributes
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("format", ["torch_export", "aotinductor"])
def test_formats_that_do_not_support_detectors(format):
    message = f"{format} does not take a whole detector, because torch.export cannot follow a v"
    with pytest.raises(ValueError, match=message + ".* choose from onnx, torchscript, or export"):
        check_format(format, DetectorTarget)


def test_outputs_other_than_tensors():
    cfg = small_config(
        MASK_RCNN, MODEL__META_ARCHITECTURE="PanopticFPN", MODEL__SEM_SEG_HEAD__CONVS_DIM=32
    )
    model = build_model(cfg).eval()
    message = "PanopticFPN cannot be exported whole, because some of its outputs are not tensors"
    with pytest.raises(ValueError, match=re.escape(message)):
        select_target(model, "detector")
