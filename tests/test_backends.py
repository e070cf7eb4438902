# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectors whose dense part runs in OpenVINO or ONNX Runtime, compared with torch alone."""

import copy
import importlib.metadata
import importlib.util
import json
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import test_lazyconfig
import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from detectron2.utils.env import seed_all_rng
from engine_runs import MASK_RCNN as MINIATURE
from engine_runs import launch, note_evaluated, read_log
from export_models import FASTER_RCNN, MASK_RCNN, RETINANET, build_detector, small_config
from predictor_runs import DETECTORS, PICTURES, assert_close, save
from torch import nn

from vovnet_d2 import Predictor, timing
from vovnet_d2.backends import (
    BACKENDS,
    CACHE,
    cache,
    cache_folder,
    check_backend,
    rank_backends,
    use,
    use_backend,
)
from vovnet_d2.backends.cache import export_dense_part, file_digest, model_key
from vovnet_d2.backends.detector import run_dense_part_elsewhere
from vovnet_d2.backends.programs import find_backends
from vovnet_d2.data.image_file import read_image
from vovnet_d2.engine import load_config, main_process
from vovnet_d2.engine.precision import predict_in_float32
from vovnet_d2.export import formats
from vovnet_d2.export.dense import DensePart
from vovnet_d2.export.report import _environment
from vovnet_d2.timing import package_version

pytest_plugins = ["engine_fixtures"]

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
INSTALLED = ("openvino", "onnxruntime")
FCOS = "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml"
DSOD = "Digits/dsod192_V_27_slim_600.yaml"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


# These networks have the seed of the tests, so that one export serves all tests.


