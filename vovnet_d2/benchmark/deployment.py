# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure what a deployment needs: the size of its files, the memory of a process, the throughput
of all cores, and AP."""

import importlib
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backends import BACKENDS, choose_precision
from ..engine.quantization import evaluate
from ..errors import one_line
from ..modeling.inference import compile_forward
from .networks import Network
from .processes import added_memory, calls_per_second
from .treatments import Treatment
from .workload import inference

logger = logging.getLogger(__name__)

COLUMNS = ("file_mb", "process_mb", "images_per_second", "box_ap", "mask_ap")
"""The columns of a study with ``deployment``."""

CONVENTIONS = {
    "file": "the weights that torch holds, and the exported file of a backend",
    "process": "growth of the resident memory, at its peak, of a fresh process that loads the "
    "network and calls it, without the memory of imported packages; on a CPU",
    "img/s, all cores": "throughput of one process for each core that the benchmark may use, each "
    "with one thread on its own core, which all run the network at once; on a CPU",
    "box AP, mask AP": "on the first data set of DATASETS.TEST, with --weights",
}
"""The rule for each of these columns."""

SECONDS = 2.0
"""The least time in which the throughput is counted."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Served:
    """Describes a network on a CPU that another process can load and call.

    Attributes:
        file: the network with its inputs, written by :func:`save_network`.
        program: the file that the backend loads; None for torch.
    """

    file: Path
    treatment: Treatment
    program: Path | None

    def preload(self) -> None:
        """Import the packages of the network."""
        if self.program:
            importlib.import_module(BACKENDS[self.treatment.backend].packages[0])
        torch.load(self.file, map_location="meta", weights_only=False)

    def load(self) -> Callable[[], object]:
        """Load the network, and return a function that runs it once."""
        model, inputs = torch.load(self.file, weights_only=False)
        if self.program:
            load = BACKENDS[self.treatment.backend].load
            precision = choose_precision(self.treatment.dtype, int8=self.treatment.int8)
            model.backbone.program = load(self.program, _CPU, precision)
        if self.treatment.compile:
            compile_forward(getattr(model, "backbone", model))
        return inference(model, inputs, self.treatment, _CPU)


def save_network(model: nn.Module, inputs: Any, path: Path) -> None:
    """Write a network, without the program of its backend, and its inputs to a file."""
    attributes = vars(getattr(model, "backbone", model))
    not_picklable = {key: attributes.pop(key) for key in {"program"} & attributes.keys()}
    try:
        # Older protocols cannot pickle memory formats.
        torch.save((model, inputs), path, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    finally:
        attributes.update(not_picklable)


def file_bytes(model: nn.Module, program: Path | None) -> int:
    """Return the bytes of the tensors of a network, and of the file that its backend loads."""
    tensors = sum(tensor.nbytes for tensor in model.state_dict().values())
    return tensors + (program.stat().st_size if program else 0)


def measure_processes(
    name: str, model: nn.Module, inputs: Any, served: Served, *, batch: int
) -> dict[str, float | None]:
    """Return the memory of a process that runs a network on a CPU, in MB, and the images per second
    of all cores. A number that cannot be measured is None, with a warning.

    Args:
        name: the name for the warning.
        model: the network, for which the file ``served.file`` is written.
        inputs: the inputs of the network, with ``batch`` images.
    """
    found: dict[str, float | None] = {"process_mb": None, "images_per_second": None}
    try:
        save_network(model, inputs, served.file)
        added = added_memory(served.preload, served.load)
        found["process_mb"] = None if added is None else added / 1e6
        rate = calls_per_second(served.load, seconds=SECONDS, memory=added)
        found["images_per_second"] = batch * rate
    except Exception as error:  # networks of others may raise any error, for example in pickling
        logger.warning("%s cannot be measured in processes of its own: %s.", name, one_line(error))
    finally:
        served.file.unlink(missing_ok=True)
    return found


def measure_ap(
    network: Network, model: nn.Module, treatment: Treatment, device: torch.device
) -> dict[str, float | None]:
    """Return the box AP of a detector, and its mask AP if it finds masks."""
    with treatment.precision(device):
        results = evaluate(model, network.cfg)
    return {"box_ap": results.get("bbox AP"), "mask_ap": results.get("segm AP")}
