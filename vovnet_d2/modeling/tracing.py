# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""How a layer finds out that its call is recorded as a graph rather than run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["call_as_one_node", "is_symbolic", "is_traced"]


def is_symbolic(x: Any) -> bool:
    """Return whether ``x`` is a placeholder of ``torch.fx.symbolic_trace``, which has no values."""
    return isinstance(x, Proxy)


def is_traced(*tensors: Any) -> bool:
    """Return whether this call is compiled, exported or traced, and so should show plain operators.

    Args:
        tensors: the inputs of the call, among which a placeholder of ``torch.fx`` may be.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.jit.is_scripting()
        or any(map(is_symbolic, tensors))
    )


def call_as_one_node(module: nn.Module, x: Tensor) -> Tensor:
    """Call ``module``, and let a symbolic trace record the call as one node.

    The trace records only the modules of ``torch.nn`` as one node. Other norms, such as
    Detectron2's FrozenBatchNorm2d, look at their input's values and cannot be traced into.
    """
    if not isinstance(x, Proxy):
        return module(x)
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})
