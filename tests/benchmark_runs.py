# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Benchmark studies of networks whose time and energy are known."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from vovnet_d2.benchmark import energy, study
from vovnet_d2.benchmark.networks import Network
from vovnet_d2.benchmark.study import Plan, Study


class Sleeper(nn.Module):
    """Network that sleeps for `seconds` in each forward pass."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if x.device.type != "meta":
            time.sleep(self.seconds)
        return {"y": self.conv(x)}


def sleeper(name: str, seconds: float) -> Network:
    return Network(name, lambda: Sleeper(seconds))


def measure_energy_of_single_calls(monkeypatch: pytest.MonkeyPatch) -> float:
    """Let each case run only once while its energy is measured; return `energy_seconds` for it."""
    monkeypatch.setattr(study, "_LEAST_ENERGY_SECONDS", 0)
    return 1e-9


class SteadyMeter(energy.EnergyMeter):
    """Meter that reads ten joules in every measurement."""

    source = "a test"

    def start(self) -> None:
        pass

    def stop(self) -> float:
        return 10.0


def make_plan(**options: Any) -> Plan:
    defaults: dict[str, Any] = {
        "networks": [sleeper("slow", 0.06), sleeper("fast", 0.03)],
        "sizes": [(64, 64)],
        "batches": [2],
        "warmup": 1,
        "repeats": 3,
        "energy_seconds": 0.0,
    }
    return Plan(**defaults | options)


def run_study(**options: Any) -> Study:
    result = Study(make_plan(**options))
    result.run()
    if isinstance(result.interruption, Exception):
        raise result.interruption
    return result
