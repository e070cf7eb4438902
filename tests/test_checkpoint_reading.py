# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import argparse
import gzip
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2.modeling.backbone import build_resnet_backbone
from reference import STRUCTURES, Net, thin
from safetensors.torch import save_file
from state_dicts import equal, random_state, snapshot
from torch import nn

from vovnet_d2 import VoVNet, VoVNetCheckpointer, VoVNetSpec
from vovnet_d2.checkpoint import zipped as zipped_files
from vovnet_d2.checkpoint.reading import read_checkpoint
from vovnet_d2.checkpoint.sources import read_weights

NET = thin(STRUCTURES["eSE in all"])
GOOD = random_state(NET, counted=True)


def model_of(net: Net, **args) -> VoVNet:
    return VoVNet(VoVNetSpec(**vars(net)), **{"norm": "BN", **args})


# A payload that runs code when it is unpickled. It opens a file for writing, which leaves a trace.


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def torch_zip(path, payload):
    torch.save({"model": GOOD, "extra": payload}, path)


def torch_legacy(path, payload):
    torch.save({"model": GOOD, "extra": payload}, path, _use_new_zipfile_serialization=False)


def torch_state_dict(path, payload):
    torch.save(OrderedDict([*GOOD.items(), ("extra", payload)]), path)


def torch_metadata(path, payload):
    torch.save({"model": GOOD, "vovnet_d2": payload}, path)


def torch_zip_with_a_foreign_pickle(path, payload):
    torch.save({"model": GOOD}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    records = {
        k: pickle.dumps(payload, 2) if k.endswith("data.pkl") else v for k, v in records.items()
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def model_zoo(path, payload):
    weights = {name: tensor.numpy() for name, tensor in GOOD.items()}
    path.write_bytes(pickle.dumps({"model": weights, "__author__": payload}))


def object_array(path, payload):
    weights = {"a": np.array([payload], dtype=object)}
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "x"}))


def bare_pickle(protocol):
    def write(path, payload):
        path.write_bytes(pickle.dumps({"a": payload}, protocol))

    write.__name__ = f"pickle_of_protocol_{protocol}"
    return write


WRITERS = [
    torch_zip,
    torch_legacy,
    torch_state_dict,
    torch_metadata,
    torch_zip_with_a_foreign_pickle,
    model_zoo,
    object_array,
    *map(bare_pickle, range(pickle.HIGHEST_PROTOCOL + 1)),
]


