# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""How a layer finds out that somebody follows its call, and so should see plain operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy

__all__ = ["call_as_one_node", "has_hooks", "is_followed", "is_symbolic", "is_traced"]


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


def is_followed(*tensors: Any) -> bool:
    """Return whether this call is traced, or something else looks at its operators one by one.

    The transforms of torch.func and forward-mode differentiation do; dispatch modes, such as
    torch's FlopCounterMode and FakeTensorMode; and subclasses of tensors, such as DTensor. They
    know plain operators best.

    Args:
        tensors: the inputs of the call.
    """
    return (
        is_traced()
        or any(type(x) not in (Tensor, nn.Parameter) for x in tensors)
        or _count_dispatch_modes() > 0
        or _are_transforms_active()
        or getattr(forward_ad, "_current_level", -1) >= 0
    )


# Private in torch: where they are missing, modes and transforms see what is run.
_count_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def has_hooks(module: nn.Module) -> bool:
    """Return whether somebody wants to know of the calls of ``module`` or of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(_GLOBAL_HOOKS)
    )


# Private in torch: where they are missing, hooks on all modules see those that are called.
_GLOBAL_HOOKS = [
    getattr(nn.modules.module, f"_global_{kind}_hooks", {})
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def call_as_one_node(module: nn.Module, x: Tensor) -> Tensor:
    """Call ``module``, and let a symbolic trace record the call as one node.

    The trace records only the modules of ``torch.nn`` as one node. Other norms, such as
    Detectron2's FrozenBatchNorm2d, look at their input's values and cannot be traced into.
    """
    if not isinstance(x, Proxy):
        return module(x)
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})
