# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Export of backbones with and without FPN in every format, and code that all targets share."""

import importlib.util
import re
import sys
from contextlib import nullcontext

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling import build_model
from export_models import MASK_RCNN, RETINANET, build_detector, small_config
from reference import KINDS, STRUCTURES, TABLE, random_state, short, thin

from vovnet_d2 import VoVNet, VoVNetSpec
from vovnet_d2.export import (
    FORMATS,
    PARTS,
    BackboneTarget,
    check_format,
    compare,
    export,
    load,
    select_target,
)
from vovnet_d2.export.formats import MIN_SIZE, _sizes_of_any_parity
from vovnet_d2.export.masks import paste_masks
from vovnet_d2.modeling.vovnet import OSABlock

slow = pytest.mark.slow
STAGES = ("stem", "stage2", "stage3", "stage4", "stage5")
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((103.5, 116.3, 123.7), (57.4, 57.1, 58.4)))

# ONNX operators of the backbone with its normalisation. Any inference engine has them.
OPERATORS = {"Sub", "Div", "Conv", "Relu", "Concat", "Pad", "MaxPool"}
OF_ESE = {"ReduceMean", "HardSigmoid", "Mul"}
OF_RESIDUAL = {"Add"}
OF_FPN = {"Add", "Resize"}
# With torch 2.6, the file computes some sizes that later versions know at export. Axes have other
# names.
OLD_EXPORTER = MIN_SIZE > 32
OF_SIZES = {"Constant", "Reshape"} if OLD_EXPORTER else set()
OF_SOME_SIZES = {"Cast"} if OLD_EXPORTER else set()  # some versions of onnxscript remove it
OF_ANY_SIZE = OF_SIZES | ({"Expand", "Shape", "CastLike"} if OLD_EXPORTER else set())


def backbone_target(net, stages=STAGES, **args) -> BackboneTarget:
    model = VoVNet(VoVNetSpec(**vars(net)), norm="BN", out_features=stages).eval()
    model.load_state_dict(random_state(net), strict=False)
    return BackboneTarget(model, pixel_mean=MEAN, pixel_std=STD, **args)


def test_without_the_private_function_of_torch_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch import _meta_registrations

    monkeypatch.setattr(_meta_registrations, "div_rtn", None, raising=False)
    with _sizes_of_any_parity():
        assert _meta_registrations.div_rtn is not None
    monkeypatch.delattr(_meta_registrations, "div_rtn")
    assert isinstance(_sizes_of_any_parity(), nullcontext)
    monkeypatch.delattr(torch, "_meta_registrations")
    monkeypatch.setitem(sys.modules, "torch._meta_registrations", None)
    assert isinstance(_sizes_of_any_parity(), nullcontext)


def raw_images(*shape: int) -> torch.Tensor:
    return torch.rand(shape) * 255


def run_onnx(path, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))


def largest_difference(
    target: BackboneTarget, actual: dict[str, np.ndarray], images: torch.Tensor
) -> float:
    """Return the largest difference, relative to the largest value of each feature map."""
    expected = dict(zip(target.output_names, target.eager(images), strict=True))
    assert list(actual) == list(expected)
    assert all(actual[name].shape == x.shape for name, x in expected.items())
    return max(
        np.abs(actual[name] - x.numpy()).max() / x.abs().max().item()
        for name, x in expected.items()
    )


def assert_plain(path, allowed: set[str]) -> None:
    """Check that all operators are among the allowed ones, and that no pooling has ceil mode."""
    model = onnx.load(path)
    assert [opset.domain for opset in model.opset_import] == [""]
    assert {node.op_type for node in model.graph.node} - OF_SOME_SIZES == allowed
    assert not model.functions
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert not attributes.get("ceil_mode", 0), node.name


def operators_of(net) -> set[str]:
    residual = net.residual and max(net.blocks_per_stage) > 1
    return (
        OPERATORS | (OF_ESE if net.ese != "none" else set()) | (OF_RESIDUAL if residual else set())
    )


# Backbone


@pytest.fixture(
    scope="module",
    params=["depthwise, pooled stem", pytest.param("bottleneck", marks=slow)],
)
def exported(request, tmp_path_factory):
    """Return a thin network, its target and its ONNX file."""
    net = short(thin(STRUCTURES[request.param]))
    target = backbone_target(net)
    path = tmp_path_factory.mktemp("onnx") / "backbone.onnx"
    return net, target, path, export(target, "onnx", path)


