# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the command line tools/export_model.py."""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import export_model
import onnxruntime
import pytest
import sklearn.datasets
import torch
from detectron2.checkpoint import DetectionCheckpointer
from export_models import MASK_RCNN, OPTIONS, RETINANET, build_detector, run_export, small_config

from vovnet_d2.export import load, parity
from vovnet_d2.export import report as report_module

PICTURES = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def options(**more) -> list[str]:
    """Return the options that come last on a command line."""
    pairs = OPTIONS | {"INPUT.MIN_SIZE_TEST": 120} | more
    pairs.pop("MODEL.DEVICE", None)  # --device sets it
    return ["--opts", *(str(word) for pair in pairs.items() for word in pair)]


def export(*args: str, config: str = MASK_RCNN, **more) -> dict:
    """Run the tool, by default with random weights, and return its report."""
    partial = [] if "MODEL.WEIGHTS" in more else ["--allow-partial"]
    run_export(["--config-file", config, *args, *partial, *options(**more)])
    (report,) = Path("exported").glob("*.json")
    return json.loads(report.read_text())


def test_report_of_a_backbone(capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    sizes = ["64x96", "33x51"]
    report = export("--part", "backbone", "--format", "torchscript", "--sizes", *sizes)
    (result,) = report["exports"]
    assert [check["input"] for check in result["checks"]] == ["1×3×64×96", "2×3×33×51"]
    assert report["outputs"] == ["stage2", "stage3", "stage4", "stage5"]
    assert report["weights"] == "none: random"
    for check in result["checks"]:
        assert check["differences"].keys() == set(report["outputs"])
        assert all(0 <= d["relative"] < 1e-4 for d in check["differences"].values())
        assert check["exported_ms"] > 0
        assert check["time_ratio"] > 0
    assert result["nodes"] == sum(result["operators"].values())
    file = Path("exported") / result["file"]
    assert result["megabytes"] == round(file.stat().st_size / 1e6, 1)
    assert load("torchscript", file)(torch.rand(1, 3, 64, 64))[0].shape == (1, 14, 16, 16)
    markdown = Path("exported/backbone.md").read_text()
    assert markdown in capsys.readouterr().out
    assert "| torchscript |" in markdown
    for fact in ("torch: ", "threads: ", "device: ", "command: ", "aten::_convolution"):
        assert fact in markdown
    assert not torch.backends.cudnn.allow_tf32  # rounding of the eager model would be a difference


def test_detector_with_weights_on_pictures(tmp_path):
    model = build_detector(small_config(RETINANET))
    DetectionCheckpointer(model, str(tmp_path)).save("weights")
    report = export(
        *("--images", *map(str, PICTURES)),
        config=RETINANET,
        **{"MODEL.WEIGHTS": str(tmp_path / "weights.pth")},
    )
    (result,) = report["exports"]
    assert [check["input"] for check in result["checks"]] == ["3×120×180", "3×120×180"]
    for check in result["checks"]:
        found = check["differences"]["detections"]
        assert found["expected"] == found["matched"] > 0
        assert found["iou"] > 0.99
    assert result["exporter"] == "torch.onnx (TorchScript)"
    assert "Constant" not in result["operators"]
    model = onnxruntime.InferenceSession("exported/detector.onnx")
    assert [entry.name for entry in model.get_inputs()] == report["inputs"]
    assert model.get_inputs()[0].shape == [3, "image_height", "image_width"]
    assert [entry.name for entry in model.get_outputs()] == report["outputs"]
    assert result["opset"] == 20


def test_random_heads_are_refused(tmp_path):
    """Use weights of a backbone, like the weights in the config files of this package."""
    model = build_detector(small_config(RETINANET))
    backbone = model.backbone.bottom_up.state_dict()
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    weights = {"MODEL.WEIGHTS": str(tmp_path / "backbone.pth")}
    for part in ("detector", "fpn"):
        with pytest.raises(
            ValueError, match=r"outside the backbone, for example backbone\.fpn.*--allow-partial"
        ):
            export("--part", part, "--format", "torchscript", config=RETINANET, **weights)
    with pytest.raises(ValueError, match=r"no weights to export.*--allow-partial"):
        export(config=RETINANET, **{"MODEL.WEIGHTS": ""})
    assert not Path("exported").exists()


def test_a_part_only_needs_its_own_weights(tmp_path):
    model = build_detector(small_config(RETINANET))
    backbone = {
        f"backbone.bottom_up.{k}": v for k, v in model.backbone.bottom_up.state_dict().items()
    }
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    weights = {"MODEL.WEIGHTS": str(tmp_path / "backbone.pth")}
    arguments = ["--format", "torchscript", "--sizes", "64x64"]
    with pytest.raises(ValueError, match=r"backbone\.fpn_"):
        export("--part", "fpn", *arguments, config=RETINANET, **weights)
    report = export("--part", "backbone", *arguments, config=RETINANET, **weights)
    assert report["weights"] == weights["MODEL.WEIGHTS"]
    run_export(["--config-file", RETINANET, "--allow-partial", *arguments, *options(**weights)])
    assert Path("exported/detector.ts").is_file()


def test_a_detector_needs_weights_of_its_heads(tmp_path):
    state = build_detector(small_config(RETINANET)).state_dict()
    backbone = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    weights = {"MODEL.WEIGHTS": str(tmp_path / "backbone.pth")}
    with pytest.raises(ValueError, match=r"head\."):
        export("--format", "torchscript", "--sizes", "64x64", config=RETINANET, **weights)


def test_nothing_to_compare_is_noted(capsys):
    export("--format", "torchscript", "--sizes", "64x64", config=RETINANET)
    assert "Nothing was detected" in capsys.readouterr().out


def test_disagreement_is_an_error(monkeypatch):
    monkeypatch.setattr(parity, "MAP_TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match=r"Not the same as eager: backbone.ts\."):
        export("--part", "backbone", "--format", "torchscript", "--sizes", "64x64")
    assert "| NO" in Path("exported/backbone.md").read_text()


def test_there_is_one_way_to_name_the_device():
    for config, option in ((MASK_RCNN, ["MODEL.DEVICE", "cpu"]), ("lazy", ["train.device=cpu"])):
        with pytest.raises(ValueError, match="among the config options: use --device instead"):
            run_export(["--config-file", config, "--opts", *option])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "aotinductor"], "aotinductor does not take a whole detector"),
        (
            ["--part", "fpn", "--without", "postprocessing"],
            "The part fpn has no post-processing to leave out.",
        ),
        (["--sizes", "64"], "Size '64' is not of the form HxW, such as 224x224."),
        (
            ["--images", __file__],
            f"{__file__} is not a picture that can be read (of no known format).",
        ),
        (["--images", "missing.jpg"], "missing.jpg"),
        (["--config-file", "missing.yaml"], "No config file 'missing.yaml'"),
    ],
)
def test_mistakes(args, message, monkeypatch, capsys):
    command = ["export_model.py", "--config-file", MASK_RCNN, "--allow-partial", *args, *options()]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(export_model.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("error: ") or "\nerror: " in error
    assert message in error


def test_a_file_agrees_if_it_agrees_at_all_sizes(monkeypatch, tmp_path):
    (tmp_path / "a.ts").write_bytes(b"")
    file = SimpleNamespace(path=tmp_path / "a.ts", exporter="", opset=None, operators=Counter())
    monkeypatch.setattr(report_module, "load", lambda *_: None)
    monkeypatch.setattr(report_module, "_check_one", lambda *words: {"agrees": words[2]})
    for agreeing in ([True, True], [True, False], [False, True]):
        found = report_module._check(None, "torchscript", file, agreeing, "cpu")
        assert found["agrees"] == all(agreeing)


def test_times_are_milliseconds(monkeypatch):
    times = {"eager": [0.002, 0.009, 0.004], "exported": [0.001, 0.003, 0.008]}
    monkeypatch.setattr(report_module, "time_interleaved", lambda *_, **__: times)
    target = SimpleNamespace(output_names=["p2"], eager=lambda x: [x])
    check = report_module._check_one(target, lambda x: [x], (torch.ones(1, 2),), "cpu")
    assert (check["eager_ms"], check["exported_ms"]) == (4, 3)
    assert check["time_ratio"] == pytest.approx(0.5)  # the median of 1/2, 3/9 and 8/4


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        export("--device", "cuda")
    assert "--device: 'cuda' is no device that torch finds here" in capsys.readouterr().err


def test_a_fixed_shape():
    args = ("--part", "backbone", "--format", "torchscript", "--fixed-shape", "2x64x96")
    report = export(*args)
    assert report["target"].startswith("VoVNet: images (2, 3, 64, 96) of raw pixels")
    (result,) = report["exports"]
    assert [check["input"] for check in result["checks"]] == ["2×3×64×96"] * 2
    assert result["agrees"]
    with pytest.raises(ValueError, match="'64x96' is not of the form NxHxW"):
        export("--part", "backbone", "--fixed-shape", "64x96")
    with pytest.raises(ValueError, match="leave out --images"):
        export("--part", "backbone", "--fixed-shape", "1x64x96", "--images", str(PICTURES[0]))
