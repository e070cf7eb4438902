# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Observation of each operator of a forward pass, by a dispatch mode.

fvcore's analyses use ``torch.jit.trace``, which cannot trace a convolution of meta tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Observer(Protocol):
    """An object that is called after every operator of a forward pass."""

    def observe(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None: ...


class _ObserverMode(TorchDispatchMode):
    def __init__(self, observers: Sequence[Observer]):
        super().__init__()
        self.observers = observers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for observer in self.observers:
            observer.observe(func, args, kwargs or {}, out)
        return out


class PartTracker:
    """Knows which part of a network is running.

    Attributes:
        current: name of the part, or ``""`` outside all parts.
    """

    def __init__(self) -> None:
        self.current = ""

    @contextmanager
    def watch(
        self,
        parts: Mapping[str, Sequence[nn.Module]],
        on_output: Callable[[str, Any], None] = lambda part, output: None,
    ) -> Iterator[None]:
        """Track the parts of a network in a context.

        Args:
            parts: name to modules, which must not contain one another.
            on_output: called with the name of a part and the output of one of its modules.
        """

        def enter(part: str) -> Callable[..., None]:
            return lambda module, inputs: setattr(self, "current", part)

        def leave(part: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                self.current = ""
                on_output(part, output)

            return hook

        with ExitStack() as hooks:
            for part, modules in parts.items():
                for module in modules:
                    hooks.callback(module.register_forward_pre_hook(enter(part)).remove)
                    hooks.callback(module.register_forward_hook(leave(part)).remove)
            yield


def observe(*observers: Observer) -> TorchDispatchMode:
    """Return a context in which the observers are called after every operator."""
    return _ObserverMode(observers)
