# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The backends as treatments of the benchmark, and the columns of a deployment."""

import json
import os
import pickle
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from benchmark_runs import Sleeper, run_study, sleeper
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from export_models import MASK_RCNN, OPTIONS
from onnx import numpy_helper
from predictor_runs import PICTURES, SMALL, save
from process_stand_ins import Holding, Sleeping, end, fail_beside_one_that_waits

from vovnet_d2 import Predictor
from vovnet_d2.backends import CACHE, programs
from vovnet_d2.backends.cache import cache_folder
from vovnet_d2.benchmark import deployment, exports, limits, processes
from vovnet_d2.benchmark.deployment import Served
from vovnet_d2.benchmark.networks import Network, backbone, calibrate_norms, detector
from vovnet_d2.benchmark.report import format_table, write_study
from vovnet_d2.benchmark.study import Study
from vovnet_d2.benchmark.treatments import TREATMENTS
from vovnet_d2.benchmark.workload import random_images
from vovnet_d2.data.image_file import read_image
from vovnet_d2.engine.quantization import (
    CALIBRATION_IMAGES,
    CALIBRATION_SEED,
    draw_images,
    quantize_detector,
)
from vovnet_d2.export.parity import MAP_TOLERANCE

pytest_plugins = ["engine_fixtures"]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MB = 2**20
SIZE = (64, 96)
NAME = "V-19-slim-dw-eSE"
BACKENDS = ("openvino", "onnxruntime", "openvino-bf16", "openvino-int8", "onnxruntime-int8")


# ---------------------------------------------------------------------------------- the processes


def test_the_throughput_of_sleeping_networks(tmp_path: Path, monkeypatch) -> None:
    """Two processes sleep at the same time on one core, and note their calls. The throughput is
    held against these notes, because a machine under load makes fewer calls."""
    core = limits.available_cores()[0]
    monkeypatch.setattr(processes, "available_cores", lambda: [core, core])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # of a new process
    rate = processes.calls_per_second(Sleeping(tmp_path, 0.1).load, seconds=1.0)
    end = time.monotonic()
    notes = [np.loadtxt(file, ndmin=2) for file in tmp_path.iterdir()]
    assert len(notes) == 2
    assert all((note[:, 2] == 1).all() for note in notes)  # one thread
    # No process is counted before the other has ended its call for warm-up.
    warm = max(note[0, 1] for note in notes)
    assert warm <= min(note[1, 0] for note in notes)
    # The time of a process lies between the time of its calls and the time of this test.
    calls = [len(note) - 1 for note in notes]
    at_most = sum(n / (note[-1, 1] - note[1, 0]) for n, note in zip(calls, notes, strict=True))
    assert sum(calls) / (end - warm) <= rate <= at_most


def test_each_process_keeps_to_its_core(monkeypatch) -> None:
    """Take a core that this machine need not have, and a call of a tenth of a second."""
    taken: list[Any] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda *args: taken.append(args), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    rate = processes._calls_per_second(Barrier(1), lambda: partial(time.sleep, 0.1), 5, 0.25)
    assert taken == [(0, {5}), 1]
    assert 0 < rate <= 10  # the time ends with the last call


def test_the_memory_of_a_network_that_holds_a_known_array() -> None:
    load = Holding(held=200 * MB, taken=100 * MB, imported=50 * MB)
    added = processes.added_memory(load.preload, load.load)
    assert added == (pytest.approx(300 * MB, rel=0.05) if tells_peak_memory() else None)


def tells_peak_memory() -> bool:
    """Return whether the system measures the peak of the memory anew, which only Linux does, and
    some sandboxes do not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return "VmHWM" in Path("/proc/self/status").read_text()


def test_memory_is_not_known_where_the_system_does_not_tell(monkeypatch) -> None:
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError))
    load = Holding(held=1, taken=1, imported=1)
    assert processes._added_memory(None, load.preload, load.load, 1) is None


def test_a_process_that_fails_stops_the_others() -> None:
    with pytest.raises(RuntimeError, match=r"^ValueError: no such kernel$"):
        processes.run_together(fail_beside_one_that_waits, [(True,), (False,)])
    with pytest.raises(RuntimeError, match="ended early, perhaps for lack of memory"):
        processes.run_together(end, [()])


def test_a_process_that_cannot_start_says_why() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        processes.run_together(lambda _: 1, [()])


# ------------------------------------------------------------------------ the limits of a container

GROUPS_1 = "5:memory:/docker/a b\n4:cpu,cpuacct:/docker/a b\n"


def write_files(folder: Path, monkeypatch, files: dict[str, str]) -> None:
    """Write files of Linux in a folder, and let the package read them there."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(limits, "_PROC", folder / "proc")
    monkeypatch.setattr(limits, "_CGROUPS", folder / "sys")