SIZES = [(1, MIN_SIZE, MIN_SIZE), (2, 65, 97), (1, 101, 64), (3, MIN_SIZE + 15, 70)]


def test_onnx_at_any_size(exported):
    _, target, path, _ = exported
    for batch, *size in SIZES:
        images = raw_images(batch, 3, *size)
        assert largest_difference(target, run_onnx(path, images), images) <= 1e-4


def test_onnx_operators(exported):
    net, _, path, file = exported
    assert_plain(path, operators_of(net) | OF_ANY_SIZE)
    assert file.operators.keys() - OF_SOME_SIZES == (operators_of(net) | OF_ANY_SIZE) - {"Constant"}
    nodes = [node for node in onnx.load(path).graph.node if node.op_type != "Constant"]
    assert file.operators.total() == len(nodes)
    assert file.opset == onnx.load(path).opset_import[0].version


def test_onnx_names_and_axes(exported):
    _, _, path, _ = exported
    graph = onnx.load(path).graph
    (images,) = graph.input
    assert images.name == "images"
    axes = images.type.tensor_type.shape.dim
    batch, channels, height, width = (axis.dim_param or axis.dim_value for axis in axes)
    assert channels == 3
    if OLD_EXPORTER:
        assert len({batch, height, width} - {"", 3}) == 3
    else:
        assert (batch, height, width) == ("batch", "height", "width")
    assert tuple(output.name for output in graph.output) == STAGES


def test_openvino_agrees(exported):
    _, target, path, _ = exported
    # By default OpenVINO computes in bfloat16 if the processor can.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", options)
    for batch, *size in SIZES:
        images = raw_images(batch, 3, *size)
        actual = {key.get_any_name(): value for key, value in model(images.numpy()).items()}
        assert largest_difference(target, actual, images) <= 1e-4


def test_without_preprocessing(tmp_path):
    net = short(thin(STRUCTURES["full"], 16))
    target = backbone_target(net, preprocessing=False)
    file = export(target, "torchscript", tmp_path / "backbone.ts")
    assert not {"aten::sub", "aten::div"} & file.operators.keys()
    images = raw_images(1, 3, 65, 97)
    (normalised,) = target.inputs_from(images)
    torch.testing.assert_close(normalised, (images - MEAN) / STD)
    maps = map(np.asarray, load("torchscript", file.path)(normalised))
    actual = dict(zip(STAGES, maps, strict=True))
    assert largest_difference(backbone_target(net), actual, images) <= 1e-4


@pytest.mark.parametrize(
    "format",
    ["torchscript", *(pytest.param(f, marks=slow) for f in ("torch_export", "aotinductor"))],
)
def test_other_formats(format, tmp_path):
    # Compiling C++ takes long for each stage. The stages up to stage3 have all kinds of layers.
    stages = STAGES[:3] if format == "aotinductor" else STAGES
    target = backbone_target(short(thin(STRUCTURES["eSE in all"], 16)), stages)
    path = tmp_path / f"backbone{FORMATS[format].suffix}"
    file = export(target, format, path)
    assert file.operators.total() > 0
    program = load(format, path)
    for batch, *size in SIZES:
        images = raw_images(batch, 3, *size)
        outputs = dict(zip(target.output_names, map(np.asarray, program(images)), strict=True))
        assert largest_difference(target, outputs, images) <= 1e-4


def test_formats_are_all_tested():
    assert {"onnx", "torchscript", "torch_export", "aotinductor"} == set(FORMATS)


@slow
@pytest.mark.parametrize(
    "net",
    [*(pytest.param(thin(TABLE[v]), id=v) for v in KINDS), pytest.param(TABLE["V-39-eSE"], id="")],
)
def test_each_kind_of_variant(net, tmp_path):
    """Export thin variants, because widths do not change a graph, and one of full width."""
    target = backbone_target(net)
    file = export(target, "onnx", tmp_path / "backbone.onnx")
    assert_plain(file.path, operators_of(net))
    for shape in ((1, 3, 64, 64), (2, 3, 75, 101), (1, 3, 133, 90)):
        images = raw_images(*shape)
        assert largest_difference(target, run_onnx(file.path, images), images) <= 1e-4


@slow
def test_deformable_convolutions(tmp_path):
    spec = VoVNetSpec(**vars(thin(STRUCTURES["full"])))
    model = VoVNet(spec, stage_with_dcn=(False, False, True, True), with_modulated_dcn=True).eval()
    for name, parameter in model.named_parameters():
        if "offset" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    target = BackboneTarget(model, pixel_mean=MEAN, pixel_std=STD)
    file = export(target, "onnx", tmp_path / "backbone.onnx")
    assert file.operators["DeformConv"] > 0
    images = raw_images(2, 3, 65, 97)
    assert largest_difference(target, run_onnx(file.path, images), images) <= 1e-4


