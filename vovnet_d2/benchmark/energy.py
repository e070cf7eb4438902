# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Read the energy counters of devices. Idle energy is included, as in the VoVNet paper."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..timing import synchronize

POWERCAP = Path("/sys/class/powercap")


class NoEnergyMeter(Exception):
    """Energy cannot be measured here. The message says why, in words that can follow "because"."""


class EnergyMeter(ABC):
    """Measures from :meth:`start` to :meth:`stop`.

    Attributes:
        source: a description of the counter.
    """

    source: str

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> float:
        """Return the joules since :meth:`start`."""


class NvmlCounter(EnergyMeter):
    """Reads the millijoules that the GPU has counted since the driver was loaded."""

    source = "NVML's energy counter of the GPU"

    def __init__(self, nvml: Any, handle: Any):
        self.read: Callable[[], int] = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self.read()  # fails here on a GPU before Volta

    def start(self) -> None:
        self.begin = self.read()

    def stop(self) -> float:
        return (self.read() - self.begin) / 1e3


class Rapl(EnergyMeter):
    """Reads the microjoules that the processor has counted, for all packages, and for the memory if
    it has its own counter. A counter wraps around after a minute or more, so at most once in a
    measurement."""

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
    """Return the best meter for a device. Raise NoEnergyMeter if there is none."""
    return _find_nvml(device) if device.type == "cuda" else Rapl(POWERCAP)


def _find_nvml(device: torch.device) -> EnergyMeter:
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise NoEnergyMeter("it needs NVML: pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
        # torch numbers the GPUs by CUDA_VISIBLE_DEVICES, and NVML does not.
        uuid = torch.cuda.get_device_properties(device).uuid
        return NvmlCounter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except pynvml.NVMLError as error:
        raise NoEnergyMeter(f"NVML gives no energy of the GPU: {error}") from error


def joules_per_call(
    meter: EnergyMeter, call: Callable[[], object], *, device: torch.device, seconds: float
) -> float:
    """Return the energy of one call: the mean of all calls that fit into ``seconds``, at least one.
    Meters update every few tens of milliseconds, so that a single call says little."""
    synchronize(device)
    meter.start()
    end, calls = time.perf_counter() + seconds, 0
    while calls == 0 or time.perf_counter() < end:
        call()
        synchronize(device)
        calls += 1
    return meter.stop() / calls
