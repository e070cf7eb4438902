# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Functions that tell a layer whether its call is traced and needs plain operators."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy


def is_symbolic(x: Any) -> bool:
    """Return True if ``x`` is a placeholder of ``torch.fx.symbolic_trace``."""
    return isinstance(x, Proxy)


def is_traced(*tensors: Any) -> bool:
    """Return True if this call with some tensors is compiled, exported or traced. Some of the
    tensors may be placeholders of ``torch.fx``."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.jit.is_scripting()
        or any(map(is_symbolic, tensors))
    )


def is_followed(*tensors: Any) -> bool:
    """Return True if this call with some tensors is traced, or if something else sees its operators
    one by one.

    Transforms of torch.func, forward-mode differentiation, dispatch modes such as FlopCounterMode
    and FakeTensorMode, and subclasses of tensors such as DTensor do. They need plain operators.
    """
    return (
        is_traced()
        or any(type(x) not in (Tensor, nn.Parameter) for x in tensors)
        or _count_dispatch_modes() > 0
        or _are_transforms_active()
        or getattr(forward_ad, "_current_level", -1) >= 0
    )


# These are private in torch. If they are missing, modes and transforms see other operators.
_count_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def has_hooks(module: nn.Module) -> bool:
    """Return True if ``module`` has hooks, or if there are hooks on all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(_GLOBAL_HOOKS)
    )


# These are private in torch. If they are missing, hooks on all modules may miss some calls.
_GLOBAL_HOOKS = [
    getattr(nn.modules.module, f"_global_{kind}_hooks", {})
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def call_as_one_node(module: nn.Module, x: Tensor) -> Tensor:
    """Call ``module``, and let a symbolic trace record the call as one node.

    A trace records modules of ``torch.nn`` as one node and follows the code of all others. The code
    of Detectron2's FrozenBatchNorm2d looks at the values of its input, which a trace cannot follow.
    """
    if not isinstance(x, Proxy):
        return module(x)
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})