@pytest.fixture(scope="module")
def mask_rcnn(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    seed_all_rng(0)
    return save(tmp_path_factory.mktemp("mask_rcnn"))


@pytest.fixture(scope="module")
def retinanet() -> nn.Module:
    seed_all_rng(0)
    return build_detector(small_config(RETINANET))


def sizes() -> list[np.ndarray]:
    """Return two images that are padded to the same size, and one image of another shape."""
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
        # The dense part has no torch parameters any more.
        assert not list(DensePart(predictor.model).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("config", [FCOS, DSOD])
def test_other_dense_heads(config: str) -> None:
    """Compare outputs of heads, because untrained heads of this kind find no objects."""
    model = build_detector(small_config(config, MODEL__FCOS__NUM_CONVS=1))
    images = torch.rand(1, 3, 256, 256)
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
    with pytest.raises(AssertionError, match="Feature maps are not the last ones"):
        model.proposal_generator.rpn_head([f.clone() for f in features])


def test_images_are_padded_as_the_backbone_needs(retinanet: nn.Module) -> None:
    class Square(type(retinanet.backbone)):
        padding_constraints = {"square_size": 256, "size_divisibility": 64}

    model = copy.deepcopy(retinanet)
    model.backbone.__class__ = Square
    backbone = run_dense_part_elsewhere(model, None, ()).backbone
    assert backbone.padding_constraints == Square.padding_constraints
    assert backbone.size_divisibility == retinanet.backbone.size_divisibility


# The cache


def test_a_network_is_exported_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # A file that is now truncated is moved aside and made again.
    path.write_bytes(bytes(1000))
    assert export_dense_part(model) == (path, names)
    assert path.stat().st_size == 5000
    assert len(written) == 2
    assert Path(f"{path}.before").stat().st_size == 1000
    next(model.backbone.parameters()).data[0] += 1
    changed, _ = export_dense_part(model)
    assert changed != path
    assert len(written) == 3
    # Another version of torch or of the exporter makes another file.
    monkeypatch.setattr(cache, "version", lambda package: "99.0")
    assert export_dense_part(model)[0] not in (path, changed)
    assert len(written) == 4


def test_the_key_of_a_file_depends_on_its_content() -> None:
    options = small_config(MASK_RCNN)
    model, same = build_detector(options), build_detector(options)
    assert model_key(model) != model_key(same)  # they have other random weights
    same.load_state_dict(model.state_dict())
    key = model_key(model)
    assert model_key(same.train()) == key
    predict_in_float32(same, load_config("", ["SOLVER.AMP.ENABLED", "True"]))
    assert model_key(same) == key
    same.roi_heads.box_predictor.cls_score.bias.data += 1  # torch computes this part
    assert model_key(same) == key
    same.proposal_generator.rpn_head.conv.bias.data += 1
    assert model_key(same) != key
    strided = copy.deepcopy(model)
    strided.backbone.fpn_output2.stride = (2, 2)
    assert model_key(strided) != key
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


def test_a_cache_folder_that_cannot_be_made(
    retinanet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    for name in ("onnxruntime", "auto"):
        with pytest.raises(OSError, match=r"cannot be made \(.*\): name another one in .*_CACHE"):
            use_backend(retinanet, name)


# The fastest


@pytest.fixture
def nothing_measured() -> None:
    """Remove the measured times of backends from the cache, but keep the exported files."""
    for kept in cache_folder().glob("fastest-*.json"):
        kept.unlink()


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("fastest", ["torch", "onnxruntime"])
def test_auto_takes_the_fastest(
    fastest: str,
    retinanet: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
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
            BACKENDS[name].has_half,
        )
        monkeypatch.setitem(BACKENDS, name, backend)
    with caplog.at_level("INFO", logger="vovnet_d2"):
        use_backend(retinanet, "auto")
    assert calls[0].keys() == {"torch", *INSTALLED}
    for found in calls[0].values():  # all compute the same
        for a, b in zip(found, calls[0]["torch"], strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert calls[0]["torch"][0].shape[2:] == (8, 8)  # the image is padded to 64 × 64 pixels
    (message,) = [m for m in caplog.messages if "auto" in m]
    assert message.startswith(f"The backend auto is {fastest}: torch")
    assert f"{fastest} 100 ms" in message
    # The result is kept, and later only the chosen backend is loaded.
    loaded.clear()
    chosen = use_backend(retinanet, "auto")
    assert len(calls) == 1
    assert loaded == [name for name in INSTALLED if name == fastest]
    assert bool(list(chosen.backbone.parameters())) == (fastest == "torch")
    (kept,) = cache_folder().glob("fastest-*.json")
    assert json.loads(kept.read_text())[fastest] == 0.1


def test_times_are_kept_by_network_and_machine(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, measured = tmp_path / "dense.onnx", []

    def measure(
        model: object, path: Path, device: object, names: list[str], *_: object
    ) -> dict[str, float]:
        measured.append(path.read_bytes())
        return dict.fromkeys(names, 0.1)

    def rank() -> None:
        rank_backends(SimpleNamespace(device="cpu"))

    monkeypatch.setattr(use, "_find_file", lambda *_: (file, (), True))
    monkeypatch.setattr(use, "_measure", measure)
    file.write_bytes(b"one")
    rank()
    (kept,) = empty_cache.glob("fastest-*.json")
    whole = kept.read_text()
    for damaged in ("{}", '{"torch": 1.0}'):
        kept.write_text(damaged)
        rank()
        assert kept.read_text() == whole
    for content in (b"another", b"one", b"another"):
        file.write_bytes(content)
        rank()
    assert measured == [b"one", b"one", b"one", b"another"]
    # Another precision and another machine are measured, too.
    capable = replace(BACKENDS["openvino"], has_half=lambda: True)
    monkeypatch.setitem(BACKENDS, "openvino", capable)
    rank_backends(SimpleNamespace(device="cpu"), dtype=torch.bfloat16)
    monkeypatch.setattr(use, "_describe_machine", lambda *_: "another machine")
    rank()
    assert measured[4:] == [b"another"] * 2


def test_openvino_computes_in_float32_with_torchs_threads(
    retinanet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    class Core(openvino.Core):
        def compile_model(self, *args: object) -> openvino.CompiledModel:
            compiled.append(super().compile_model(*args))
            return compiled[0]

    monkeypatch.setattr(openvino, "Core", Core)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    BACKENDS["openvino"].load(export_dense_part(retinanet)[0], CPU, "float32")
    assert compiled[0].get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert compiled[0].get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize("precision", ["float32", "half", "int8"])
@pytest.mark.parametrize("capable", [True, False])
def test_openvino_computes_in_bfloat16_if_the_cpu_has_it(
    precision: str, capable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", *["BF16"] * capable]

        def compile_model(self, path: Path, device: str, settings: dict[str, Any]) -> None:
            asked.append(settings["INFERENCE_PRECISION_HINT"])

    monkeypatch.setattr(openvino, "Core", Core)
    BACKENDS["openvino"].load(Path("dense.onnx"), CPU, precision)
    assert asked == ["bf16" if capable and precision != "float32" else "f32"]
    assert ("openvino" in find_backends(CPU, half=True)) == capable
    message = "openvino computes in float32 on this machine: choose from torch, auto, or float32"
    with nullcontext() if capable else pytest.raises(ValueError, match=message):
        check_backend("openvino", CPU, half=True)


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the precisions in which OpenVINO is asked to compute, as they come. It seems to have
    half precision, and computes in float32 on a CPU without bfloat16."""
    asked: list[str] = []
    load = BACKENDS["openvino"].load
    noting = replace(
        BACKENDS["openvino"],
        load=lambda *args: asked.append(args[2]) or load(*args),
        has_half=lambda: True,
    )
    monkeypatch.setitem(BACKENDS, "openvino", noting)
    return asked


def test_half_precision(
    retinanet: nn.Module, precisions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with the model in float32."""
    images = torch.rand(1, 3, 128, 128)
    exact = retinanet.backbone(images)
    for backend in ("torch", "openvino"):
        found = use_backend(retinanet, backend, dtype=torch.bfloat16).backbone(images)
        assert precisions == ["half"] * (backend == "openvino")
        for name, feature_map in found.items():
            assert feature_map.dtype == torch.float32
            error = (feature_map - exact[name]).norm() / exact[name].norm()
            assert error < 0.03
            assert error > 1e-4 or backend == "openvino"
    compared = []

    def measure(cases: dict, **_: object) -> dict[str, list[float]]:
        compared.extend(cases)
        return {name: [1.0] for name in cases}

    monkeypatch.setattr(use, "time_interleaved", measure)
    monkeypatch.setattr(use, "SIZE", (60, 64))
    use_backend(retinanet, "auto", dtype=torch.bfloat16)
    assert compared == ["torch", "openvino"]


def test_auto_without_any_package_is_torch(
    retinanet: nn.Module, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "onnxruntime", "openvino")
    model = use_backend(retinanet, "auto")
    assert list(model.backbone.parameters())
    assert not empty_cache.exists()


def fail(*_: object) -> None:
    raise RuntimeError("the driver\nis too old")


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("moment", ["asking", "loading", "running"])
def test_auto_passes_over_a_broken_backend(
    moment: str,
    retinanet: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Check for one warning with its name. The choice is not kept, so it is tried again later."""
    times = {"torch": 0.3, "openvino": 0.1, "onnxruntime": 0.2}
    monkeypatch.setattr(use, "time_interleaved", lambda cases, **_: {n: [times[n]] for n in cases})
    monkeypatch.setattr(use, "SIZE", (60, 64))
    whole = BACKENDS["openvino"]
    broken = {
        "asking": replace(whole, why_not=fail),
        "loading": replace(whole, load=fail),
        "running": replace(whole, load=lambda *_: fail),
    }
    monkeypatch.setitem(BACKENDS, "openvino", broken[moment])
    with caplog.at_level("WARNING", logger="vovnet_d2"):
        chosen = use_backend(retinanet, "auto")
    assert not list(chosen.backbone.parameters())
    (message,) = caplog.messages
    assert message.startswith("The backend openvino is installed and fails")
    assert message.endswith("RuntimeError: the driver is too old")
    assert rank_backends(retinanet) == ["onnxruntime", "torch"]
    # Without the broken backend, the times of the others are kept.
    assert bool(list(cache_folder().glob("fastest-*.json"))) == (moment == "asking")
    monkeypatch.setitem(BACKENDS, "openvino", whole)
    assert rank_backends(retinanet) == ["openvino", "onnxruntime", "torch"]


def test_the_next_backend_is_used_if_one_fails(
    retinanet: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Load a backend that was the fastest when it was measured, but is broken now."""
    monkeypatch.setitem(BACKENDS, "openvino", replace(BACKENDS["openvino"], load=fail))
    with caplog.at_level("WARNING", logger="vovnet_d2"):
        chosen = use_backend(retinanet, ["openvino", "torch"])
    assert list(chosen.backbone.parameters())
    assert len(caplog.messages) == 1
    message = r"openvino is installed and fails \(RuntimeError: the driver is too old\): install"
    with pytest.raises(ValueError, match=message):
        use_backend(retinanet, "openvino")
    monkeypatch.setitem(BACKENDS, "openvino", replace(BACKENDS["openvino"], why_not=fail))
    with pytest.raises(ValueError, match=message):
        check_backend("openvino", CPU)


@pytest.mark.parametrize("is_first", [True, False])
def test_processes_use_the_measurement_of_the_first(
    retinanet: nn.Module, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    engine_run: Any = import_module("vovnet_d2.engine.run")
    calls = []
    found = ["onnxruntime", "torch"]
    monkeypatch.setattr(engine_run, "rank_backends", lambda *_, **__: calls.append(1) or found)
    monkeypatch.setattr(main_process.comm, "is_main_process", lambda: is_first)
    given = []
    monkeypatch.setattr(main_process.comm, "all_gather", lambda x: given.append(x) or [found, x])
    assert engine_run._rank_together(retinanet, small_config(RETINANET)) == found
    assert calls == [1] * is_first
    assert given == [found if is_first else None]


def test_the_version_of_a_module_of_another_package() -> None:
    """Check that the version of the module onnxruntime is found in the package onnxruntime-gpu."""
    assert package_version("yaml") == importlib.metadata.version("PyYAML")
    assert package_version("torch") == importlib.metadata.version("torch")
    assert package_version("nowhere") == "of unknown version"


def test_the_report_of_an_export_with_onnxruntime_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a module of the report whose package has another name."""

    def find_version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.99" if name == "onnxruntime-gpu" else importlib.metadata.version(name)

    monkeypatch.setattr(timing, "version", find_version)
    packages = {"onnxruntime": ["onnxruntime-gpu"]}
    monkeypatch.setattr(timing, "packages_distributions", lambda: packages)
    found = _environment(torch.device("cpu"), ["onnx"])
    assert found["onnxruntime"] == "1.99"
    assert found["onnx"] == importlib.metadata.version("onnx")


# TensorRT needs a GPU. Here ONNX Runtime is asked for TensorRT, but computes on the CPU instead.


@pytest.mark.parametrize("precision", ["float32", "half"])
def test_tensorrt_is_asked_of_onnx_runtime(
    precision: str,
    retinanet: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    session, asked, threads = onnxruntime.InferenceSession, [], []

    def open_session(path: Path, options: Any, providers: list) -> object:
        asked.extend(providers)
        threads.append(options.intra_op_num_threads)
        return session(path, options, ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check_backend("tensorrt", GPU)
    path, _ = export_dense_part(retinanet)
    images = torch.rand(1, 3, 128, 128)
    found = BACKENDS["tensorrt"].load(path, GPU, precision)(images)
    assert "ONNX Runtime computes on the CPU, not on cuda:1: onnxruntime-gpu" in caplog.text
    (name, options), *others = asked
    assert name == "TensorrtExecutionProvider"
    assert others == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert threads == [2]
    assert options["device_id"] == 1
    # An engine with other weights has another name, in the cache of the user.
    assert options["trt_engine_cache_path"] == str(cache_folder())
    prefix = options["trt_engine_cache_prefix"]
    assert prefix.startswith(f"{precision}-")
    other = tmp_path / path.name
    other.write_bytes(path.read_bytes() + b"\0")
    assert file_digest(path) in prefix
    assert file_digest(other) not in prefix
    assert options["trt_fp16_enable"] == (precision == "half")
    assert not options["trt_int8_enable"]
    with torch.no_grad():
        expected = DensePart(retinanet)(images)
    for a, b in zip(found, expected.values(), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


# Mistakes


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make these packages appear as not installed."""
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
        ("torch", CPU, True, "torch cannot run an INT8 file: choose from openvino, onnxruntime, t"),
    ],
)
def test_backends_that_cannot_be_used(
    name: str, device: torch.device, int8: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match=message):
        check_backend(name, device, int8=int8)


def test_options_of_backends(mask_rcnn: CfgNode, precisions: list[str]) -> None:
    # The dtype of the training on another machine does not matter.
    trained = mask_rcnn.clone()
    trained.SOLVER.AMP.DTYPE = "float16"
    trained.TEST.AMP.ENABLED = True
    for cfg in (mask_rcnn, trained):
        Predictor(cfg, backend="openvino", dtype=torch.bfloat16)
    assert precisions == ["half", "half"]
    with pytest.raises(ValueError, match="Only the backend torch can be compiled: leave out"):
        Predictor(mask_rcnn, backend="openvino", compile=True)
    message = "onnxruntime computes in float32 on this machine: choose from torch, openvino, auto"
    with pytest.raises(ValueError, match=message):
        Predictor(mask_rcnn, backend="onnxruntime", dtype=torch.bfloat16)
    check_backend("onnxruntime", CPU, int8=True, half=True)  # only the rest of a file is float
    with pytest.raises(ValueError, match=r"dtype is torch.float64: choose from torch.float32,"):
        Predictor(mask_rcnn, backend="openvino", dtype=torch.float64)


class Unknown(nn.Module):
    """Network with an operator that ONNX does not have."""

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


def test_evaluation(
    coco: Path, tmp_path: Path, precisions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    half = ["TEST.BACKEND", "openvino", "TEST.AMP.ENABLED", "True"]
    launch(MINIATURE, tmp_path / "half", "--eval-only", *weights, *half)
    assert precisions == ["float32", "half"]
    for name, backend in (("other", "openvino, float32"), ("half", "openvino, half precision")):
        facts = json.loads((tmp_path / name / "results.json").read_text())["run"]
        assert facts["backend"] == backend
    for words, message in (
        (["TEST.BACKEND", "openvine"], "Unknown backend 'openvine'"),
        (["TEST.BACKEND", "auto", "TEST.INT8", "gone.onnx"], "There is no INT8 file gone.onnx"),
        (["TEST.AMP.ENABLED", "True", "TEST.BACKEND", "onnxruntime"], "ime computes in float32"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            launch(MINIATURE, tmp_path / "wrong", "--eval-only", *words)


@pytest.mark.slow
def test_evaluation_of_a_lazy_config(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_lazyconfig.launch(tmp_path, "train.max_iter=1", "dataloader.test.dataset.names=null")
    words = ["--eval-only", f"train.init_checkpoint={tmp_path / 'model_final.pth'}"]
    seen = note_evaluated(monkeypatch)
    results = [
        test_lazyconfig.launch(tmp_path / name, *words, f"train.backend={name}")
        for name in ("torch", "openvino")
    ]
    assert [bool(list(model.backbone.parameters())) for model in seen] == [True, False]
    np.testing.assert_allclose(*(list(r["bbox"].values()) for r in results), atol=0.1)
    with pytest.raises(ValueError, match="Unknown backend 'openvine'"):
        test_lazyconfig.launch(tmp_path / "wrong", "--eval-only", "train.backend=openvine")
