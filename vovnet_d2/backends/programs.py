# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The backends: what each needs, where it can compute, and how it loads an ONNX file."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..errors import UserImportError, UserValueError, describe
from ..export.formats import Program, load_onnxruntime
from .cache import cache_folder, file_digest, make_folder

logger = logging.getLogger(__name__)

TORCH, TENSORRT, AUTO = "torch", "tensorrt", "auto"

Precision = Literal["float32", "half", "int8"]
"""The precision of a backend. Half precision is bfloat16 in OpenVINO and float16 in TensorRT. In
INT8, layers that are not quantized compute in half precision where the backend has it."""


def choose_precision(dtype: torch.dtype, *, int8: bool) -> Precision:
    """Return the precision of a backend for an INT8 file, or for a file in float32 that it computes
    in a dtype."""
    if int8:
        return "int8"
    return "float32" if dtype == torch.float32 else "half"


@dataclass(frozen=True)
class Backend:
    """Describes a backend: what it needs, and how it loads a file.

    Attributes:
        packages: the packages that it needs; the names are those of import and of pip.
        load: loads an ONNX file to run on a device, in a precision.
        why_not: returns the reason why it cannot compute on a device, or "" if it can. It is called
            only if the packages are installed.
        has_half: returns whether it computes in half precision here. It is called only if the
            packages are installed.
    """

    packages: tuple[str, ...]
    load: Callable[[Path, torch.device, Precision], Program]
    why_not: Callable[[torch.device], str]
    has_half: Callable[[], bool]


def check_backend(
    name: str, device: torch.device, *, int8: bool = False, half: bool = False
) -> None:
    """Check that a backend, a key of :data:`BACKENDS`, ``"torch"`` or ``"auto"``, can be used on
    this machine, for ``int8`` that it runs quantized files, and for ``half`` that it computes in
    half precision.

    Raises:
        ModuleNotFoundError: a package is missing.
        ValueError: the name is unknown, or the backend cannot compute on this device or in this
            precision.
    """
    if name not in (TORCH, AUTO, *BACKENDS):
        choices = ", ".join((TORCH, *BACKENDS, AUTO))
        raise UserValueError(f"Unknown backend {name!r}: choose from {choices}.")
    if int8 and name == TORCH:
        raise UserValueError(
            f"The backend {name} cannot run an INT8 file: choose from "
            f"{', '.join((*BACKENDS, AUTO))} (--backend, TEST.BACKEND)."
        )
    if name == AUTO and int8 and not find_backends(device):
        raise UserImportError(
            f"No backend that runs INT8 files on {device} is installed: "
            "pip install onnx onnxscript onnxruntime."
        )
    if name not in BACKENDS:
        return
    if missing := _missing_packages(name):
        raise UserImportError(
            f"The backend {name} needs {', '.join(missing)}: pip install {' '.join(missing)}."
        )
    try:
        reason = BACKENDS[name].why_not(device)
        lacks_half = half and not int8 and not (reason or BACKENDS[name].has_half())
    except Exception as error:  # a package may be installed and fail to import
        raise broken(name, error) from error
    if reason:
        raise UserValueError(f"The backend {name} cannot be used on {device}: {reason}.")
    if lacks_half:
        others = ", ".join((TORCH, *find_backends(device, half=True), AUTO))
        raise UserValueError(
            f"The backend {name} computes in float32 on this machine: choose from {others}, or "
            "float32 (for an evaluation TEST.AMP.ENABLED False)."
        )


def find_backends(device: torch.device, *, half: bool = False) -> list[str]:
    """Return the names of the backends, except torch, that are installed and take this device. With
    ``half``, they must compute in half precision."""
    installed = [name for name in BACKENDS if not _missing_packages(name)]
    return [name for name in installed if _takes(name, device, half=half)]


def _takes(name: str, device: torch.device, *, half: bool) -> bool:
    backend = BACKENDS[name]
    try:
        return not backend.why_not(device) and (backend.has_half() or not half)
    except Exception as error:  # a package may be installed and fail to import
        warn_of_broken(name, error)
        return False


def broken(name: str, error: Exception) -> UserValueError:
    """Return the error for a backend that the user has named and that fails."""
    return UserValueError(
        f"The backend {name} is installed and fails ({describe(error)}): install it again, or "
        f"choose {TORCH} or {AUTO}."
    )


def warn_of_broken(name: str, error: Exception) -> None:
    """Say that a backend is skipped, and why."""
    logger.warning(
        "The backend %s is installed and fails, so it is skipped: %s", name, describe(error)
    )


def _missing_packages(name: str) -> list[str]:
    return [p for p in BACKENDS[name].packages if not importlib.util.find_spec(p)]


# ONNX Runtime ------------------------------------------------------------------------------------


def _load_onnxruntime(path: Path, device: torch.device, precision: Precision) -> Program:
    return load_onnxruntime(path, device)  # the file says which layers are in INT8


def _why_not_onnxruntime(device: torch.device) -> str:
    missing = _missing_provider("CUDAExecutionProvider")
    return "" if device.type == "cpu" else missing


def _missing_provider(name: str) -> str:
    """Return the reason why ONNX Runtime has no execution provider of this name, or ""."""
    import onnxruntime

    if name in onnxruntime.get_available_providers():
        return ""
    return f"the onnxruntime that is installed has no {name} (onnxruntime-gpu has)"


# TensorRT, run by ONNX Runtime -------------------------------------------------------------------


def _load_tensorrt(path: Path, device: torch.device, precision: Precision) -> Program:
    # It takes minutes to build an engine, so it is kept. ONNX Runtime does not look at the weights
    # when it searches for an engine of an earlier file.
    folder = make_folder(cache_folder())
    options = {
        "device_id": device.index or 0,
        "trt_fp16_enable": precision != "float32",
        "trt_int8_enable": precision == "int8",
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": f"{precision}-{file_digest(path)}",
    }
    return load_onnxruntime(path, device, (("TensorrtExecutionProvider", options),))


def _why_not_tensorrt(device: torch.device) -> str:
    missing = _missing_provider("TensorrtExecutionProvider")
    return missing if device.type == "cuda" else "it needs a GPU"


# OpenVINO ----------------------------------------------------------------------------------------


def _load_openvino(path: Path, device: torch.device, precision: Precision) -> Program:
    import openvino

    in_bfloat16 = precision != "float32" and _has_bfloat16()
    settings = {
        # By default, OpenVINO would take bfloat16 for all float layers if the CPU has it.
        "INFERENCE_PRECISION_HINT": "bf16" if in_bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = compiled([x.numpy() for x in inputs])
        return tuple(torch.from_numpy(results[output]) for output in compiled.outputs)

    return run


def _has_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16, as OpenVINO sees it."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _why_not_openvino(device: torch.device) -> str:
    return "" if device.type == "cpu" else "it computes on CPUs"


_EXPORT = ("onnx", "onnxscript")

BACKENDS = {
    "openvino": Backend(("openvino", *_EXPORT), _load_openvino, _why_not_openvino, _has_bfloat16),
    "onnxruntime": Backend(
        ("onnxruntime", *_EXPORT), _load_onnxruntime, _why_not_onnxruntime, lambda: False
    ),
    TENSORRT: Backend(("onnxruntime", *_EXPORT), _load_tensorrt, _why_not_tensorrt, lambda: True),
}
"""The backends by name, without torch itself."""
