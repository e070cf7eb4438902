# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectors whose dense part runs in a backend, named or the fastest one that is installed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..benchmark.protocol import describe_environment, time_interleaved
from ..checkpoint.atomic import atomic_write
from ..export.dense import DensePart
from ..export.formats import Program
from ..modeling.inference import optimize_for_inference
from .cache import cache_folder, digest_of, export_dense_part, model_key
from .detector import run_dense_part_elsewhere
from .programs import AUTO, BACKENDS, TORCH, check_backend, find_backends
from .quantized import check_quantized

__all__ = ["use_backend"]

logger = logging.getLogger(__name__)

SIZE = (480, 640)
"""Height and width of the image that backends are compared on."""

WARMUP, REPEATS = 2, 5


def use_backend(model: Any, name: str = AUTO, *, int8: str | os.PathLike[str] = "") -> nn.Module:
    """Copy a detector for inference, with its dense part in a backend and the rest in torch.

    The dense part is the backbone with its FPN and the head that reads every location, such as that
    of a region proposal network. It is exported to ONNX once, and the file is kept in
    :func:`cache_folder`. In float32 the detections are those of the model itself.

    Args:
        model: a detector of Detectron2's, on the device that is to compute. It is left as it is.
        name: ``"torch"`` (:func:`optimize_for_inference`), ``"openvino"``, ``"onnxruntime"``,
            ``"tensorrt"``, or ``"auto"``, which measures those that are installed once, keeps the
            outcome for this machine, and takes the fastest.
        int8: a quantized file of this model, which ``tools/export_model.py --int8`` wrote; empty to
            compute in float32.

    Raises:
        FileNotFoundError: there is no such quantized file.
        FileNotWrittenError: the cache folder cannot be written to.
        ModuleNotFoundError: a package that the backend needs is missing.
        ValueError: the backend is unknown or cannot be used on this device, an operator of the
            network does not export, or the quantized file is of another model.
    """
    device = torch.device(model.device)
    check_backend(name, device, int8=bool(int8))
    if int8:
        path, output_names = Path(int8), check_quantized(Path(int8), model_key(model))
    elif name == TORCH or (name == AUTO and not find_backends(device)):
        return optimize_for_inference(model)
    else:
        path, output_names = export_dense_part(model)
    if name == AUTO:
        name = _choose(model, path, device, int8=bool(int8))
        if name == TORCH:
            return optimize_for_inference(model)
    program = BACKENDS[name].load(path, device)
    return run_dense_part_elsewhere(model, program, output_names)


def _choose(model: Any, path: Path, device: torch.device, *, int8: bool) -> str:
    """Return the fastest backend for an ONNX file on a device, measured now or earlier."""
    names = find_backends(device, int8=True) if int8 else [TORCH, *find_backends(device)]
    if len(names) == 1:
        return names[0]
    machine = _describe_machine(device)
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    kept = cache_folder() / f"fastest-{digest_of(content, *names, machine)}.json"
    seconds = _read_seconds(kept, names)
    if not seconds:
        seconds = _measure(model, path, device, names)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept) as partial:
            Path(partial).write_text(json.dumps(seconds) + "\n", encoding="utf-8")
    fastest = min(seconds, key=lambda name: seconds[name])
    logger.info(
        "The backend auto is %s: %s for an image of %d×%d, measured on %s. Kept in %s.",
        fastest,
        ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items()),
        *SIZE,
        machine,
        kept,
    )
    return fastest


def _describe_machine(device: torch.device) -> str:
    described = describe_environment(device)
    packages = [
        f"{package} {version(package)}"
        for package in ("torch", *sorted({BACKENDS[n].packages[0] for n in find_backends(device)}))
    ]
    threads = [described["threads"]] if "threads" in described else []
    return ", ".join([described["device"], *threads, *packages])


def _read_seconds(path: Path, names: list[str]) -> dict[str, float]:
    """Read what was measured earlier; nothing if it is not there or not whole."""
    try:
        seconds = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(seconds[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _measure(model: Any, path: Path, device: torch.device, names: list[str]) -> dict[str, float]:
    programs: dict[str, Program] = {
        name: _eager_program(model) if name == TORCH else BACKENDS[name].load(path, device)
        for name in names
    }
    divisor = max(1, model.backbone.size_divisibility)
    size = [-(-side // divisor) * divisor for side in SIZE]
    images = torch.rand(1, len(model.pixel_mean), *size, device=device)
    with torch.no_grad():
        times = time_interleaved(
            {name: partial(program, images) for name, program in programs.items()},
            device=device,
            warmup=WARMUP,
            repeats=REPEATS,
        )
    return {name: median(values) for name, values in times.items()}


def _eager_program(model: Any) -> Program:
    part = optimize_for_inference(DensePart(model))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(*inputs).values())

    return run