@pytest.mark.parametrize(
    ("files", "number"),
    [
        ({"sys/cpu.max": "200000 100000\n"}, 2),
        ({"sys/cpu.max": "150000 100000\n"}, 2),  # a core and a half keep two processes busy
        ({"sys/cpu.max": "max 100000\n", "sys/a/cpu.max": "50000 100000\n"}, 1),
        ({"sys/cpu.max": "100000 100000\n", "sys/a/b/cpu.max": "300000 100000\n"}, 1),
        ({"sys/a/b/cpu.max": "9900000 100000\n"}, 64),
        ({"sys/elsewhere/cpu.max": "100000 100000\n"}, 64),
        ({}, 64),
    ],
)
def test_a_quota_of_cgroups_2_limits_the_cores(
    files: dict[str, str], number: int, tmp_path: Path, monkeypatch
) -> None:
    """Take a machine with 64 cores, as ``docker run --cpus=2`` shows it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    write_files(tmp_path, monkeypatch, {"proc/self/cgroup": "0::/a/b\n"} | files)
    assert limits.available_cores() == list(range(number))


@pytest.mark.parametrize(("folder", "quota", "number"), [("", 200000, 2), ("docker/a b/", -1, 64)])
def test_a_quota_of_cgroups_1_limits_the_cores(
    folder: str, quota: int, number: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    files = {
        "proc/self/cgroup": GROUPS_1,
        f"sys/cpu/{folder}cpu.cfs_quota_us": f"{quota}\n",
        f"sys/cpu/{folder}cpu.cfs_period_us": "100000\n",
    }
    write_files(tmp_path, monkeypatch, files)
    assert limits.available_cores() == list(range(number))


def test_the_cores_without_an_affinity(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    write_files(tmp_path, monkeypatch, {})
    assert limits.available_cores() == [0, 1, 2]
    assert limits.available_memory() == np.inf


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4096 * 1024),
        (
            {
                "memory.max": "1000",
                "memory.current": "900",
                "memory.stat": "anon 5\ninactive_file 300",
            },
            400,
        ),
        ({"memory.max": "max", "memory.current": "900"}, 4096 * 1024),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 200",
            },
            300,
        ),
    ],
)
def test_the_memory_of_a_container(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch
) -> None:
    all_files = {
        "proc/meminfo": "MemTotal:  9999 kB\nMemAvailable:    4096 kB\nHugePages_Total: 0\n",
        "proc/self/cgroup": GROUPS_1 + "0::/\n",
        **{f"sys/{name}": text for name, text in files.items()},
    }
    write_files(tmp_path, monkeypatch, all_files)
    assert limits.available_memory() == expected


def test_no_process_starts_if_all_need_more_memory_than_there_is(monkeypatch) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: [0, 1, 2])
    monkeypatch.setattr(processes, "available_memory", lambda: 8e9)
    monkeypatch.setattr(processes, "run_together", lambda _, tasks: [1.0] * len(tasks))
    rate = partial(processes.calls_per_second, lambda: None, seconds=1.0)
    assert rate(memory=2 * 10**9) == rate(memory=None) == 3
    message = "^3 processes at once need 9.0 GB of memory, and 8.0 GB are available$"
    with pytest.raises(RuntimeError, match=message):
        rate(memory=3 * 10**9)


# ------------------------------------------------------------------------------------- a backbone


@dataclass
class Seen:
    """Notes what a study with a deployment measures, instead of other processes."""

    outputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    bytes_of_files: list[int] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)  # of OpenVINO

    def added_memory(self, preload: Callable[[], None], load: Callable[[], Any]) -> int:
        served = preload.__self__
        preload()
        self.outputs.append(load()())
        self.served.append(served)
        self.bytes_of_files.append(os.stat(served.program).st_size if served.program else 0)
        self.files.append(served.program.read_bytes() if served.program else b"")
        return 7 * 10**6

    def calls_per_second(self, load: Callable[[], Any], *, seconds: float, memory: int) -> float:
        assert memory == 7 * 10**6
        return 5.0

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(deployment, "added_memory", self.added_memory)
        patch.setattr(deployment, "calls_per_second", self.calls_per_second)
        openvino = programs.BACKENDS["openvino"]

        def load(path: Path, device: torch.device, precision: str) -> Any:
            self.precisions.append(precision)
            return openvino.load(path, device, precision)

        patch.setitem(
            programs.BACKENDS, "openvino", replace(openvino, load=load, has_half=lambda: True)
        )


def calibrated(name: str) -> torch.nn.Module:
    """Build a backbone as a study does."""
    torch.manual_seed(0)
    model = backbone(name).build()
    calibrate_norms(model, torch.randn(2, 3, 224, 224))
    return model.eval()


@pytest.fixture(scope="module")
def measured() -> tuple[Study, Seen]:
    seen = Seen()
    with pytest.MonkeyPatch.context() as patch:
        seen.patch(patch)
        result = run_study(
            networks=[backbone(NAME)],
            treatments=["plain", "optimized", "bf16", *BACKENDS],
            sizes=[SIZE],
            deployment=True,
        )
    return result, seen


def test_outputs_are_those_of_the_network(measured: tuple[Study, Seen]) -> None:
    """Compare the outputs of the network that another process loads."""
    result, seen = measured
    assert [row["error"] for row in result.rows] == [""] * 8
    # Each network is loaded by the study, and by the other process.
    assert seen.precisions == [p for p in ("float32", "half", "int8") for _ in range(2)]
    with torch.no_grad():
        expected = calibrated(NAME)(random_images(2, SIZE, CPU))
    for row, outputs in zip(result.rows, seen.outputs, strict=True):
        assert outputs.keys() == expected.keys()
        for name, value in expected.items():
            if row["dtype"] == "float32":
                assert (outputs[name] - value).abs().max() <= MAP_TOLERANCE * value.abs().max()
                continue
            # Fewer bits; the feature maps of another network would differ by 1 and more.
            error = (outputs[name] - value).norm() / value.norm()
            assert error < 0.8
            # On a CPU without bfloat16, OpenVINO has computed in float32.
            assert error > MAP_TOLERANCE or row["treatment"] == "openvino-bf16"


def test_vovnets_of_timm_run_in_the_backends(tmp_path: Path, monkeypatch) -> None:
    network = backbone("timm:ese_vovnet19b_dw")
    model = network.build().eval()
    images = random_images(2, SIZE, CPU)
    treatment = TREATMENTS["onnxruntime"]
    found, _ = exports.Exports(tmp_path).use_backend(network, model, treatment, images)
    with torch.no_grad():
        outputs = found(images)
        for name, value in model(images).items():
            assert (outputs[name] - value).abs().max() <= MAP_TOLERANCE * value.abs().max()

    def fail(*_: object) -> None:
        raise AssertionError("Expected op to be '==', got <")

    monkeypatch.setattr(exports, "export_dense_part", fail)  # as some versions of torch do
    for size, message in (((72, 96), "72x96: give --sizes of multiples of 32"), (SIZE, "got <")):
        with pytest.raises((ValueError, AssertionError), match=message):
            exports.Exports(tmp_path).use_backend(
                network, model, treatment, random_images(1, size, CPU)
            )


def test_the_int8_file_for_tensorrt_is_symmetric(tmp_path: Path, monkeypatch) -> None:
    """Look at the zero points of the activations, which are 0 in the form for TensorRT."""
    monkeypatch.setattr(exports, "use_backend", lambda *_, **__: None)
    network = backbone(NAME)
    for name, symmetric in (("tensorrt-int8", True), ("openvino-int8", False)):
        _, path = exports.Exports(tmp_path).use_backend(
            network, calibrated(NAME), TREATMENTS[name], random_images(1, SIZE, CPU)
        )
        graph = onnx.load(path).graph
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        points = [values[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"]
        assert points
        assert symmetric != any(point.any() for point in points)


def test_the_file_is_measured_and_int8_is_in_it(measured: tuple[Study, Seen]) -> None:
    result, seen = measured
    tensors = {
        name: sum(
            numpy_helper.to_array(t).nbytes for t in onnx.load_from_string(file).graph.initializer
        )
        for row, file in zip(result.rows, seen.files, strict=True)
        if file
        for name in [row["treatment"]]
    }
    assert tensors.keys() == set(BACKENDS)
    for row, size in zip(result.rows, seen.bytes_of_files, strict=True):
        if size:
            assert row["file_mb"] == size / 1e6
            assert row["peak_memory_mb"] is None  # torch does not see the memory of a backend
            assert size > tensors[row["treatment"]]
        else:
            assert row["peak_memory_mb"] > 0
        assert (row["process_mb"], row["images_per_second"]) == (7, 5 * 2)  # two images in a call
    weights = sum(v.numel() * v.element_size() for v in calibrated(NAME).state_dict().values())
    plain, optimized, bf16 = (row["file_mb"] * 1e6 for row in result.rows[:3])
    assert plain == weights
    assert bf16 == optimized / 2 < plain / 2
    assert tensors["openvino"] == tensors["onnxruntime"] == pytest.approx(optimized, rel=0.01)
    assert tensors["openvino-int8"] == tensors["onnxruntime-int8"] < tensors["openvino"]
    assert tensors["openvino-bf16"] == tensors["openvino"]  # OpenVINO converts what it has loaded
    dtypes = ["float32", "float32", "bfloat16", "int8", "int8"]
    assert [row["dtype"] for row in result.rows[3:]] == dtypes
    assert {"openvino", "onnxruntime"} < result.protocol.keys()


def test_nothing_is_left_in_the_cache_of_the_user(measured: tuple[Study, Seen]) -> None:
    _, seen = measured
    for served in seen.served:
        assert not served.file.parent.exists()
        assert served.program is None or served.program.parent == served.file.parent


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_the_cache_of_the_user_comes_back(before: str | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(CACHE)
    if before:
        monkeypatch.setenv(CACHE, before)
    with suppress(KeyError), exports._cache_in(tmp_path):
        assert cache_folder() == tmp_path
        raise KeyError
    assert os.environ.get(CACHE) == before


def test_the_columns_are_in_the_table_and_the_files(
    measured: tuple[Study, Seen], tmp_path: Path
) -> None:
    result, _ = measured
    heading = format_table(result.rows).splitlines()[2]
    for name in ("file (MB)", "process (MB)", "img/s, all cores"):
        assert f"| {name} " in heading
    assert "AP" not in heading  # there are no weights
    json_path, csv, *_ = write_study(result, tmp_path)
    content = json.loads(json_path.read_text())
    assert content["conventions"].keys() >= deployment.CONVENTIONS.keys()
    assert {record["process_mb"] for record in content["records"]} == {7.0}
    assert "file_mb,process_mb,images_per_second,box_ap,mask_ap" in csv.read_text()


def test_other_studies_have_none_of_these_columns() -> None:
    rows = run_study(treatments=["plain"], repeats=1, networks=[sleeper("a", 0)]).rows
    assert not set(deployment.COLUMNS) & rows[0].keys()


def test_a_network_that_cannot_be_served_keeps_its_times(monkeypatch, caplog) -> None:
    def build() -> torch.nn.Module:
        model = Sleeper(0)
        model.function = lambda: 0  # cannot be pickled
        return model

    def fail(*_: object, **__: object) -> int:
        raise RuntimeError("a process ended early")

    options = {"treatments": ["plain"], "repeats": 1, "deployment": True}
    (row,) = run_study(networks=[Network("a", build)], **options).rows
    assert (row["error"], row["process_mb"], row["images_per_second"]) == ("", None, None)
    assert row["latency_ms"] > 0
    assert re.search("a plain cannot be measured in processes of its own: .*pickle", caplog.text)

    monkeypatch.setattr(deployment, "added_memory", lambda *_: 7 * 10**6)
    monkeypatch.setattr(deployment, "calls_per_second", fail)
    (row,) = run_study(networks=[sleeper("b", 0)], **options).rows
    assert (row["error"], row["process_mb"], row["images_per_second"]) == ("", 7, None)
    assert row["latency_ms"] > 0
    assert "b plain cannot be measured in processes of its own: a process ended" in caplog.text


def test_another_process_compiles_a_network_anew(monkeypatch) -> None:
    """Compiled functions cannot be pickled. The network that is timed stays compiled."""
    seen, calls = Seen(), []
    seen.patch(monkeypatch)

    def compile(forward: Callable[..., Any], **_: object) -> Callable[..., Any]:
        calls.append(0)
        place = len(calls) - 1

        def compiled(images: torch.Tensor) -> Any:
            calls[place] += 1
            return forward(images)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    (row,) = run_study(networks=[sleeper("a", 0)], treatments=["compiled"], deployment=True).rows
    assert row["error"] == ""
    assert calls == [1 + 2 + 3, 1]  # warm-up, memory, rounds; and the call in the other process


# ------------------------------------------------------------------------------------- a detector


def own_predictions(cfg: Any) -> list[dict[str, Any]]:
    """Return a data set in which the objects are what a detector finds, so that its AP is 100."""
    predictor = Predictor(cfg)
    records = []
    for number, file in enumerate(PICTURES):
        found = predictor([read_image(str(file))])[0]["instances"]
        size = dict(zip(("height", "width"), found.image_size, strict=True))
        objects = instances_to_coco_json(found, number)
        annotations = [thing | {"bbox_mode": BoxMode.XYWH_ABS} for thing in objects]
        records.append(
            {"file_name": str(file), "image_id": number, **size, "annotations": annotations}
        )
    return records


def test_ap_of_a_detector_on_its_own_predictions(catalogs, tmp_path: Path, monkeypatch) -> None:
    """Compare the AP in float32 with 100, and the AP in INT8 with the one of export_model.py."""
    seen = Seen()
    seen.patch(monkeypatch)
    evaluated, calibrated_on = [], []
    evaluate, preprocess = deployment.evaluate, exports.preprocess
    monkeypatch.setattr(
        deployment, "evaluate", lambda *args: evaluated.append(args) or evaluate(*args)
    )
    monkeypatch.setattr(
        exports, "preprocess", lambda *args: calibrated_on.append(args[2]) or preprocess(*args)
    )
    seed_all_rng(0)
    options = {
        "DATASETS.TRAIN": ("own",),
        "DATASETS.TEST": ("own",),
        "INPUT.MASK_FORMAT": "bitmask",
        "DATALOADER.NUM_WORKERS": 0,
    }
    cfg = save(tmp_path, **{key.replace(".", "__"): value for key, value in options.items()})
    records = own_predictions(cfg)
    DatasetCatalog.register("own", lambda: records)
    names = [str(number) for number in range(5)]
    MetadataCatalog.get("own").set(thing_classes=names, evaluator_type="coco")
    options |= OPTIONS | SMALL | {"MODEL.WEIGHTS": cfg.MODEL.WEIGHTS}
    words = [str(word) for option in options.items() for word in option]
    network = detector(MASK_RCNN, words, weights=True)
    result = run_study(
        networks=[network],
        treatments=["plain", "openvino", "onnxruntime-int8"],
        sizes=[(64, 64), SIZE],
        batches=[1],
        repeats=1,
        deployment=True,
    )
    assert [row["error"] for row in result.rows] == [""] * 6
    plain, openvino, int8 = ((row["box_ap"], row["mask_ap"]) for row in result.rows[:3])
    assert plain == pytest.approx((100, 100), abs=0.5)
    assert openvino == pytest.approx(plain, abs=0.5)
    model = network.build().eval()
    network.load(model)
    drawn = draw_images("own", CALIBRATION_IMAGES, CALIBRATION_SEED)
    expected = quantize_detector(model, network.cfg, drawn, tmp_path / "int8")["results"]["INT8"]
    assert int8 == pytest.approx((expected["bbox AP"], expected["segm AP"]), abs=0.5)
    assert len(evaluated) == 3  # once for each treatment, and not for each size of image
    (images,) = calibrated_on  # and not the random images of the benchmark
    assert sorted(image["file_name"] for image in images) == [str(file) for file in PICTURES]
    assert "| box AP   | mask AP   |" in format_table(result.rows)
