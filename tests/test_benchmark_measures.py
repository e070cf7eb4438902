# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the timers, energy meters and memory counters of the benchmark."""

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vovnet_d2 import optimize_for_inference
from vovnet_d2.benchmark import energy
from vovnet_d2.benchmark.energy import NoEnergyMeter, NvmlCounter, Rapl, find_meter
from vovnet_d2.benchmark.memory import _memory, _tensors_held, peak_memory
from vovnet_d2.benchmark.treatments import TREATMENTS
from vovnet_d2.benchmark.workload import detector_inputs, inference, training_step
from vovnet_d2.timing import interleaved_rounds, time_interleaved

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------- protocol


def test_rounds_take_all_cases_and_times_are_per_call():
    calls = []
    cases = {"short": lambda: calls.append("short"), "long": lambda: time.sleep(0.02)}
    rounds = list(interleaved_rounds(cases, device="cpu", repeats=4, calls=2))
    assert len(rounds) == 4
    assert all(times.keys() == cases.keys() for times in rounds)
    assert len(calls) == 8
    assert all(0.02 <= times["long"] < 0.04 for times in rounds)
    assert all(times["short"] < 0.01 for times in rounds)


def test_each_round_has_another_order():
    """Check that the order differs between rounds, and is the same in every run."""
    calls = []
    cases = {name: partial(calls.append, name) for name in "abc"}
    for _ in range(2):
        assert len(list(interleaved_rounds(cases, device="cpu", repeats=12))) == 12
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert rounds[:12] == rounds[12:]
    assert len(set(rounds)) > 3


def test_an_interruption_leaves_the_rounds_before_it():
    calls = []

    def case():
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    rounds: list[dict[str, float]] = []
    with pytest.raises(KeyboardInterrupt):
        rounds.extend(interleaved_rounds({"x": case}, device="cpu", repeats=5))
    assert len(rounds) == 2


def test_warmup_is_not_timed():
    calls = []
    times = time_interleaved({"x": lambda: calls.append(0)}, device="cpu", warmup=2, repeats=3)
    assert len(calls) == 5
    assert len(times["x"]) == 3


# --------------------------------------------------------------------------------------- energy


