# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What the benchmark measures with: timers, meters of energy and memory, ceilings."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from devices import shapes_alone
from torch import nn

from vovnet_d2 import VoVNet, optimize_for_inference
from vovnet_d2.analysis import analyze
from vovnet_d2.analysis.memory_access import LayerCost
from vovnet_d2.benchmark import ceilings, energy
from vovnet_d2.benchmark.ceilings import floor_seconds
from vovnet_d2.benchmark.energy import NoEnergyMeter, NvmlCounter, NvmlPower, Rapl, find_meter
from vovnet_d2.benchmark.memory import peak_memory
from vovnet_d2.benchmark.protocol import interleaved_rounds, time_interleaved
from vovnet_d2.benchmark.treatments import TREATMENTS
from vovnet_d2.benchmark.workload import count_multiply_adds, inference, training_step
from vovnet_d2.modeling.onednn import PackedConv2d

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
    """A GPU of 200 W, with and without an energy counter."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, counter: bool = True, power: bool = True):
        self.counter, self.power, self.begin = counter, power, time.perf_counter()

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-123"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counter:
            raise self.NVMLError("Not Supported")
        return round(200e3 * (time.perf_counter() - self.begin))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if not self.power:
            raise self.NVMLError("No Permission")
        return 200_000


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="123")
    )


@pytest.mark.parametrize(("counter", "expected"), [(True, NvmlCounter), (False, NvmlPower)])
def test_gpu_energy(gpu, monkeypatch, counter, expected):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml(counter=counter))
    threads = threading.active_count()
    meter = find_meter(torch.device("cuda"))
    assert isinstance(meter, expected)
    begin = time.perf_counter()
    meter.start()
    time.sleep(0.25)
    joules = meter.stop()
    assert joules == pytest.approx(200 * (time.perf_counter() - begin), rel=0.05)
    assert threading.active_count() == threads


def test_gpu_without_energy_says_why(gpu, monkeypatch):
    nvml = FakeNvml(counter=False, power=False)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
    with pytest.raises(NoEnergyMeter, match=r"counter.*Not Supported; .*power.*No Permission"):
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
    # The memory's counter went on to 1,000,000, which it shows as 0, and to 500,000.
    # To the last of them: a counter has one value more than its largest.
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


# ------------------------------------------------------------------------- ceilings and memory


def test_floor_by_hand():
    # One layer is held up by its operations, the other by its bytes.
    layers = [LayerCost(10, 20, 5, 8000), LayerCost(100, 200, 50, 10)]
    seconds = floor_seconds(
        layers,
        batch=4,
        element_size=2,
        multiply_adds_per_second=1000,
        bytes_per_second=100,
    )
    assert seconds == pytest.approx(4 * 8000 / 1000 + (4 * 300 + 50) * 2 / 100)


def test_layers_add_up_to_the_total():
    with shapes_alone():
        complexity = analyze(VoVNet("V-19-slim-eSE"), (64, 64))
    assert sum(c.multiply_adds for c in complexity.layers) == complexity.total.multiply_adds
    assert sum(c.memory_access for c in complexity.layers) == complexity.total.memory_access


def test_ceilings_do_the_work_that_they_claim(monkeypatch):
    monkeypatch.setitem(ceilings._MATRIX_SIZE, "cpu", 64)
    product = ceilings._product(CPU, torch.bfloat16)
    convolution = ceilings._convolution(torch.bfloat16, 8, 16)
    packed = convolution.call()
    # Operators of torch's own, which can be counted.
    monkeypatch.setattr(PackedConv2d, "_is_packable", lambda conv, maps: False)
    torch.testing.assert_close(packed, convolution.call(), atol=0.01, rtol=0.01)
    for ceiling in (product, convolution):
        assert count_multiply_adds(ceiling.call) == ceiling.work
        assert ceiling.call().dtype == torch.bfloat16
    monkeypatch.setitem(ceilings._COPIED_BYTES, "cpu", 1000)
    ceiling = ceilings.copy_ceiling(CPU)
    assert ceiling.call().nbytes * 2 == ceiling.work == 2000


@pytest.mark.parametrize("fastest", range(1 + len(ceilings._CONVOLUTIONS)))
def test_the_ceiling_is_the_fastest(monkeypatch, fastest):
    def pretend(calls, **options):
        names = list(calls)
        return {name: [1e-3 if name == names[fastest] else 1e3] for name in names}

    monkeypatch.setattr(ceilings, "time_interleaved", pretend)
    found = ceilings.matrix_ceiling(CPU, torch.float32).description
    expected = ["product of", *(f"of {c} channels on {s}x{s}" for c, s in ceilings._CONVOLUTIONS)]
    assert expected[fastest] in found


def test_the_ceilings_convolution_does_not_order_its_weight_at_each_call(monkeypatch):
    ordered = []
    pack = PackedConv2d._packed_weight
    monkeypatch.setattr(
        PackedConv2d, "_packed_weight", lambda *args: ordered.append(pack(*args)) or ordered[-1]
    )
    ceiling = ceilings._convolution(torch.float32, 8, 16)
    for _ in range(2):
        ceiling.call()
    first, second = ordered
    assert first is second
    assert first.layout == torch._mkldnn


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
    """Weight, momentum and, from the step before until the next ones are made, gradient."""
    model = OneMap(nn.Linear(1000, 1000, bias=False))
    call = training_step(model, torch.randn(1, 1000), TREATMENTS["plain"], CPU)
    for _ in range(2):
        call()
    assert peak_memory(call, CPU, before=0) == pytest.approx(3 * 4 * 1000**2, rel=0.01)


def test_inference_is_without_autograd():
    conv, image = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8)
    assert conv(image).requires_grad
    assert not inference(conv, image, TREATMENTS["plain"], CPU)().requires_grad


def test_peak_memory_of_packed_weights():
    """The weight, its copies in the orders that oneDNN chose for two images, and two maps.

    The CPU decides how many orders there are and how large a copy is.
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
    expected = 4 * (256 * 256 * 9 + 2 * 256 * 9 * 9) + sum(copies.values())
    assert peak_memory(calls[1], CPU, before=0) == pytest.approx(expected, rel=0.01)
