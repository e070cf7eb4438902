# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""How a network is treated before it is timed: as it is written, or by what makes it fast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modeling.inference import optimize_for_inference
from ..modeling.vovnet import VoVNet
from .plain import plain

__all__ = ["TREATMENTS", "Treatment", "compiled_or_failed"]


@dataclass(frozen=True)
class Treatment:
    """
    Attributes:
        description: what is done, in inference and in training.
        plain: leave the network as it is written: separate norms, NCHW.
        dtype: what it computes in; in training other types than float32 stand for autocast.
        compile: by torch.compile.
        tf32: let a GPU round float32 operands to TF32.
        checkpoint: keep each block's input alone for the backward pass (of VoVNet).
    """

    name: str
    description: str
    plain: bool = False
    dtype: torch.dtype = torch.float32
    compile: bool = False
    tf32: bool = False
    checkpoint: bool = False

    def refusal(self, device: torch.device, *, training: bool) -> str | None:
        """Why this cannot run on ``device``; None if it can."""
        if self.checkpoint and not training:
            return "There is no backward pass to keep less for."
        if self.tf32 and device.type != "cuda":
            return "TF32 is a mode of GPUs."
        if self.dtype == torch.float16 and device.type == "cpu":
            return "float16 needs a GPU: on a CPU use bf16."
        if self.dtype == torch.bfloat16 and device.type == "cuda":
            return None if torch.cuda.is_bf16_supported() else "This GPU has no bfloat16."
        return None

    def for_inference(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` to infer with."""
        if self.plain:
            return plain(model).eval().requires_grad_(False)
        return optimize_for_inference(model, dtype=self.dtype, compile=self.compile)

    def for_training(self, model: nn.Module, *, channels_last: bool = True) -> nn.Module:
        """A copy of ``model`` to train, as the trainer would have it.

        Args:
            channels_last: ``MODEL.CHANNELS_LAST`` of its config.

        Raises:
            ValueError: this treatment has nothing to do in it.
        """
        if self.plain:
            return plain(model).train()
        model = copy.deepcopy(model).train()
        if channels_last:
            model.to(memory_format=torch.channels_last)
        if self.checkpoint:
            bodies = [module for module in model.modules() if isinstance(module, VoVNet)]
            if not bodies:
                raise ValueError("It is no VoVNet, whose blocks could be run again.")
            for body in bodies:
                body.checkpoint_blocks = True
        if self.compile:
            getattr(model, "backbone", model).compile()
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """What a training step runs under."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.dtype)

    @contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """What every call runs under: whether a GPU uses TF32."""
        if device.type != "cuda":
            yield
            return
        backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
        before = [backend.allow_tf32 for backend in backends]
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
    """A context in which torch.compile never leaves a network eager without a word, as it does
    after an error, and beyond a number of compilations: that raises here. The number is torch's own
    for each of ``cases``, as ``Module.compile`` counts those of all networks together."""
    config = torch._dynamo.config
    name = "recompile" if hasattr(config, "recompile_limit") else "cache_size"  # in torch 2.6
    limits = (f"{name}_limit", f"accumulated_{name}_limit")
    settings = {limit: getattr(config, limit) * cases for limit in limits}
    fails = f"fail_on_{name.removesuffix('_size')}_limit_hit"
    return config.patch(settings | {fails: True, "suppress_errors": False})


_FAST = "norms folded, channels-last; in training as the trainer has it"

TREATMENTS = _by_name(
    Treatment("plain", "eager float32, separate norms, NCHW", plain=True),
    Treatment("plain-tf32", "as plain, on a GPU with TF32", plain=True, tf32=True),
    Treatment("optimized", f"float32: {_FAST}"),
    Treatment("optimized-tf32", "as optimized, on a GPU with TF32", tf32=True),
    Treatment("bf16", f"bfloat16: {_FAST}", dtype=torch.bfloat16),
    Treatment("fp16", f"float16: {_FAST}", dtype=torch.float16),
    Treatment("checkpointed", "as optimized, with VoVNet's blocks run again", checkpoint=True),
    Treatment("compiled", "as optimized, compiled", compile=True),
    Treatment("compiled-bf16", "as bf16, compiled", dtype=torch.bfloat16, compile=True),
    Treatment("compiled-fp16", "as fp16, compiled", dtype=torch.float16, compile=True),
)