@pytest.mark.parametrize("allow_pickle", [False, True], ids=["default", "opt-in"])
@pytest.mark.parametrize("suffix", ["pth", "pkl", "bin"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda writer: writer.__name__)
def test_no_code_runs(tmp_path, write, suffix, allow_pickle):
    marker, path = tmp_path / "it ran", tmp_path / f"weights.{suffix}"
    write(path, Payload(marker))
    with pytest.raises(ValueError, match=r"weights\.\w+ (is|holds)") as caught:
        read_checkpoint(str(path), allow_pickle=allow_pickle)
    assert not marker.exists()
    assert "open" in str(caught.value) or "--allow-pickle" in str(caught.value)


@pytest.mark.parametrize("write", WRITERS, ids=lambda writer: writer.__name__)
def test_the_payload_would_run(tmp_path, write):
    """Check that the payload of the test above runs if it is unpickled."""
    marker, path = tmp_path / "it ran", tmp_path / "weights"
    write(path, Payload(marker))
    if "torch" in write.__name__:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert marker.exists()


# Values that Detectron2's trainer and other trainers write in addition to tensors


def test_values_of_trainers_are_read(tmp_path):
    beside = {
        "iteration": 7,
        "trainer": {
            "hooks": {"best": np.float64(0.5), "count": np.int64(3), "flag": np.bool_(True)}
        },
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save({"model": GOOD, **beside}, tmp_path / "a.pth")
    content = read_checkpoint(str(tmp_path / "a.pth"))
    assert equal(content.pop("model"), GOOD)
    assert content == beside


def test_scalars_of_another_numpy_are_read(tmp_path):
    """Read scalars of NumPy 1 and 2, which are rebuilt by functions of different modules."""
    names = [b"numpy._core.multiarray", b"numpy.core.multiarray"]
    mine, other = names if np.__version__ >= "2" else names[::-1]
    torch.save({"model": GOOD, "best": np.float64(0.5)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        for name, content in records.items():
            new = content.replace(mine, other)
            assert (new != content) == name.endswith("data.pkl")
            archive.writestr(name, new)
    assert read_checkpoint(str(tmp_path / "b.pth"))["best"] == 0.5


WRAPPERS = {
    "bare": lambda state: state,
    "detectron2": lambda state: {"model": state, "optimizer": {"param_groups": []}},
    "mmcv": lambda state: {"meta": {"epoch": 1}, "state_dict": state},
    "tutorial": lambda state: {"model_state_dict": state, "epoch": 3, "loss": torch.ones(())},
    "params": lambda state: {"params": state},
    "ema": lambda state: {"ema": {"module": state}, "updates": 3},
    "ema beside": lambda state: {"model_ema": {"x": torch.ones(1)}, "model": state},
    "nested": lambda state: {"model": {"state_dict": state}},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers(tmp_path, wrap, legacy):
    path = tmp_path / "a.pth"
    torch.save(wrap(GOOD), path, _use_new_zipfile_serialization=not legacy)
    assert equal(read_checkpoint(str(path))["model"], GOOD)


def test_averaged_weights_are_noted_and_can_be_chosen(tmp_path, caplog):
    path = f"{tmp_path}/both.pth"
    torch.save({"state_dict": {"w": torch.ones(1)}, "state_dict_ema": {"w": torch.zeros(1)}}, path)
    assert read_weights(path)[0]["model"]["w"] == 1
    assert f"For the others, write {path}?entry=state_dict_ema." in caplog.text
    caplog.clear()
    chosen, _ = read_weights(f"{path}?entry=state_dict_ema")
    assert (chosen.keys(), chosen["model"]["w"]) == ({"model"}, 0)
    assert not caplog.text
    with pytest.raises(ValueError, match=r"'ema'. There are: state_dict, state_dict_ema"):
        read_weights(f"{path}?entry=ema")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_model_zoo_pickles_are_read_with_the_opt_in(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    weights = {name: tensor.numpy() for name, tensor in GOOD.items()}
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "us"}, protocol))
    with pytest.raises(ValueError, match="--allow-pickle"):
        read_checkpoint(str(path))
    content = read_checkpoint(str(path), allow_pickle=True)
    assert equal(content["model"], GOOD)
    assert content["__author__"] == "us"


def test_caffe2_pickles_are_read_as_detectron2_does(tmp_path):
    """Read a file of Python 2, whose strings arrive as bytes."""
    blobs = {"conv1_w": np.ones((2, 3)), "conv1_w_momentum": np.ones((2, 3))}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs}, 2))
    content = read_checkpoint(str(tmp_path / "a.pkl"), allow_pickle=True)
    assert content.pop("model").keys() == {"conv1_w"}
    assert content == {"__author__": "Caffe2", "matching_heuristics": True}


# Malformed files. Each file gives one clear sentence, and does not change the model.


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def saved_safetensors(path, metadata=None) -> bytes:
    save_file(GOOD, path, metadata)
    return path.read_bytes()


