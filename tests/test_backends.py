# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectors whose dense part runs in OpenVINO or ONNX Runtime, against torch alone."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from engine_runs import MASK_RCNN as MINIATURE
from engine_runs import launch, note_evaluated, read_log
from export_models import FASTER_RCNN, MASK_RCNN, RETINANET, build_detector, small_config
from predictor_runs import DETECTORS, PICTURES, assert_close, save
from torch import nn

from vovnet_d2 import Predictor
from vovnet_d2.backends import BACKENDS, CACHE, cache_folder, check_backend, use, use_backend
from vovnet_d2.backends.cache import export_dense_part, model_key
from vovnet_d2.data.image_file import read_image
from vovnet_d2.export import formats
from vovnet_d2.export.dense import DensePart

pytest_plugins = ["engine_fixtures"]

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
INSTALLED = ("openvino", "onnxruntime")
FCOS = "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml"
DSOD = "Digits/dsod192_V_27_slim_600.yaml"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def mask_rcnn(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    return save(tmp_path_factory.mktemp("mask_rcnn"))


@pytest.fixture(scope="module")
def retinanet() -> nn.Module:
    return build_detector(small_config(RETINANET))


def sizes() -> list[np.ndarray]:
    """Two images that are padded alike and run together, and one of another shape."""
    china, flower = (read_image(file) for file in PICTURES)
    return [china[::3, ::3], flower[::4, 1::4], flower[:300, :200]]


@pytest.mark.parametrize(
    "detector",
    [
        "Mask R-CNN",
        "RetinaNet",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in sorted(DETECTORS.keys() - {"Mask R-CNN", "RetinaNet"})
        ),
    ],
)
def test_the_same_predictions_as_torch(detector: str, tmp_path: Path) -> None:
    config, options = DETECTORS[detector]
    cfg = save(tmp_path, config, **options)
    images = sizes()
    expected = Predictor(cfg)(images)
    for backend in INSTALLED:
        predictor = Predictor(cfg, backend=backend)
        for found, wanted in zip(predictor(images), expected, strict=True):
            assert_close(found, wanted)
            assert len(wanted.get("instances", "four")) > 3
        # The dense part is not torch's any more.
        assert not list(DensePart(predictor.model).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("config", [FCOS, DSOD])
def test_other_dense_heads(config: str) -> None:
    """Their outputs, as untrained ones find nothing that could be compared."""
    model = build_detector(small_config(config, MODEL__FCOS__NUM_CONVS=1))
    images = torch.rand(1, 3, 256, 256)  # group norm refuses feature maps of one pixel
    with torch.no_grad():
        features = model.backbone(images)
        expected = model.head([features[name] for name in model.head_in_features])
        for backend in INSTALLED:
            other = use_backend(model, backend)
            features = other.backbone(images)
            found = other.head([features[name] for name in other.head_in_features])
            assert len(found) == len(expected) == (3 if config == FCOS else 2)
            for kinds in zip(found, expected, strict=True):
                for a, b in zip(*kinds, strict=True):
                    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_a_head_is_not_given_other_feature_maps(mask_rcnn: CfgNode) -> None:
    model = Predictor(mask_rcnn, backend="onnxruntime").model
    features = list(model.backbone(torch.rand(1, 3, 64, 64)).values())
    with pytest.raises(AssertionError, match="not the backbone's last"):
        model.proposal_generator.rpn_head([f.clone() for f in features])


# The cache


def test_a_file_is_made_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write(target: object, path: Path) -> None:
        written.append(target)
        path.write_bytes(bytes(5000))

    fake = formats.Format(".onnx", write, formats.load_onnxruntime)
    monkeypatch.setitem(formats.FORMATS, "onnx", fake)
    model = build_detector(small_config(MASK_RCNN))
    path, names = export_dense_part(model)
    assert path.parent == empty_cache
    assert {"p2", "p6", "head0_p2", "head1_p6"} < set(names)
    assert export_dense_part(model.train()) == (path, names)
    assert len(written) == 1
    # A file that was cut short since is put aside, and made again.
    path.write_bytes(bytes(1000))
    assert export_dense_part(model) == (path, names)
    assert path.stat().st_size == 5000
    assert len(written) == 2
    assert Path(f"{path}.before").stat().st_size == 1000
    next(model.backbone.parameters()).data[0] += 1
    assert export_dense_part(model)[0] != path
    assert len(written) == 3


def test_a_key_is_of_the_content() -> None:
    options = small_config(MASK_RCNN)
    model, same = build_detector(options), build_detector(options)
    assert model_key(model) != model_key(same)  # other random weights
    same.load_state_dict(model.state_dict())
    key = model_key(model)
    assert model_key(same.train()) == key
    same.roi_heads.box_predictor.cls_score.bias.data += 1  # which torch computes
    assert model_key(same) == key
    same.proposal_generator.rpn_head.conv.bias.data += 1
    assert model_key(same) != key
    for option in ({"MODEL.VOVNET.STEM": "pooled"}, {"MODEL.FPN.FUSE_TYPE": "avg"}):
        other = build_detector(small_config(MASK_RCNN, **option))
        other.load_state_dict(model.state_dict())
        assert model_key(other) != key, option


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "~/models")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/models")
    monkeypatch.delenv(CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/vovnet_d2")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert cache_folder() == Path("/scratch/vovnet_d2")


# The fastest


@pytest.mark.parametrize("fastest", ["torch", "openvino", "onnxruntime"])
def test_auto_takes_the_fastest(
    fastest: str,
    retinanet: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for kept in cache_folder().glob("fastest-*.json"):
        kept.unlink()
    calls = []

    def measure(cases: dict, **kwargs: object) -> dict[str, list[float]]:
        calls.append({name: case() for name, case in cases.items()})
        return {name: [9.0, 0.1 if name == fastest else 0.2, 0.0] for name in cases}

    monkeypatch.setattr(use, "time_interleaved", measure)
    monkeypatch.setattr(use, "SIZE", (60, 64))
    loaded = []
    for name in INSTALLED:
        load = BACKENDS[name].load
        backend = type(BACKENDS[name])(
            BACKENDS[name].packages,
            lambda *args, name=name, load=load: loaded.append(name) or load(*args),
            BACKENDS[name].why_not,
        )
        monkeypatch.setitem(BACKENDS, name, backend)
    with caplog.at_level("INFO", logger="vovnet_d2"):
        use_backend(retinanet, "auto")
    assert calls[0].keys() == {"torch", *INSTALLED}
    for found in calls[0].values():  # all did the same work
        for a, b in zip(found, calls[0]["torch"], strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    (message,) = [m for m in caplog.messages if "auto" in m]
    assert message.startswith(f"The backend auto is {fastest}: torch")
    assert f"{fastest} 100 ms" in message
    # The outcome is kept, and only the chosen one is loaded.
    loaded.clear()
    chosen = use_backend(retinanet, "auto")
    assert len(calls) == 1
    assert loaded == [name for name in INSTALLED if name == fastest]
    assert bool(list(chosen.backbone.parameters())) == (fastest == "torch")
    (kept,) = cache_folder().glob("fastest-*.json")
    assert json.loads(kept.read_text())[fastest] == 0.1
    kept.write_text("{}")
    use_backend(retinanet, "auto")
    assert len(calls) == 2


def test_auto_without_any_package_is_torch(
    retinanet: nn.Module, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "onnxruntime", "openvino")
    model = use_backend(retinanet, "auto")
    assert list(model.backbone.parameters())
    assert not empty_cache.exists()


# TensorRT, which needs a GPU: ONNX Runtime is asked for it, and computes on the CPU in its place


def test_tensorrt_is_asked_of_onnx_runtime(
    retinanet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    session, asked = onnxruntime.InferenceSession, []

    def open_session(path: Path, options: object, providers: list) -> object:
        asked.extend(providers)
        return session(path, options, ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    check_backend("tensorrt", GPU)
    path, _ = export_dense_part(retinanet)
    images = torch.rand(1, 3, 128, 128)
    found = BACKENDS["tensorrt"].load(path, GPU)(images)
    (name, options), *others = asked
    assert name == "TensorrtExecutionProvider"
    assert others == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert options["device_id"] == 1
    assert options["trt_engine_cache_path"] == str(path.parent)
    assert options["trt_engine_cache_prefix"] == path.stem
    with torch.no_grad():
        expected = DensePart(retinanet)(images)
    for a, b in zip(found, expected.values(), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


# Mistakes


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if these packages were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in packages else find_spec(name)
    )


def test_a_missing_package(mask_rcnn: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openvino", "onnxscript")
    message = "The backend openvino needs openvino, onnxscript: pip install openvino onnxscript."
    with pytest.raises(ModuleNotFoundError) as error:
        Predictor(mask_rcnn, backend="openvino")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "device", "int8", "message"),
    [
        ("onnx", CPU, False, "Unknown backend 'onnx': choose from torch, openvino, onnxruntime, "),
        ("tensorrt", CPU, False, "The backend tensorrt cannot be used on cpu: it needs a GPU."),
        ("openvino", GPU, False, "openvino cannot be used on cuda:1: it computes on CPUs."),
        ("onnxruntime", GPU, False, "installed has no CUDAExecutionProvider"),
        ("tensorrt", GPU, False, "installed has no TensorrtExecutionProvider"),
        ("torch", CPU, True, "torch runs no INT8 file: choose from openvino, onnxruntime, auto."),
        ("tensorrt", GPU, True, "tensorrt runs no INT8 file: choose from openvino, onnxruntime"),
    ],
)
def test_backends_that_cannot_be_used(
    name: str, device: torch.device, int8: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match=message):
        check_backend(name, device, int8=int8)


def test_what_is_torch_s_alone(mask_rcnn: CfgNode) -> None:
    for options in ({"compile": True}, {"dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match="leave them out with backend openvino"):
            Predictor(mask_rcnn, backend="openvino", **options)


class Unknown(nn.Module):
    """No operator of ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.align = ROIAlign((4, 4), 1.0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.linalg.svd(x)
        if x.sum() > 0:
            return x
        return x * 2


def test_an_operator_that_does_not_export(empty_cache: Path) -> None:
    model = build_detector(small_config(FASTER_RCNN))
    model.backbone.bottom_up.stem = nn.Sequential(Unknown(), model.backbone.bottom_up.stem)
    with pytest.raises(ValueError, match="only the backend torch runs this model") as error:
        use_backend(model, "openvino")
    assert "\n" not in str(error.value)
    assert not list(empty_cache.glob("*.onnx*"))


# The tools


def test_evaluation(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(MINIATURE, tmp_path, "SOLVER.MAX_ITER", "1")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    seen = note_evaluated(monkeypatch)
    expected = launch(MINIATURE, tmp_path / "torch", "--eval-only", *weights)
    found = launch(
        MINIATURE, tmp_path / "other", "--eval-only", *weights, "TEST.BACKEND", "openvino"
    )
    assert "Evaluating with the backend openvino." in read_log(tmp_path / "other")
    assert [bool(list(model.backbone.parameters())) for model in seen] == [True, False]
    for task, metrics in expected.items():
        np.testing.assert_allclose(
            [found[task][name] for name in metrics], list(metrics.values()), atol=0.1
        )
    with pytest.raises(ValueError, match="Unknown backend 'openvine'"):
        launch(MINIATURE, tmp_path / "wrong", "--eval-only", "TEST.BACKEND", "openvine")
