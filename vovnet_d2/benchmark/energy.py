# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""How much energy a device takes: counted, or power sampled as in the VoVNet paper, or a reason why
it is not known. What a device takes while idle is in it, as in the paper."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .protocol import synchronize

__all__ = ["EnergyMeter", "NoEnergyMeter", "find_meter", "joules_per_call"]

POWERCAP = Path("/sys/class/powercap")
SAMPLING_SECONDS = 0.1  # the paper's


class NoEnergyMeter(Exception):
    """Why energy cannot be measured here, in words that go behind "because"."""


class EnergyMeter(ABC):
    """Measures from :meth:`start` to :meth:`stop`.

    Attributes:
        source: what is read, in words.
    """

    source: str

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> float:
        """Joules since :meth:`start`."""


class NvmlCounter(EnergyMeter):
    """The GPU's own count of millijoules since the driver was loaded."""

    source = "NVML's energy counter of the GPU"

    def __init__(self, nvml: Any, handle: Any):
        self.read: Callable[[], int] = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self.read()  # fails here on a GPU before Volta

    def start(self) -> None:
        self.begin = self.read()

    def stop(self) -> float:
        return (self.read() - self.begin) / 1e3


class NvmlPower(EnergyMeter):
    """Mean of the GPU's power, sampled by a thread, times the time."""

    source = f"NVML's power of the GPU, sampled every {SAMPLING_SECONDS * 1e3:.0f} ms"

    def __init__(self, nvml: Any, handle: Any):
        self.read: Callable[[], int] = lambda: nvml.nvmlDeviceGetPowerUsage(handle)
        self.read()

    def start(self) -> None:
        self.milliwatts = [self.read()]
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.begin = time.perf_counter()
        self.thread.start()

    def _sample(self) -> None:
        while not self.stopped.wait(SAMPLING_SECONDS):
            self.milliwatts.append(self.read())

    def stop(self) -> float:
        self.milliwatts.append(self.read())
        seconds = time.perf_counter() - self.begin
        self.stopped.set()
        self.thread.join()
        samples = self.milliwatts[1:]  # the first one is from before the calls
        return sum(samples) / len(samples) / 1e3 * seconds


class Rapl(EnergyMeter):
    """The processor's count of microjoules: all packages, and their memory where it is counted
    apart. Counters start again from zero; at most once while measuring, at seconds to minutes."""

    def __init__(self, root: Path):
        domains = [path for path in sorted(root.glob("*")) if _is_counted(path)]
        if not domains:
            raise NoEnergyMeter(f"{root} has no energy counter of the processor (RAPL)")
        self.files = [domain / "energy_uj" for domain in domains]
        try:
            self.ranges = [int((d / "max_energy_range_uj").read_text()) for d in domains]
            self.start()
        except PermissionError as error:
            raise NoEnergyMeter(
                f"{error.filename} may be read by root only (sudo chmod a+r on it)"
            ) from error
        except OSError as error:
            raise NoEnergyMeter(f"{error.filename} cannot be read: {error.strerror}") from error
        names = sorted({(domain / "name").read_text().strip() for domain in domains})
        self.source = f"RAPL's counters of {', '.join(names)}"

    def start(self) -> None:
        self.begin = self._read()

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file in self.files]

    def stop(self) -> float:
        spans = zip(self._read(), self.begin, self.ranges, strict=True)
        # A counter goes up to its range, and then to 0.
        return sum((end - begin) % (most + 1) for end, begin, most in spans) / 1e6


def _is_counted(domain: Path) -> bool:
    # Domains of cores or graphics are parts of their package; "psys" is the whole board. The same
    # counters appear a second time through memory-mapped registers ("intel-rapl-mmio").
    if not domain.name.startswith("intel-rapl:") or not (domain / "energy_uj").exists():
        return False
    name = (domain / "name").read_text().strip()
    return name.startswith("package") or name == "dram"


def find_meter(device: torch.device) -> EnergyMeter:
    """The best there is for ``device``.

    Raises:
        NoEnergyMeter: there is none.
    """
    return _find_nvml(device) if device.type == "cuda" else Rapl(POWERCAP)


def _find_nvml(device: torch.device) -> EnergyMeter:
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise NoEnergyMeter("it needs NVML: pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
        # torch's numbers are those of CUDA_VISIBLE_DEVICES, NVML's are not.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        raise NoEnergyMeter(f"NVML does not find the GPU: {error}") from error
    reasons = []
    for meter in (NvmlCounter, NvmlPower):
        try:
            return meter(pynvml, handle)
        except pynvml.NVMLError as error:
            reasons.append(f"{meter.source}: {error}")
    raise NoEnergyMeter("; ".join(reasons))


def joules_per_call(
    meter: EnergyMeter, call: Callable[[], object], *, device: torch.device, seconds: float
) -> float:
    """Energy of one call, from as many in a row as fit into ``seconds``, at least one. Counters
    are renewed every few tens of milliseconds, so that a single call says little."""
    synchronize(device)
    meter.start()
    end, calls = time.perf_counter() + seconds, 0
    while calls == 0 or time.perf_counter() < end:
        call()
        synchronize(device)
        calls += 1
    return meter.stop() / calls