def zipped(**files: bytes) -> bytes:
    """Return a zip archive with files that are called NAME.pth."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.pth", content)
    return file.getvalue()


def bomb() -> bytes:
    return zipped(a=bytes(zipped_files._HARMLESS_SIZE + 1))


def test_a_small_archive_may_have_any_compression_ratio(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped(a=bytes(10**6)))
    entry = zipped_files.find_weights(str(tmp_path / "a.zip"))
    assert entry is not None
    assert entry.file_size > 200 * entry.compress_size


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def torchscript() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 1, 1)), file)
    return file.getvalue()


def flipped(content: bytes, needle: bytes) -> bytes:
    """Return the content with a change in the first byte after ``needle``."""
    place = content.index(needle) + len(needle)
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def resnet_state() -> dict[str, torch.Tensor]:
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec

    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(DEPTH=18, RES2_OUT_CHANNELS=64)
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()


def without(part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in GOOD.items() if part not in name}


def itself() -> dict[str, object]:
    content: dict[str, object] = {}
    content["model"] = content
    return content


def eca_state() -> dict[str, torch.Tensor]:
    widths = {"stem_chs": [8] * 3, "stage_conv_chs": [8] * 4, "stage_out_chs": [16] * 4}
    return timm.create_model("eca_vovnet39b", **widths).state_dict()


STEM = "stem.stem_1/conv.weight"
LAYER = "stage3.OSA3_1.layers.1.OSA3_1_1/conv.weight"
OTHER = random_state(replace(NET, blocks_per_stage=(2, 2, 3, 1)))
RAW = GOOD[LAYER].numpy().tobytes()[:16]
HTML = b"<!DOCTYPE html><html><head><title>403</title></head></html>"

MALFORMED = {
    # not weights at all
    "empty file": (lambda p: b"", "is empty"),
    "HTML page": (lambda p: HTML, "HTML page"),
    "HTML page with space before": (lambda p: b"\n\n  <html>\n" + HTML, "HTML page"),
    "XML error of a file server": (lambda p: b'<?xml version="1.0"?><Error/>', "HTML page"),
    "JSON error": (lambda p: b'{"error": "not found"}', "is a text file"),
    "JSON of parameters": (lambda p: json.dumps({"a": [1.0]}).encode(), "is a text file"),
    "text": (lambda p: b"Not Found\n", "is a text file"),
    "Git LFS pointer": (
        lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "git lfs pull",
    ),
    "random bytes": (lambda p: bytes(range(255, -1, -1)) * 8, "no known file of weights"),
    "zeros": (lambda p: bytes(4096), "no known file of weights"),
    "compressed": (lambda p: gzip.compress(saved(GOOD)), "unpack"),
    "zip of two files": (
        lambda p: zipped(a=saved(GOOD), b=saved(GOOD)),
        r"a zip archive of 2 files \('a.pth', 'b.pth'\): unpack",
    ),
    "zip in a zip": (lambda p: zipped(a=zipped(a=saved(GOOD))), "unpack it first"),
    "zip around an HTML page": (lambda p: zipped(a=HTML), "HTML page"),
    "zip around it, cut in half": (
        lambda p: zipped(a=saved(GOOD))[: len(saved(GOOD)) // 2],
        "truncated",
    ),
    "zip around it, a wrong byte in it": (
        lambda p: flipped(zipped(a=saved(GOOD)), b"a.pth"),
        "damaged",
    ),
    "zip bomb": (lambda p: bomb(), r"unpack to 1\d+ bytes, \d+ times the size"),
    "npz": (lambda p: npz(), "unpack"),
    "TorchScript": (lambda p: torchscript(), "TorchScript"),
    # damaged
    "zip cut in half": (lambda p: saved(GOOD)[: len(saved(GOOD)) // 2], "truncated"),
    "zip cut after its head": (lambda p: saved(GOOD)[:100], "truncated"),
    "zip cut by a byte": (lambda p: saved(GOOD)[:-1], "truncated"),
    "zip with a wrong byte in a tensor": (lambda p: flipped(saved(GOOD), RAW), "damaged"),
    "zip with a wrong byte in its names": (lambda p: flipped(saved(GOOD), b"OSA3_1"), "damaged"),
    "legacy cut in half": (
        lambda p: saved(GOOD, _use_new_zipfile_serialization=False)[:20000],
        "truncated",
    ),
    "safetensors cut in its head": (lambda p: saved_safetensors(p)[:200], "truncated"),
    "safetensors cut in its data": (lambda p: saved_safetensors(p)[:-9], "truncated"),
    "safetensors with a broken head": (lambda p: b"\x04" + bytes(7) + b"{{{{" * 9, "truncated"),
    "safetensors with broken metadata": (
        lambda p: saved_safetensors(p, {"vovnet_d2": "{"}),
        "no JSON",
    ),
    "broken metadata": (lambda p: saved({"model": GOOD, "vovnet_d2": 3}), "entry 'vovnet_d2'"),
    "metadata of another kind": (
        lambda p: saved({"model": GOOD, "vovnet_d2": {"stem": "round"}}),
        "'round'",
    ),
    # content other than a state dict
    "a whole module": (lambda p: saved(nn.Conv2d(1, 1, 1)), "save its state_dict"),
    "pickle": (lambda p: pickle.dumps({"model": {}, "__author__": ""}), "--allow-pickle"),
    "a tensor": (lambda p: saved(torch.ones(3)), "holds no tensors by name, but a Tensor"),
    "a list of tensors": (lambda p: saved([torch.ones(3)]), "but a list"),
    "an empty dict": (lambda p: saved({}), "but nothing"),
    "a dict without tensors": (lambda p: saved({"model": {}, "epoch": 3}), "'model', 'epoch'"),
    "a dict that holds itself": (lambda p: saved(itself()), "'model'"),
    "numbers as names": (lambda p: saved({0: torch.ones(1)}), "is 0, not a string"),
    "a string among tensors": (lambda p: saved({**GOOD, "epoch": "1"}), "epoch is a str"),
    "a sparse tensor": (lambda p: saved({**GOOD, STEM: GOOD[STEM].to_sparse()}), "no plain tensor"),
    "a complex tensor": (lambda p: saved({**GOOD, STEM: GOOD[STEM] * 1j}), "no plain tensor"),
    "a tensor without data": (
        lambda p: saved({**GOOD, STEM: GOOD[STEM].to("meta")}),
        "no plain tensor",
    ),
    # tensors of another network
    "a ResNet": (lambda p: saved(resnet_state()), "looks like a Detectron2 ResNet"),
    "tensors of nothing known": (lambda p: saved({"fc.weight": torch.ones(3)}), "No VoVNet"),
    "a classifier alone": (
        lambda p: saved({"classifier.weight": torch.ones(3, 4)}),
        "No VoVNet",
    ),
    "another attention": (lambda p: saved(eca_state()), r"attn\.conv\.weight"),
    "another VoVNet": (lambda p: saved(OTHER), r"blocks_per_stage is \(2, 2, 3, 1\) in the file"),
    "two VoVNets": (
        lambda p: saved({a + name: t for a in ("a.", "b.") for name, t in GOOD.items()}),
        "2 VoVNets in it, below 'a.', 'b.'",
    ),
    "two layouts at once": (
        lambda p: saved({**GOOD, "stem.conv1.weight": GOOD[STEM]}),
        "in two layouts",
    ),
    "no stem": (lambda p: saved(without("stem_1")), "lacks stem.conv1.weight"),
    "no stage2": (lambda p: saved(without("stage2")), "no stage2"),
    "no stage5": (lambda p: saved(without("stage5")), "lacks 17 tensors .* stage5"),
    "a block missing": (lambda p: saved(without("OSA4_2")), "blocks_per_stage"),
    "a layer missing": (lambda p: saved(without("OSA3_1_1/")), "lacks 5 tensors"),
    "running statistics missing": (lambda p: saved(without("running_")), 'MODEL.VOVNET.NORM: "GN"'),
    "statistics of one norm missing": (
        lambda p: saved(without("OSA3_1_1/norm.running")),
        "lacks 2 tensors",
    ),
    "a scalar for a kernel": (lambda p: saved({**GOOD, STEM: torch.ones(())}), r"shape \(\)"),
    "a kernel without channels": (
        lambda p: saved({**GOOD, STEM: torch.ones(8, 0, 3, 3)}),
        r"shape \(8, 0, 3, 3\)",
    ),
    "a kernel of another size": (
        lambda p: saved({**GOOD, LAYER: torch.ones(10, 10, 5, 5)}),
        r"\(10, 10, 5, 5\), where the model has \(10, 10, 3, 3\)",
    ),
    "another number of input channels": (
        lambda p: saved({**GOOD, STEM: torch.ones(8, 6, 3, 3)}),
        "takes 6 input channels and the model 3",
    ),
    "whole numbers": (
        lambda p: saved({**GOOD, LAYER: GOOD[LAYER].to(torch.int8)}),
        r"is of torch\.int8",
    ),
    "not a number": (
        lambda p: saved({**GOOD, LAYER: GOOD[LAYER] * float("nan")}),
        "not finite",
    ),
}


@pytest.fixture(scope="module")
def model() -> VoVNet:
    return model_of(NET)


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_files(tmp_path, model, content, message, monkeypatch):
    monkeypatch.setattr(zipped_files, "_HARMLESS_SIZE", 2**20)
    path = tmp_path / "weights.pth"
    path.write_bytes(content(path))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        VoVNetCheckpointer(model).load(str(path))
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith((".", ")."))
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors", "pkl", "weights"])
@pytest.mark.parametrize("format", ["zip", "legacy", "safetensors"])
def test_the_undamaged_file_loads(tmp_path, format, suffix):
    """Check that the undamaged content loads under any file name."""
    path = tmp_path / f"weights.{suffix}"
    if format == "safetensors":
        saved_safetensors(path)
    else:
        path.write_bytes(saved(GOOD, _use_new_zipfile_serialization=format == "zip"))
    assert equal(read_checkpoint(str(path))["model"], GOOD)


def test_a_zip_archive_of_one_file_loads(tmp_path):
    """Load a zip archive, as osmr publishes, with folders and the files that macOS adds."""
    path = tmp_path / "weights.pth.zip"
    path.write_bytes(zipped(a=saved({"model": GOOD, "epoch": 3})))
    content = read_checkpoint(str(path))
    assert equal(content["model"], GOOD)
    assert content["epoch"] == 3
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("folder/", "")
        archive.writestr("__MACOSX/._a.pth", b"Mac OS X")
    assert equal(read_checkpoint(str(path))["model"], GOOD)


def test_a_checkpoint_without_checksums_loads(tmp_path):
    """Load a file that torch.save wrote without checksums, which is an option of torch."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(GOOD, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(read_checkpoint(str(tmp_path / "a.pth"))["model"], GOOD)