# With FPN


@slow  # test_backends.py exports both detectors, too
@pytest.mark.parametrize("config", [MASK_RCNN, RETINANET])
def test_fpn(config, tmp_path):
    """Export P6 by pooling, and P6 and P7 by convolutions. Sides are multiples of 32."""
    target = select_target(build_detector(small_config(config)), "fpn")
    file = export(target, "onnx", tmp_path / "fpn.onnx")
    net = STRUCTURES["eSE in all"]
    assert_plain(file.path, operators_of(net) | OF_FPN | OF_SIZES)
    for shape in ((1, 3, MIN_SIZE, 64), (2, 3, 160, 96)):
        images = raw_images(*shape)
        assert largest_difference(target, run_onnx(file.path, images), images) <= 1e-4
    graph = onnx.load(file.path).graph
    height, width = (axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim[2:])
    if not OLD_EXPORTER:
        assert (height, width) == ("32*height", "32*width")


def test_fpn_by_torch_export(tmp_path):
    target = select_target(build_detector(small_config(RETINANET)), "fpn")
    program = load("torch_export", export(target, "torch_export", tmp_path / "fpn.pt2").path)
    for shape in ((1, 3, MIN_SIZE, 64), (2, 3, 160, 96)):
        images = raw_images(*shape)
        actual = dict(zip(target.output_names, map(np.asarray, program(images)), strict=True))
        assert largest_difference(target, actual, images) <= 1e-4
    assert target.inputs_from(raw_images(1, 3, 67, 99))[0].shape == (1, 3, 64, 96)


# Comparison


def detections(boxes, scores, classes, **fields) -> dict[str, torch.Tensor]:
    return {
        "pred_boxes": torch.tensor(boxes).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "pred_classes": torch.tensor(classes, dtype=torch.int64),
        **fields,
    }


BOXES = [[0.0, 0.0, 100.0, 100.0], [50.0, 0.0, 150.0, 100.0]]
EXPECTED = detections(BOXES, [0.9, 0.5], [1, 2])


@pytest.mark.parametrize(
    ("actual", "matched"),
    [
        (EXPECTED, 2),
        (detections(BOXES[::-1], [0.5, 0.9], [2, 1]), 2),  # in another order
        (detections(BOXES, [0.9, 0.5], [1, 1]), 1),  # another class
        (detections(BOXES, [0.9, 0.502], [1, 2]), 1),  # another score
        (detections([BOXES[0], [50.0, 0.0, 152.0, 100.0]], [0.9, 0.5], [1, 2]), 1),  # IoU 0.98
        (detections(BOXES[:1], [0.9], [1]), 1),  # one missing
        (detections([*BOXES, BOXES[0]], [0.9, 0.5, 0.4], [1, 2, 1]), 2),  # one too many
        (detections([], [], []), 0),
    ],
)
def test_compared_detections(actual, matched):
    difference = compare(actual, EXPECTED)["detections"]
    assert (difference.expected, difference.found) == (2, len(actual["scores"]))
    assert difference.matched == matched
    assert difference.agrees == (matched == 2 == len(actual["scores"]))


def test_differences_of_detections():
    masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    other = masks.clone()
    other[1, 0, :3] = True
    actual = detections([BOXES[0], [50.0, 0.0, 150.5, 100.0]], [0.9, 0.4995], [1, 2], masks=other)
    (difference,) = compare(actual, EXPECTED | {"masks": masks}).values()
    assert difference.iou == pytest.approx(100 / 100.5)
    assert difference.box == 0.5
    assert difference.score == pytest.approx(0.0005, rel=1e-3)
    assert difference.fields["masks"] == pytest.approx(3 / 200)
    assert not difference.agrees  # because of the masks
    assert difference.matched == 2


def test_differences_of_maps():
    expected = {"p2": torch.tensor([[1.0, -4.0]]), "p3": torch.zeros(0)}
    difference = compare({"p2": torch.tensor([[1.0, -4.002]]), "p3": torch.zeros(0)}, expected)
    assert difference["p2"].absolute == pytest.approx(0.002, rel=1e-3)
    assert difference["p2"].relative == pytest.approx(0.0005, rel=1e-3)
    assert not difference["p2"].agrees
    assert difference["p3"].agrees
    assert not compare({"p2": torch.zeros(2), "p3": torch.zeros(0)}, expected)["p2"].agrees
    twice = compare({name: 2 * x for name, x in expected.items()}, expected)
    assert twice["p2"].relative == 1  # relative to the expected values


