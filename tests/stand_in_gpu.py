# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A device that stands for a GPU, for tests on machines without one.

Its tensors say that they are on the device "meta", because torch has an autograd engine for this
device on any machine. Their values are on the CPU, and operators compute with these values. As on a
GPU, an operator fails if it mixes these tensors with tensors on the CPU, unless the latter are
single numbers or indices. As on a GPU, only a copy on the CPU can become a NumPy array.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "meta"
_COPIES = {torch.ops.aten.copy_, torch.ops.aten._to_copy}
_INDEXING = {
    torch.ops.aten.index,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
    torch.ops.aten._index_put_impl_,
}


class DeviceTensor(Tensor):
    """Tensor on the device that stands for a GPU."""

    content: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "DeviceTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )

    def __init__(self, values: Tensor):
        assert values.device.type == "cpu"
        self.content = values

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.content})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    """Mode in which the results of operators on the device are `DeviceTensor`s."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """Mode in which constants and lists of indices keep their values.

    Without it, torch would create them on the device "meta" without values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor):
            device = torch.device(kwargs.get("device") or "cpu")
            if device.type == DEVICE:
                return func(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        elif func is Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            return args[0].content.new_tensor(*args[1:], **kwargs).to(DEVICE)
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _with_tensors(args[1]), *args[2:])
        return func(*args, **kwargs)


def _with_tensors(index: Any) -> Any:
    """Return an index with tensors instead of lists."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    on_device = _check_devices(func, args, kwargs)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, DeviceTensor)]
    known = {id(x.content): x for x in given}  # an in-place operator returns its argument
    result = func(*tree_map(_content, args), **tree_map(_content, kwargs))

    def wrap(value: Any) -> Any:
        if id(value) in known:
            assert known[id(value)].shape == value.shape, f"{func} must not change a shape in place"
            return known[id(value)]
        return DeviceTensor(value) if on_device and isinstance(value, Tensor) else value

    return tree_map(wrap, result)


def _check_devices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if the result is on the device."""
    packet = func.overloadpacket
    if packet in _INDEXING:
        indices = [isinstance(index, DeviceTensor) for index in tree_leaves(args[1])]
        assert isinstance(args[0], DeviceTensor) or not any(indices), (
            f"{func} has a tensor on the CPU and indices on another device"
        )
        args = (args[0], *args[2:])
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_device = [isinstance(x, DeviceTensor) for x in tensors]
    if packet in _COPIES:
        return on_device[0]
    numbers = [x.dim() == 0 and type(x) is Tensor for x in tensors]
    both = any(on_device) and not all(d or n for d, n in zip(on_device, numbers, strict=True))
    assert not both, f"{func} has tensors on the CPU and on another device"
    return any(on_device)


def _content(value: Any) -> Any:
    return value.content if isinstance(value, DeviceTensor) else value


def move_to_device(model: nn.Module) -> nn.Module:
    """Move only the parameters and buffers of a model to the device."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = DeviceTensor(parameter.detach().clone())
                new = nn.Parameter(values, requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                new = DeviceTensor(buffer.clone())
                module._buffers[name] = moved.setdefault(id(buffer), new)
    return model


@contextmanager
def device_that_stands_for_a_gpu() -> Iterator[None]:
    with _Constants(), _Operators():
        yield
