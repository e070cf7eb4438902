# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training with a backbone that torch.compile has compiled: ``SOLVER.COMPILE``."""

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import UserValueError

logger = logging.getLogger(__name__)

_BACKEND = "inductor"

# Messages of torch and of Triton; their classes differ between versions.
_MISSING = re.compile(
    r"No working C\+\+ compiler|Compiler: .* is not found|Failed to find C(\+\+)? compiler|"
    "working triton installation|too old to be supported by the triton"
)


def check_compilation(cfg: CfgNode) -> None:
    """Check the keys of ``SOLVER.COMPILE``. Raise UserValueError if the memory budget is no share,
    or if nothing is compiled with it."""
    node = cfg.SOLVER.COMPILE
    if not 0 <= node.MEMORY_BUDGET <= 1:
        raise UserValueError(
            f"SOLVER.COMPILE.MEMORY_BUDGET is {node.MEMORY_BUDGET}: give a share from 0 (keep the "
            "fewest feature maps) to 1 (keep what is fastest)."
        )
    if node.MEMORY_BUDGET < 1 and not node.ENABLED:
        raise UserValueError(
            f"SOLVER.COMPILE.MEMORY_BUDGET is {node.MEMORY_BUDGET}, which only a compiled network "
            "can keep: set SOLVER.COMPILE.ENABLED True, too."
        )


def compile_backbone(model: nn.Module, *, memory_budget: float = 1.0, dynamic: bool = True) -> None:
    """Let torch.compile compile the backbone of a detector, with its FPN, or a whole classifier.

    The backbone is compiled at its first call, and in place. Its parameters keep their names, and a
    copy of the model is not compiled. The heads are left out, because their shapes differ from
    image to image.

    Args:
        memory_budget: the share of memory for activations that the backward pass may find saved,
            as torch's ``activation_memory_budget`` has it. What is not saved is computed again.
        dynamic: leave sizes open, so that batches of other sizes need no compilation of their own.
    """
    backend = partial(_compile_graph, memory_budget=memory_budget)
    backbone: Any = getattr(model, "backbone", model)
    backbone.compile(backend=backend, dynamic=dynamic)
    if any(getattr(module, "checkpoint_blocks", False) for module in backbone.modules()):
        _compile_as_one_graph(backbone)


def _compile_as_one_graph(compiled: Any) -> None:
    """Let torch not divide the graph of a compiled network in DistributedDataParallel.

    Older versions of torch cannot divide a graph with activation checkpointing. Other networks of
    the process keep torch's setting. The names are private in torch: if they are missing, nothing
    is changed.
    """
    from torch._dynamo import config

    call = getattr(compiled, "_compiled_call_impl", None)
    if call is None or not hasattr(config, "optimize_ddp"):
        return

    def call_as_one_graph(*args: Any, **kwargs: Any) -> Any:
        with config.patch(optimize_ddp=False):
            return call(*args, **kwargs)

    compiled._compiled_call_impl = call_as_one_graph


def _compile_graph(graph: Any, inputs: list[torch.Tensor], *, memory_budget: float) -> Any:
    from torch._dynamo import lookup_backend  # these take two seconds to import
    from torch._functorch import config

    with config.patch(activation_memory_budget=memory_budget):
        return lookup_backend(_BACKEND)(graph, inputs)


def run_eagerly(cfg: CfgNode) -> AbstractContextManager[object]:
    """Return a context in which a compiled network runs as it does without compilation.

    An evaluation would compile it once more.
    """
    return torch.compiler.set_stance("force_eager") if cfg.SOLVER.COMPILE.ENABLED else nullcontext()


@contextmanager
def explain_compilation(cfg: CfgNode) -> Iterator[None]:
    """Raise a UserValueError if the machine has no compiler (C++, C, or Triton) for the network
    that the context compiles. Any other error of torch.compile keeps its traceback."""
    try:
        yield
    except Exception as error:
        inner = getattr(error, "inner_exception", error)  # the error that a backend has raised
        told = [line for line in str(inner).splitlines() if _MISSING.search(line)]
        if not (cfg.SOLVER.COMPILE.ENABLED and told):
            raise
        logger.error("torch.compile has failed: %s", inner)
        raise UserValueError(
            "torch.compile cannot compile the backbone (SOLVER.COMPILE.ENABLED): "
            f"{told[0].strip().rstrip('.')}. On a CPU it needs a C++ compiler such as g++, on a "
            "GPU also Triton. Without them, set SOLVER.COMPILE.ENABLED False."
        ) from error
