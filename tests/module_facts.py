# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Description of a model by its types and hyper-parameters, to compare it with another model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

# Attributes that say nothing about the architecture.
_SKIPPED = {"training", "vis_period", "input_format"}


def differences(model: Any, other: Any) -> dict[str, Any]:
    """Return the facts that differ between two modules, by name, with both values."""
    ours, theirs = (dict(_flatten(facts(value))) for value in (model, other))
    return {
        name: (ours.get(name, "nothing"), theirs.get(name, "nothing"))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name, "nothing") != theirs.get(name, "nothing")
    }


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        yield f"len({name})", len(value)
        for index, item in enumerate(value):
            yield from _flatten(item, f"{name}[{index}]")
    else:
        yield name, value


def facts(value: Any) -> Any:
    """Return types, hyper-parameters and tensor shapes as plain dicts and lists."""
    if isinstance(value, torch.Tensor):
        # Weights are random, so only their shape counts. Anchors and pixel means are compared.
        known = isinstance(value, nn.Parameter) or value.device.type == "meta"
        return tuple(value.shape) if known else value.tolist()
    if isinstance(value, str | bytes | int | float | bool | None):
        return value
    if isinstance(value, nn.Module):
        found = {name: facts(child) for name, child in value.named_children()}
        found |= {name: facts(p) for name, p in value.named_parameters(recurse=False)}
        found |= {name: facts(b) for name, b in value.named_buffers(recurse=False)}
        return found | _attributes(value)
    if isinstance(value, Mapping):
        return {str(key): facts(item) for key, item in value.items()}
    if isinstance(value, Sequence | set):
        return [facts(item) for item in value]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return _attributes(value)


def _attributes(value: Any) -> dict[str, Any]:
    own = {
        name: facts(item)
        for name, item in vars(value).items()
        if name not in _SKIPPED and not (isinstance(value, nn.Module) and name in _MODULE_STATE)
    }
    return {"type": type(value).__qualname__, **own}


_MODULE_STATE = vars(nn.Module()).keys()
