# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectors whose dense part runs in a backend: a given one, or the fastest that is installed."""

import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..atomic import write_text
from ..errors import UserError, UserValueError
from ..export.dense import DensePart
from ..export.formats import Program
from ..modeling.inference import check_dtype, optimize_for_inference
from ..timing import describe_environment, package_version, time_interleaved
from .cache import cache_folder, digest_of, export_dense_part, file_digest, make_folder, model_key
from .detector import run_dense_part_elsewhere
from .programs import (
    AUTO,
    BACKENDS,
    TENSORRT,
    TORCH,
    Precision,
    broken,
    check_backend,
    choose_precision,
    find_backends,
    warn_of_broken,
)
from .quantized import check_quantized

logger = logging.getLogger(__name__)

SIZE = (480, 640)
"""The height and width of the image on which the backends are compared."""

WARMUP, REPEATS = 2, 5

_IN_WORDS: dict[Precision, str] = {
    "float32": "float32",
    "half": "half precision",
    "int8": "INT8",
}


def use_backend(
    model: Any,
    name: str | Sequence[str] = AUTO,
    *,
    int8: str | os.PathLike[str] = "",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Copy a detector for inference, with its dense part in a backend and the rest in torch.

    The dense part is the backbone with its FPN and the head that reads every location, such as the
    head of a region proposal network. It is exported to ONNX once, and the file is kept in
    :func:`cache_folder`. In float32 the detections are the same as those of the model.

    Args:
        model: a detector of Detectron2's, on the device to compute on. It is not changed.
        name: ``"torch"`` (:func:`optimize_for_inference`), ``"openvino"``, ``"onnxruntime"``,
            ``"tensorrt"``, or ``"auto"`` for the names of :func:`rank_backends`. With several
            names, the first backend that loads is used, with a warning for each one that fails.
        int8: a quantized file of this model, from ``tools/export_model.py --int8``. Its layers that
            are not quantized compute in bfloat16 in OpenVINO, if the CPU has instructions for it,
            and in float16 in TensorRT. "" quantizes nothing.
        dtype: the dtype of the backbone, or of the dense part in a backend other than torch:
            float32, bfloat16 or float16. The last two mean bfloat16 in OpenVINO, which needs a CPU
            with instructions for it, and float16 in TensorRT.

    Raises:
        FileNotFoundError: there is no such quantized file.
        FileNotWrittenError: the cache folder cannot be written to.
        ModuleNotFoundError: a package that the backend needs is missing.
        ValueError: the backend is unknown or cannot be used on this device or in this precision, an
            operator of the network cannot be exported, or the quantized file is from another model.
    """
    check_dtype(dtype)
    device = torch.device(model.device)
    if isinstance(name, str):
        check_backend(name, device, int8=bool(int8), half=dtype != torch.float32)
        names = rank_backends(model, int8=int8, dtype=dtype) if name == AUTO else [name]
    else:
        names = list(name)
    for candidate in names:
        if candidate == TORCH:
            return optimize_for_inference(model, dtype=dtype)
        file = _find_file(model, int8)
        if candidate == TENSORRT and not file.for_tensorrt:
            raise UserValueError(
                f"{file.path} was not quantized for TensorRT: run tools/export_model.py --int8 "
                "with --for-tensorrt."
            )
        try:
            program = BACKENDS[candidate].load(
                file.path, device, choose_precision(dtype, int8=bool(int8))
            )
        except UserError:
            raise
        except Exception as error:  # each program raises its own errors
            if candidate == names[-1]:
                raise broken(candidate, error) from error
            warn_of_broken(candidate, error)
        else:
            logger.info("The backend %s computes the dense part of the network.", candidate)
            return run_dense_part_elsewhere(model, program, file.output_names)
    raise AssertionError("There is no name.")


def rank_backends(
    model: Any, *, int8: str | os.PathLike[str] = "", dtype: torch.dtype = torch.float32
) -> list[str]:
    """Return the backends that compute the dense part of a detector, the fastest first.

    They are measured once, and the times are kept for this machine. A backend that fails is left
    out with a warning. The times are not kept then, so that it is tried again. For the arguments
    and the errors see :func:`use_backend`.
    """
    device = torch.device(model.device)
    precision = choose_precision(dtype, int8=bool(int8))
    names = find_backends(device, half=precision == "half")
    if not int8:
        names = [TORCH, *names]
    if len(names) == 1:
        return names
    path, _, for_tensorrt = _find_file(model, int8)
    names = [name for name in names if name != TENSORRT or for_tensorrt]
    machine = _describe_machine(device, names)
    digest = digest_of(file_digest(path), *names, machine, precision)
    kept = make_folder(cache_folder()) / f"fastest-{digest}.json"
    seconds = _read_seconds(kept, names)
    where = f"Kept in {kept}"
    if not seconds:
        seconds = _measure(model, path, device, names, dtype, precision)
        if len(seconds) == len(names):
            write_text(kept, json.dumps(seconds) + "\n")
        else:
            where = "Not kept"
    ranked = sorted(seconds, key=lambda name: seconds[name])
    logger.info(
        "The backend auto is %s: %s for an image of %d×%d in %s, measured on %s. %s.",
        ranked[0],
        ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items()),
        *SIZE,
        _IN_WORDS[precision],
        machine,
        where,
    )
    return ranked


class _File(NamedTuple):
    """An ONNX file of the dense part of a model."""

    path: Path
    output_names: tuple[str, ...]
    for_tensorrt: bool = True


def _find_file(model: Any, int8: str | os.PathLike[str]) -> _File:
    if int8:
        return _File(Path(int8), *check_quantized(Path(int8), model_key(model)))
    return _File(*export_dense_part(model))


def _describe_machine(device: torch.device, names: list[str]) -> str:
    described = describe_environment(device)
    modules = {BACKENDS[name].packages[0] for name in names if name != TORCH}
    packages = [f"{module} {package_version(module)}" for module in ("torch", *sorted(modules))]
    threads = [described["threads"]] if "threads" in described else []
    return ", ".join([described["device"], *threads, *packages])


def _read_seconds(path: Path, names: list[str]) -> dict[str, float]:
    """Read earlier times; the result is empty if they are missing or incomplete."""
    try:
        seconds = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(seconds[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _measure(
    model: Any,
    path: Path,
    device: torch.device,
    names: list[str],
    dtype: torch.dtype,
    precision: Precision,
) -> dict[str, float]:
    """Return the seconds for one image of each backend that works."""
    divisor = max(1, model.backbone.size_divisibility)
    size = [-(-side // divisor) * divisor for side in SIZE]
    images = torch.rand(1, len(model.pixel_mean), *size, device=device)
    programs: dict[str, Program] = {}
    with torch.no_grad():
        for name in names:
            try:
                program = (
                    _torch_program(model, dtype)
                    if name == TORCH
                    else BACKENDS[name].load(path, device, precision)
                )
                program(images)
            except Exception as error:  # each program raises its own errors
                if name == TORCH:
                    raise
                warn_of_broken(name, error)
            else:
                programs[name] = program
        if not programs:
            raise UserValueError(
                f"No backend computes {path} on {device}: {', '.join(names)} fail."
            )
        times = time_interleaved(
            {name: partial(program, images) for name, program in programs.items()},
            device=device,
            warmup=WARMUP,
            repeats=REPEATS,
        )
    return {name: median(values) for name, values in times.items()}


def _torch_program(model: Any, dtype: torch.dtype) -> Program:
    part = optimize_for_inference(DensePart(model), dtype=dtype)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(*inputs).values())

    return run