class FakeNvml:
    """Stand-in for NVML with a GPU of 200 W, with or without an energy counter."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, counter: bool = True):
        self.counter, self.begin = counter, time.perf_counter()

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-123"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counter:
            raise self.NVMLError("Not Supported")
        return round(200e3 * (time.perf_counter() - self.begin))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="123")
    )


def test_gpu_energy(gpu, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    meter = find_meter(torch.device("cuda"))
    assert isinstance(meter, NvmlCounter)
    begin = time.perf_counter()
    meter.start()
    time.sleep(0.25)
    joules = meter.stop()
    assert joules == pytest.approx(200 * (time.perf_counter() - begin), rel=0.05)


def test_gpu_without_energy_says_why(gpu, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml(counter=False))
    with pytest.raises(NoEnergyMeter, match="no energy of the GPU: Not Supported"):
        find_meter(torch.device("cuda"))
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    with pytest.raises(NoEnergyMeter, match="pip install nvidia-ml-py"):
        find_meter(torch.device("cuda"))


def rapl_tree(root: Path, domains: dict[str, tuple[str, int]]) -> Path:
    for folder, (name, count) in domains.items():
        (root / folder).mkdir(parents=True)
        for file, text in {
            "name": name,
            "energy_uj": count,
            "max_energy_range_uj": 999_999,
        }.items():
            (root / folder / file).write_text(f"{text}\n")
    return root


def test_rapl_counts_packages_and_memory_and_survives_the_wrap(tmp_path):
    domains = {
        "intel-rapl:0": ("package-0", 100),
        "intel-rapl:0:0": ("core", 0),
        "intel-rapl:0:1": ("dram", 900_000),
        "intel-rapl:1": ("package-1", 0),
        "intel-rapl:2": ("psys", 0),
        "intel-rapl-mmio:0": ("package-0", 0),
    }
    root = rapl_tree(tmp_path / "powercap", domains)
    (root / "intel-rapl").mkdir()
    meter = Rapl(root)
    assert meter.source == "RAPL's counters of dram, package-0, package-1"
    meter.start()
    for folder in domains:
        (root / folder / "energy_uj").write_text("500000\n")
    # The counter of the memory passed its largest value 999,999, began again at 0 (1,000,000 in
    # all), and went on to 500,000.
    assert round(1e6 * meter.stop()) == 499_900 + 600_000 + 500_000


def test_no_rapl_says_why(tmp_path, monkeypatch):
    with pytest.raises(NoEnergyMeter, match=r"no energy counter of the processor \(RAPL\)"):
        Rapl(tmp_path / "nothing")
    root = rapl_tree(tmp_path, {"intel-rapl:0": ("package-0", 1)})
    read = Path.read_text

    def refuse(path: Path, *args: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(NoEnergyMeter, match="energy_uj may be read by root only"):
        Rapl(root)


def test_joules_per_call():
    class Meter(energy.EnergyMeter):
        def start(self) -> None:
            self.calls = 0

        def stop(self) -> float:
            return 3.0 * self.calls

    meter = Meter()

    def call() -> None:
        meter.calls += 1
        time.sleep(0.005)

    assert energy.joules_per_call(meter, call, device=CPU, seconds=0.03) == 3
    assert meter.calls > 2
    assert energy.joules_per_call(meter, call, device=CPU, seconds=0) == 3
    assert meter.calls == 1


# ------------------------------------------------------------------------- memory


def test_peak_memory_of_known_tensors():
    mb = 2**20
    model = nn.Linear(4, 4)

    def call() -> None:
        assert model
        a = torch.zeros(4 * mb, dtype=torch.uint8)
        b = torch.zeros(2 * mb, dtype=torch.uint8)
        del a
        c = torch.zeros(3 * mb, dtype=torch.uint8)
        del b, c

    assert peak_memory(call, CPU, before=0) == pytest.approx(6 * mb + 20 * 4, abs=2000)


class OneMap(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.net(x)}


def test_peak_memory_of_a_training_step():
    """Expect three tensors: weight, momentum and gradient.

    The gradient of one step lives until the next step makes new gradients.
    """
    model = OneMap(nn.Linear(1000, 1000, bias=False))
    call = training_step(model, torch.randn(1, 1000), TREATMENTS["plain"], CPU)
    for _ in range(2):
        call()
    assert peak_memory(call, CPU, before=0) == pytest.approx(3 * 4 * 1000**2, rel=0.01)


@pytest.mark.parametrize(("height", "width"), [(40, 400), (400, 40)])
def test_random_objects_lie_within_images_of_any_shape(height, width):
    (record,) = detector_inputs(nn.Module(), torch.zeros(1, 3, height, width))
    boxes = record["instances"].gt_boxes.tensor
    for sides, length in ((boxes[:, 2], width), (boxes[:, 3], height)):
        assert 0.3 * length < sides.max() <= length
    assert (boxes[:, :2] < boxes[:, 2:]).all()


def test_inference_is_without_autograd():
    conv, image = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8)
    assert conv(image).requires_grad
    assert not inference(conv, image, TREATMENTS["plain"], CPU)().requires_grad


def test_peak_memory_of_packed_weights():
    """Expect the weight, the image, and the packed copies of the weight for two image sizes.

    The CPU decides whether the sizes share a copy, how large a copy is, and how much memory oneDNN
    uses during a call.
    """
    conv = optimize_for_inference(nn.Conv2d(256, 256, 3, padding=1, bias=False))
    images = [torch.randn(1, 256, side, side) for side in (8, 9)]
    images = [image.to(memory_format=torch.channels_last) for image in images]
    calls = [inference(conv, image, TREATMENTS["optimized"], CPU) for image in images]
    for call in calls:
        call()
    packed = [conv._packed_weight(image.shape) for image in images]
    copies = {id(copy): torch.ops.mkldnn._nbytes(copy) for copy in packed}
    assert 1 <= len(copies) <= 2
    assert all(size >= 4 * 256 * 256 * 9 for size in copies.values())
    held = sum(dict(_memory(tensor) for tensor in _tensors_held(calls[1])).values())
    feature_map = 4 * 256 * 9 * 9
    expected = 4 * 256 * 256 * 9 + feature_map + sum(copies.values())
    assert held == pytest.approx(expected, rel=0.01)
    assert peak_memory(calls[1], CPU, before=0) >= held + feature_map
