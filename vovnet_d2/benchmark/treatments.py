# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Prepare networks for timing: plain, which is as they are commonly written, made fast, or run by
another program."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backends import check_backend
from ..errors import UserError, UserValueError
from ..modeling.inference import optimize_for_inference
from ..modeling.vovnet import VoVNet
from ..timing import tf32_in_use
from .plain import plain


@dataclass(frozen=True)
class Treatment:
    """Describes a way to prepare and to run a network.

    Attributes:
        description: a description for tables.
        plain: take the plain network, see ``benchmark/plain.py``: separate norms, NCHW.
        dtype: the type of computation. In training, other types than float32 mean autocast.
        compile: by torch.compile.
        tf32: let a GPU round float32 operands to TF32.
        checkpoint: keep only the input of each VoVNet block for the backward pass.
        backend: the key of :data:`.backends.BACKENDS` that computes a backbone, or the dense part
            of a detector; "" is torch. See :class:`.exports.Exports`.
        int8: quantize what the backend computes.
    """

    name: str
    description: str
    plain: bool = False
    dtype: torch.dtype = torch.float32
    compile: bool = False
    tf32: bool = False
    checkpoint: bool = False
    backend: str = ""
    int8: bool = False

    def refusal(self, device: torch.device, *, training: bool) -> str | None:
        """Say why this treatment cannot run on a device; None if it can."""
        if self.backend:
            return self._refusal_of_backend(device, training=training)
        if self.checkpoint and not training:
            return "Checkpointing only applies to training."
        if self.tf32 and device.type != "cuda":
            return "TF32 is a mode of GPUs."
        if self.dtype == torch.float16 and device.type == "cpu":
            return "float16 needs a GPU: on a CPU use bf16."
        if self.dtype == torch.bfloat16 and device.type == "cuda":
            return (
                None
                if torch.cuda.is_bf16_supported(including_emulation=False)
                else "This GPU has no bfloat16."
            )
        return None

    def _refusal_of_backend(self, device: torch.device, *, training: bool) -> str | None:
        if training:
            return f"The backend {self.backend} only runs inference."
        try:
            half = self.dtype != torch.float32
            check_backend(self.backend, device, int8=self.int8, half=half)
        except UserError as error:
            return str(error)
        return None

    def for_inference(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model for inference in torch, on the device of the model."""
        if self.plain:
            return plain(model).eval().requires_grad_(False)
        return optimize_for_inference(model, dtype=self.dtype, compile=self.compile)

    def for_training(self, model: nn.Module, *, channels_last: bool = True) -> nn.Module:
        """Return a copy of a model for training, in the memory format of the trainer.
        ``channels_last`` is ``MODEL.CHANNELS_LAST`` of its config.

        In mixed precision the trainer also casts boxes and scores to float32, which is not timed.
        Raise ValueError if this treatment has no effect in the model.
        """
        if self.plain:
            return plain(model).train()
        model = copy.deepcopy(model).train()
        if channels_last:
            model.to(memory_format=torch.channels_last)
        if self.checkpoint:
            bodies = [module for module in model.modules() if isinstance(module, VoVNet)]
            if not bodies:
                raise UserValueError("Checkpointing needs a VoVNet.")
            for body in bodies:
                body.checkpoint_blocks = True
        if self.compile:
            getattr(model, "backbone", model).compile()
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context of a training step."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.dtype)

    @contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """Set in the context whether a GPU uses TF32."""
        if device.type != "cuda":
            yield
            return
        backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
        before = tf32_in_use()
        for backend in backends:
            backend.allow_tf32 = self.tf32
        try:
            yield
        finally:
            for backend, allowed in zip(backends, before, strict=True):
                backend.allow_tf32 = allowed


def _by_name(*treatments: Treatment) -> dict[str, Treatment]:
    return {treatment.name: treatment for treatment in treatments}


def compiled_or_failed(cases: int) -> AbstractContextManager[object]:
    """Let torch.compile raise an error where it would silently run a network eagerly: after an
    error, and beyond its limit of compilations. That limit grows with the number of cases, as
    ``Module.compile`` counts the compilations of all networks together."""
    config = torch._dynamo.config
    name = "recompile" if hasattr(config, "recompile_limit") else "cache_size"  # in torch 2.6
    limits = (f"{name}_limit", f"accumulated_{name}_limit")
    settings = {limit: getattr(config, limit) * cases for limit in limits}
    fails = f"fail_on_{name.removesuffix('_size')}_limit_hit"
    return config.patch(settings | {fails: True, "suppress_errors": False})


_ELSEWHERE = "OpenVINO runs the backbone, or the backbone, FPN and dense head of a detector"
_INT8 = "in INT8 by default as tools/export_model.py --int8"
_FAST = "fused norms, channels-last; in training the trainer's memory format"

TREATMENTS = _by_name(
    Treatment("plain", "as commonly written: float32, separate norms, NCHW", plain=True),
    Treatment("plain-tf32", "as plain, on a GPU with TF32", plain=True, tf32=True),
    Treatment("optimized", f"float32: {_FAST}"),
    Treatment("optimized-tf32", "as optimized, on a GPU with TF32", tf32=True),
    Treatment("bf16", f"bfloat16: {_FAST}", dtype=torch.bfloat16),
    Treatment("fp16", f"float16: {_FAST}", dtype=torch.float16),
    Treatment("checkpointed", "as optimized, with VoVNet's blocks run again", checkpoint=True),
    Treatment("compiled", "as optimized, compiled", compile=True),
    Treatment("compiled-bf16", "as bf16, compiled", dtype=torch.bfloat16, compile=True),
    Treatment("compiled-fp16", "as fp16, compiled", dtype=torch.float16, compile=True),
    Treatment("openvino", f"float32, {_ELSEWHERE}", backend="openvino"),
    Treatment("onnxruntime", "as openvino, in ONNX Runtime", backend="onnxruntime"),
    Treatment(
        "openvino-bf16",
        "as openvino, in bfloat16, on a CPU with instructions for it",
        backend="openvino",
        dtype=torch.bfloat16,
    ),
    Treatment("openvino-int8", f"as openvino, {_INT8}", backend="openvino", int8=True),
    Treatment("onnxruntime-int8", f"as onnxruntime, {_INT8}", backend="onnxruntime", int8=True),
    Treatment("tensorrt", "as openvino, in TensorRT, on a GPU", backend="tensorrt"),
    Treatment("tensorrt-fp16", "as tensorrt, in float16", backend="tensorrt", dtype=torch.float16),
    Treatment("tensorrt-int8", f"as tensorrt-fp16, {_INT8}", backend="tensorrt", int8=True),
)
