# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The backends: what each needs, where it can compute, and how it loads an ONNX file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..export.formats import Program, load_onnxruntime

__all__ = [
    "AUTO",
    "BACKENDS",
    "TORCH",
    "check_backend",
    "find_backends",
]

TORCH, AUTO = "torch", "auto"

INT8 = ("openvino", "onnxruntime")
"""The backends that run quantized files. TensorRT asks for another kind of quantization."""


@dataclass(frozen=True)
class Backend:
    """
    Attributes:
        packages: what has to be installed, as Python imports it and as pip installs it.
        load: loads an ONNX file to run on a device.
        why_not: says why it cannot compute on a device, or returns "" where it can. Asked only
            where the packages are installed.
    """

    packages: tuple[str, ...]
    load: Callable[[Path, torch.device], Program]
    why_not: Callable[[torch.device], str]


def check_backend(name: str, device: torch.device, *, int8: bool = False) -> None:
    """Refuse a backend that cannot be used here.

    Args:
        name: a key of :data:`BACKENDS`, ``"torch"`` or ``"auto"``.
        int8: whether it is to run a quantized file.

    Raises:
        ModuleNotFoundError: a package is missing.
        ValueError: the name is unknown, or the backend cannot compute on this device or in INT8.
    """
    if name not in (TORCH, AUTO, *BACKENDS):
        choices = ", ".join((TORCH, *BACKENDS, AUTO))
        raise ValueError(f"Unknown backend {name!r}: choose from {choices}.")
    if int8 and name not in (AUTO, *INT8):
        raise ValueError(
            f"The backend {name} runs no INT8 file: choose from {', '.join((*INT8, AUTO))}."
        )
    if name == AUTO and int8 and not find_backends(device, int8=True):
        raise ModuleNotFoundError(
            f"No backend that runs INT8 files on {device} is installed: "
            "pip install onnx onnxscript onnxruntime."
        )
    if name not in BACKENDS:
        return
    if missing := _missing_packages(name):
        raise ModuleNotFoundError(
            f"The backend {name} needs {', '.join(missing)}: pip install {' '.join(missing)}."
        )
    if reason := BACKENDS[name].why_not(device):
        raise ValueError(f"The backend {name} cannot be used on {device}: {reason}.")


def find_backends(device: torch.device, *, int8: bool = False) -> list[str]:
    """Return the names of the backends, torch aside, that are installed and take this device.

    Args:
        int8: whether they are to run quantized files.
    """
    return [
        name
        for name, backend in BACKENDS.items()
        if not (int8 and name not in INT8)
        and not _missing_packages(name)
        and not backend.why_not(device)
    ]


def _missing_packages(name: str) -> list[str]:
    return [p for p in BACKENDS[name].packages if not importlib.util.find_spec(p)]


# ONNX Runtime ------------------------------------------------------------------------------------


def _why_not_onnxruntime(device: torch.device) -> str:
    import onnxruntime

    if device.type == "cpu" or "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return ""
    return "the onnxruntime that is installed has no CUDAExecutionProvider (onnxruntime-gpu has)"


# TensorRT, by ONNX Runtime -----------------------------------------------------------------------


def _load_tensorrt(path: Path, device: torch.device) -> Program:
    # An engine is built for minutes, so it is kept beside the ONNX file.
    options = {
        "device_id": device.index or 0,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(path.parent),
        "trt_engine_cache_prefix": path.stem,
    }
    return load_onnxruntime(path, device, (("TensorrtExecutionProvider", options),))


def _why_not_tensorrt(device: torch.device) -> str:
    import onnxruntime

    if device.type != "cuda":
        return "it needs a GPU"
    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        return ""
    return (
        "the onnxruntime that is installed has no TensorrtExecutionProvider (onnxruntime-gpu has)"
    )


# OpenVINO ----------------------------------------------------------------------------------------


def _load_openvino(path: Path, device: torch.device) -> Program:
    import openvino

    settings = {
        # By default float layers are computed in bfloat16 where the processor can.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = compiled([x.numpy() for x in inputs])
        return tuple(torch.from_numpy(results[output]) for output in compiled.outputs)

    return run


def _why_not_openvino(device: torch.device) -> str:
    return "" if device.type == "cpu" else "it computes on CPUs"


_EXPORT = ("onnx", "onnxscript")

BACKENDS = {
    "openvino": Backend(("openvino", *_EXPORT), _load_openvino, _why_not_openvino),
    "onnxruntime": Backend(("onnxruntime", *_EXPORT), load_onnxruntime, _why_not_onnxruntime),
    "tensorrt": Backend(("onnxruntime", *_EXPORT), _load_tensorrt, _why_not_tensorrt),
}
"""Name of a backend to how it runs an ONNX file. torch itself is the one beside them."""