def test_pasted_masks():
    masks = torch.rand(7, 28, 28)
    corners = torch.rand(7, 2) * 60 - 10
    boxes = torch.cat([corners, corners + 1 + torch.rand(7, 2) * 90], dim=1)
    expected = paste_masks_in_image(masks, boxes, (61, 83))
    assert expected.any()
    assert not expected.all()
    pasted = paste_masks(masks, boxes, 61, 83)
    assert pasted.dtype == torch.bool
    assert pasted.shape == (7, 61, 83)
    assert (pasted != expected).sum() <= 1  # one pixel may be at the threshold
    assert paste_masks(masks[:0], boxes[:0], 61, 83).shape == (0, 61, 83)


# Mistakes


def test_unknown_format():
    message = "Unknown format 'tflite': choose from onnx, torchscript, torch_export, aotinductor."
    with pytest.raises(ValueError, match=re.escape(message)):
        check_format("tflite", BackboneTarget)


def test_missing_packages(monkeypatch, tmp_path):
    target = backbone_target(thin(STRUCTURES["full"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "onnx needs onnx, onnxscript, onnxruntime: pip install 'vovnet_d2[export]'"
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        export(target, "onnx", tmp_path / "backbone.onnx")


FIXED = [
    (short(thin(STRUCTURES["eSE in all"])), (2, 64, 96)),
    pytest.param(TABLE["V-99-eSE"], (1, 320, 800), marks=slow),  # as in PETR
]


@pytest.mark.parametrize(
    ("net", "shape"),
    FIXED,
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_onnx_of_one_shape(net, shape, tmp_path):
    model = VoVNet(VoVNetSpec(**vars(net)), norm="BN", out_features=STAGES).eval()
    model.load_state_dict(random_state(net), strict=False)
    # In a trained network, the output of a block is small compared with its input. Without this
    # change, the many blocks would multiply rounding errors of the first layers.
    for block in (b for b in model.modules() if isinstance(b, OSABlock) and b.residual):
        for parameter in block.aggregation.norm.parameters():
            parameter.data *= 0.1
    target = BackboneTarget(model, pixel_mean=MEAN, pixel_std=STD, shape=shape)
    export(target, "onnx", tmp_path / "backbone.onnx")
    graph = onnx.load(tmp_path / "backbone.onnx").graph
    (given,) = graph.input
    batch, height, width = shape
    dims = [dim.dim_value for dim in given.type.tensor_type.shape.dim]  # 0 if it is dynamic
    assert dims == [batch, 3, height, width]
    assert all(d.dim_value for o in graph.output for d in o.type.tensor_type.shape.dim)
    assert_plain(tmp_path / "backbone.onnx", operators_of(net) | OF_SIZES)
    images = raw_images(batch, 3, height, width)
    assert largest_difference(target, run_onnx(tmp_path / "backbone.onnx", images), images) <= 1e-4
    with pytest.raises(Exception, match="invalid dimensions"):
        run_onnx(tmp_path / "backbone.onnx", raw_images(batch, 3, height + 32, width))


def test_invalid_shapes():
    model = build_detector(small_config(RETINANET))
    with pytest.raises(ValueError, match=r"does not take an image of 80x64: .* multiples of 32"):
        select_target(model, "fpn", shape=(1, 80, 64))
    with pytest.raises(ValueError, match=r"an image of 16x64: .* width from 32 up\.$"):
        select_target(model, "backbone", shape=(1, 16, 64))
    with pytest.raises(ValueError, match="export its part fpn"):
        select_target(model, "detector", shape=(1, 64, 64))


def test_unknown_part():
    model = build_model(small_config(MASK_RCNN))
    with pytest.raises(ValueError, match=f"Unknown part 'neck': choose from {', '.join(PARTS)}"):
        select_target(model, "neck")
    model.backbone = model.backbone.bottom_up
    with pytest.raises(ValueError, match="VoVNet, has no FPN: export its part backbone"):
        select_target(model, "fpn")


def test_a_model_that_a_format_does_not_support(tmp_path):
    target = backbone_target(thin(STRUCTURES["full"]))
    target.module.forward = lambda images: (images[images > 0],) if images.sum() else images
    with pytest.raises(ValueError, match=r"cannot be exported as torch_export \(.*onnx, torchs"):
        export(target, "torch_export", tmp_path / "backbone.pt2")
