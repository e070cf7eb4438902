# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Static quantization: its arithmetic is compared with NumPy, and its files run in the backends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from engine_runs import MASK_RCNN as MINIATURE
from engine_runs import TINY, launch
from export_models import MASK_RCNN, build_detector, pictures, run_export, small_config
from onnx import numpy_helper
from predictor_runs import PICTURES, save
from torch import Tensor, nn

from vovnet_d2 import Predictor
from vovnet_d2.backends import BACKENDS, programs, use, use_backend
from vovnet_d2.backends.cache import export_dense_part, model_key
from vovnet_d2.backends.quantized import check_quantized, mark_quantized
from vovnet_d2.engine.quantization import (
    _agreement,
    find_images,
    quantize_detector,
    to_markdown,
    write_quantized,
)
from vovnet_d2.export import int8
from vovnet_d2.export.dense import DensePart
from vovnet_d2.export.int8 import KEEP_FLOAT, Quantizer
from vovnet_d2.modeling.inference import optimize_for_inference

pytest_plugins = ["engine_fixtures"]

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Return the same network as in the tests of backends, so that it is exported only once."""
    seed_all_rng(0)
    return build_detector(small_config(MASK_RCNN))


def images(model: nn.Module) -> Iterator[Tensor]:
    for picture in pictures():
        yield model.preprocess_image([{"image": picture[0]}]).tensor


@pytest.fixture(scope="module")
def quantizer(model: nn.Module) -> Quantizer:
    path, _ = export_dense_part(model)
    return Quantizer(path, images(model))


def test_layers_are_the_convolutions_of_the_model(model: nn.Module, quantizer: Quantizer) -> None:
    expected = [n for n, m in DensePart(model).named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(quantizer.layers) == sorted(expected)
    # The head of the region proposal network reads five feature maps.
    assert [len(quantizer.layers[name]) for name in ("head.conv", "backbone.fpn_output2")] == [5, 1]


def test_the_default_does_not_quantize_the_last_stage_and_outputs(quantizer: Quantizer) -> None:
    kept = set(quantizer.layers) - set(quantizer.select())
    assert kept == {
        name
        for name in quantizer.layers
        if "stage5" in name or "fpn_output" in name or name.endswith("ese.fc")
    }
    assert len(kept) > 8
    assert quantizer.select([]) == list(quantizer.layers)
    assert set(quantizer.layers) - set(quantizer.select(["head", "backbone.fpn_lateral3"])) == {
        *(f"head.{name}" for name in ("conv", "objectness_logits", "anchor_deltas")),
        "backbone.fpn_lateral3",
    }


def test_layers_are_checked_before_images_are_run(model: nn.Module) -> None:
    path, _ = export_dense_part(model)
    fresh = Quantizer(path, iter(()))
    with pytest.raises(ValueError, match="There is no stage6 in the network"):
        fresh.select(["stage6"])
    with pytest.raises(ValueError, match="There are no images to calibrate on"):
        fresh.quantize(fresh.select())


def test_weights_are_quantized_per_channel_in_seven_bits(
    model: nn.Module, quantizer: Quantizer
) -> None:
    chosen = quantizer.select()
    quantized = quantizer.quantize(chosen)
    values = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer}
    part = optimize_for_inference(DensePart(model), memory_format=torch.contiguous_format)
    convolutions = dict(part.named_modules())
    made = {n.output[0]: n for n in quantized.graph.node}
    seen = set()
    for node in quantized.graph.node:
        if node.op_type != "Conv":
            continue
        source = made.get(node.input[1])
        if source is None:  # this layer is not quantized
            name = node.input[1].removeprefix("backbone.").removesuffix(".weight")
            assert name not in chosen
            np.testing.assert_array_equal(
                values[node.input[1]], convolutions[name].weight.detach().numpy()
            )
            continue
        integers, scale, zero = (values[name] for name in source.input)
        name = source.input[0].removeprefix("backbone.").removesuffix(".weight_quantized")
        weight = convolutions[name].weight.detach().numpy()
        assert integers.dtype == np.int8
        assert np.abs(integers).max() <= 64
        assert not zero.any()
        largest = np.abs(weight).reshape(len(weight), -1).max(1)
        np.testing.assert_allclose(scale, largest / 64, rtol=0.02)
        error = np.abs(integers * scale[:, None, None, None] - weight)
        assert (error <= 0.51 * scale[:, None, None, None]).all()
        seen.add(name)
    assert seen == set(chosen)


def test_ranges_come_from_the_images(model: nn.Module, quantizer: Quantizer) -> None:
    """Compare scale and zero point of an input with the values in the model."""
    part = optimize_for_inference(DensePart(model), memory_format=torch.contiguous_format)
    seen: list[float] = []
    convolution = part.get_submodule("backbone.bottom_up.stem.conv2")
    hook = convolution.register_forward_pre_hook(lambda m, args: seen.append(args[0].max().item()))
    with torch.no_grad():
        for image in images(model):
            part(image)
    hook.remove()
    quantized = quantizer.quantize(["backbone.bottom_up.stem.conv2"])
    values = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer}
    first = next(n for n in quantized.graph.node if n.op_type == "QuantizeLinear")
    assert values[first.input[2]] == 0  # after a ReLU
    assert values[first.input[1]] == pytest.approx(max(seen) / 255, rel=1e-4)


def test_the_form_for_tensorrt(
    model: nn.Module, quantizer: Quantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the conditions of TensorRT in the graph, and run the file in ONNX Runtime."""
    own = Quantizer(export_dense_part(model)[0], images(model), symmetric=True)
    path = tmp_path / "symmetric.onnx"
    write_quantized(model, own, own.select(), path)
    quantized = onnx.load(path)
    values = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer}
    steps = [n for n in quantized.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in steps:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
    weights = [n for n in steps if n.op_type == "QuantizeLinear" and n.input[0] in values]
    assert len(weights) == len(quantizer.select())
    for node in weights:  # 8 bits for the largest weight of each output channel
        weight, scale = (values[name] for name in node.input[:2])
        np.testing.assert_allclose(np.abs(weight).max((1, 2, 3)), 127 * scale, rtol=0.01)
    biases = {n.input[2] for n in quantized.graph.node if n.op_type == "Conv" and n.input[2:]}
    assert biases
    assert biases <= values.keys()
    image = next(images(model))
    with torch.no_grad():
        expected = list(DensePart(model)(image).values())
    # Without its optimizations, ONNX Runtime rounds as the file says and multiplies in float32.
    # Otherwise sums of products of 8 bits overflow on a CPU without VNNI.
    exactly = onnxruntime.SessionOptions()
    exactly.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, exactly, ["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    assert 1e-3 < relative_error([torch.from_numpy(y) for y in outputs], expected) < 0.2
    # TensorRT takes this file, and refuses the form for CPUs.
    asked: list[Any] = []
    monkeypatch.setattr(programs, "load_onnxruntime", lambda *args: asked.append(args[2]))
    monkeypatch.setattr(use, "check_backend", lambda *_, **__: None)
    use_backend(model, "tensorrt", int8=path)
    (((name, options),),) = asked
    assert name == "TensorrtExecutionProvider"
    assert options["trt_int8_enable"]
    assert options["trt_fp16_enable"]
    for_cpus = tmp_path / "for_cpus.onnx"
    write_quantized(model, quantizer, ["head.conv"], for_cpus)
    with pytest.raises(ValueError, match=r"not quantized for TensorRT: .* with --for-tensorrt"):
        use_backend(model, "tensorrt", int8=for_cpus)
    # The choice of auto is kept, because TensorRT is not tried in vain.
    monkeypatch.setattr(use, "find_backends", lambda *_, **__: ["onnxruntime", "tensorrt"])
    monkeypatch.setattr(use, "_measure", lambda *args: dict.fromkeys(args[3], 0.1))
    assert use.rank_backends(model, int8=for_cpus) == ["onnxruntime"]
    assert use.rank_backends(model, int8=path) == ["onnxruntime", "tensorrt"]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def test_backends_run_a_quantized_file(
    model: nn.Module, quantizer: Quantizer, tmp_path: Path
) -> None:
    image = next(images(model))
    with torch.no_grad():
        expected = list(DensePart(model)(image).values())
    errors = {}
    for name, kept in (("default", None), ("all", [])):
        path = tmp_path / f"{name}.onnx"
        onnx.save(quantizer.quantize(quantizer.select(kept)), path)
        found = {b: BACKENDS[b].load(path, CPU, "int8")(image) for b in ("onnxruntime", "openvino")}
        errors[name] = relative_error(found["onnxruntime"], expected)
        # The backends round in different places. They differ from each other as from float.
        assert relative_error(found["openvino"], expected) < 2 * errors[name]
    assert 1e-3 < errors["default"] < errors["all"] < 0.5


def test_sensitivity_of_layers(model: nn.Module, quantizer: Quantizer) -> None:
    """Measure the errors of single layers, which must be of the size of rounding errors."""
    few = list(images(model))[:1]
    quantizer.layers, layers = (
        {k: v for k, v in quantizer.layers.items() if "head" in k or "stem.conv1" in k},
        quantizer.layers,
    )
    errors = quantizer.sensitivity(few)
    quantizer.layers = layers
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert errors.keys() == {
        "backbone.bottom_up.stem.conv1",
        "head.conv",
        "head.objectness_logits",
        "head.anchor_deltas",
    }
    # The rounding errors of weights and values are uniform: 1/sqrt(12) of a step of 1/64 or 1/255.
    assert all(1e-3 < error < 0.2 for error in errors.values())


def test_the_error_of_a_layer_is_that_of_its_worst_output(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, near = ([torch.ones(4), torch.full((4,), value)] for value in (2.0, 3.0))
    outputs = iter([exact, near])
    monkeypatch.setattr(int8, "_run", lambda *_: next(outputs))
    bare = object.__new__(Quantizer)
    bare.__dict__.update(layers={"a": []}, _model=None, quantize=lambda _: None)
    assert bare.sensitivity([]) == {"a": pytest.approx(0.5)}


def test_groups_match_whole_parts_of_a_name() -> None:
    for layer, group, inside in (
        ("backbone.bottom_up.stage5.0.aggregation", "stage5", True),
        ("backbone.fpn_output2", "backbone.fpn_output2", True),
        ("backbone.fpn_output23", "backbone.fpn_output2", False),
        ("backbone.fpn_output23", "fpn_outputs", True),
        ("head.conv", "head", True),
        ("header.conv", "head", False),
    ):
        assert int8._is_in(layer, group) == inside


# Files


def test_files_of_other_models(model: nn.Module, quantizer: Quantizer, tmp_path: Path) -> None:
    path, names = export_dense_part(model)
    with pytest.raises(ValueError, match=r"was not written by tools/export_model\.py --int8"):
        use_backend(model, "onnxruntime", int8=path)
    with pytest.raises(FileNotFoundError, match=r"There is no INT8 file gone\.onnx"):
        use_backend(model, "onnxruntime", int8="gone.onnx")
    with pytest.raises(ValueError, match=r"test_int8\.py is no ONNX file"):
        use_backend(model, "onnxruntime", int8=__file__)
    quantized = quantizer.quantize(["head.conv"])
    mark_quantized(quantized, model_key(model))
    onnx.save(quantized, tmp_path / "own.onnx")
    assert check_quantized(tmp_path / "own.onnx", model_key(model)) == (names, False)
    other = build_detector(small_config(MASK_RCNN))
    with pytest.raises(ValueError, match=r"own\.onnx was quantized from another model"):
        use_backend(other, "openvino", int8=tmp_path / "own.onnx")


def test_the_fastest_for_a_quantized_file(
    model: nn.Module, quantizer: Quantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use, "SIZE", (64, 64))
    quantized = quantizer.quantize(["head.conv"])
    mark_quantized(quantized, model_key(model))
    onnx.save(quantized, tmp_path / "own.onnx")
    compared = []
    monkeypatch.setattr(
        use,
        "time_interleaved",
        lambda cases, **kw: compared.append(cases) or {"openvino": [2.0], "onnxruntime": [1.0]},
    )
    chosen = use_backend(model, "auto", int8=tmp_path / "own.onnx")
    assert compared[0].keys() == {"openvino", "onnxruntime"}
    assert not list(chosen.backbone.parameters())


# Detections


def detections(boxes: list, scores: list, classes: list) -> tuple:
    return Boxes(torch.tensor(boxes).reshape(-1, 4)), torch.tensor(scores), torch.tensor(classes)


def test_a_report_names_missing_detections() -> None:
    nothing = {"detections": 0, "matched": 1.0, "score difference": 0.0}
    report = {"environment": {}, "megabytes": {"float32": "2", "INT8": "1"}, "float layers": []}
    page = to_markdown(report | {"agreement": nothing})
    assert "There is no float32 detection with a score of at least" in page
    assert "100" not in page


def test_agreement() -> None:
    a, b, c = [0.0, 0, 10, 10], [20.0, 20, 40, 40], [50.0, 0, 60, 10]
    expected = [
        detections([a, b, c, a], [0.9, 0.8, 0.6, 0.3], [0, 1, 1, 2]),
        detections([], [], []),
        detections([a, b], [0.7, 0.5], [0, 1]),
    ]
    near = [0.0, 0, 10, 10.5]  # an IoU of 0.952
    far = [20.0, 20, 40, 45]  # an IoU of 0.8
    found = [
        detections([near, far, c], [0.8, 0.8, 0.6], [0, 1, 2]),
        detections([a], [0.9], [0]),
        detections([a], [0.4], [0]),
    ]
    result = _agreement(expected, found)
    assert result["detections"] == 5  # a score of 0.5 counts
    assert result["matched"] == pytest.approx(2 / 5)
    assert result["score difference"] == pytest.approx((0.1 + 0.3) / 2)
    nothing = [detections([], [], [])] * 3
    assert _agreement(expected, nothing)["matched"] == 0
    assert _agreement(nothing, found) == {"detections": 0, "matched": 1.0, "score difference": 0.0}


# The tool


@pytest.mark.slow
def test_the_tool(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    launch(MINIATURE, tmp_path, "SOLVER.MAX_ITER", "1")
    arguments = ["--config-file", str(tmp_path / "config.yaml"), "--int8"]
    options = ["--opts", "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    calibration = ["--calibration", "coco_2017_train", "--calibration-images", "4"]
    run_export([*arguments, *calibration, *options])
    report = json.loads(Path("exported/dense.int8.json").read_text())
    assert report["images"] == 4
    assert report["data set"] == "coco_2017_val"
    assert report["results"].keys() == {"float32", "INT8"}
    assert report["results"]["INT8"].keys() == {"bbox AP", "segm AP"}
    assert report["megabytes"].keys() == {"float32", "INT8"}
    assert all("stage5" in n or "fpn_output" in n or "ese" in n for n in report["float layers"])
    page = Path("exported/dense.int8.md").read_text()
    assert "| bbox AP " in page
    assert "relative error" not in page
    # The AP in float equals that of an evaluation with torch.
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    expected = launch(MINIATURE, tmp_path / "float", "--eval-only", *weights)
    assert report["results"]["float32"]["bbox AP"] == pytest.approx(expected["bbox"]["AP"], abs=0.1)
    int8 = ["TEST.INT8", str(tmp_path / "exported/dense.int8.onnx"), "TEST.BACKEND", "onnxruntime"]
    found = launch(MINIATURE, tmp_path / "int8", "--eval-only", *weights, *int8)
    assert report["results"]["INT8"]["bbox AP"] == pytest.approx(found["bbox"]["AP"], abs=1e-6)
    # The same command gives the same file.
    content = Path("exported/dense.int8.onnx").read_bytes()
    run_export([*arguments, *calibration, *options, "DATASETS.TEST", "()"])
    assert Path("exported/dense.int8.onnx").read_bytes() == content
    assert "results" not in json.loads(Path("exported/dense.int8.json").read_text())


def test_images_are_drawn_by_a_seed(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = small_config(MASK_RCNN, DATASETS__TEST="()")
    all_images = {r["file_name"] for r in DatasetCatalog.get("coco_2017_train")}
    caplog.set_level("INFO", logger="vovnet_d2")
    drawn = [[r["file_name"] for r in find_images(cfg, "coco_2017_train", 3, s)] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3
    assert "all are used" not in caplog.text
    assert {r["file_name"] for r in find_images(cfg, "coco_2017_train", 99, 0)} == all_images
    assert f"coco_2017_train has {len(all_images)} images: all are used." in caplog.messages
    cfg.DATASETS.TEST, cfg.MODEL.ROI_HEADS.NUM_CLASSES = ("coco_2017_val",), 80
    find_images(cfg, "coco_2017_val", 1, 0)
    assert "calibrated on coco_2017_val, and evaluated on it, too" in caplog.text


def test_mistakes_of_the_tool(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizer: Quantizer
) -> None:
    monkeypatch.chdir(tmp_path)
    DatasetCatalog.register("empty", list)
    start = ["--config-file", MINIATURE, "--allow-partial"]
    options = ["--opts", *TINY, "MODEL.WEIGHTS", "", "DATASETS.TEST", "()"]
    for arguments, error, message in (
        (["--int8"], ValueError, "--int8 needs images: name a data set by --calibration"),
        (["--int8", "--calibration", "empty"], ValueError, "empty has no images to calibrate on"),
        (
            ["--int8", "--calibration", "coco_2017_test"],
            FileNotFoundError,
            "coco_2017_test",
        ),
        (["--int8", "--calibration", "nowhere"], KeyError, "'nowhere' to calibrate on is not reg"),
        (
            ["--int8", "--calibration", "empty", "--calibration-images", "0"],
            ValueError,
            "--calibration-images 0 is less than 1",
        ),
        (
            ["--int8", "--calibration", "empty", "--part", "fpn"],
            ValueError,
            "--int8 writes the part dense as onnx",
        ),
        (["--keep-float", "stem"], ValueError, "go with --int8: add it"),
        (["--for-tensorrt"], ValueError, "go with --int8: add it"),
    ):
        with pytest.raises(error, match=message):
            run_export([*start, *arguments, *options])
    with pytest.raises(ValueError, match=r"no stage9 in the network .*: choose from stem, "):
        quantizer.select(["stage9"])
    with pytest.raises(ValueError, match="nothing is left to quantize"):
        quantizer.select(["backbone", "head"])
    assert not Path("exported").exists()


def test_predictor_takes_a_quantized_file(
    tmp_path: Path, coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = save(tmp_path)
    predictor = Predictor(cfg, backend="onnxruntime")
    small = build_detector(small_config(MASK_RCNN))
    small.load_state_dict(torch.load(cfg.MODEL.WEIGHTS)["model"])
    cfg.DATASETS.TEST = ()
    records = [{"file_name": str(file)} for file in PICTURES]
    quantize_detector(small, cfg, records, tmp_path / "out", sensitivity=0)
    file = tmp_path / "out/dense.int8.onnx"
    quantized = Predictor(cfg, backend="onnxruntime", int8=file)
    assert Predictor(cfg, int8=file).cfg.TEST.BACKEND == "auto"
    a, b = (p(PICTURES[0])["instances"].scores for p in (predictor, quantized))
    assert len(a) == len(b)
    assert 0 < (a - b).abs().max() < 0.3
    assert isinstance(quantized(PICTURES[0])["instances"], Instances)
    assert KEEP_FLOAT[0] == "stage5"
