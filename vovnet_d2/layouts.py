# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Map the names of VoVNet's parameters from one layout to another.

Four layouts name the same tensors:

- ``native``: the names of this package.
- ``detectron2``: the published Detectron2 weights (VoVNetV2, CenterMask2, DD3D, PETR, ...), and,
  with ``classifier``, the published v1 classification weights.
- ``timm``: pytorch-image-models, also with ``stem_0`` and ``stages_0`` for ``stem.0`` and
  ``stages.0``, as its ``features_only=True`` flattens them.
- ``osmr``: pytorchcv (osmr/imgclsmob), which has V-27-slim, V-39 and V-57, so no names for eSE and
  depthwise convolutions.

This module imports nothing from the package. Both the model, when it loads a state dict, and the
checkpoint tools, when they convert one, read this table.
"""

import re
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import NamedTuple

LAYOUTS = ("native", "detectron2", "timm", "osmr")

# Module names as templates, one column for each of LAYOUTS. {s} is the stage (2 to 5), {i} the
# convolution of the stem, from 1; {b} the block and {l} the layer, from 0. {b+1} is what stands in
# the name where a layout counts otherwise, and None stands for what a layout has no name for.
_OSA = "stage{s}.OSA{s}_{b+1}"
_BLOCK = "stages.{s-2}.blocks.{b}"
_UNIT = "features.stage{s-1}.unit{b+1}"
_ALWAYS_FULL = [
    ("stem.conv1", "stem.stem_1/", "stem.0.", "features.init_block.conv1."),
    (
        "stage{s}.{b}.reduction",
        f"{_OSA}.conv_reduction.OSA{{s}}_{{b+1}}_reduction_0/",
        f"{_BLOCK}.conv_reduction.",
        None,
    ),
    (
        "stage{s}.{b}.aggregation",
        f"{_OSA}.concat.OSA{{s}}_{{b+1}}_concat/",
        f"{_BLOCK}.conv_concat.",
        f"{_UNIT}.concat_conv.",
    ),
]
_FULL_OR_DEPTHWISE = [
    ("stem.conv{i}", "stem.stem_{i}/", "stem.{i-1}.", "features.init_block.conv{i}."),
    (
        "stage{s}.{b}.layers.{l}",
        f"{_OSA}.layers.{{l}}.OSA{{s}}_{{b+1}}_{{l}}/",
        f"{_BLOCK}.conv_mid.{{l}}.",
        f"{_UNIT}.branches.branch{{l+1}}.",
    ),
]
_FULL_PARTS = [("", "conv", "conv", "conv"), (".norm", "norm", "bn", "bn")]
_DEPTHWISE_PARTS = [
    (".depthwise", "dw_conv3x3", "conv_dw", None),
    (".pointwise", "pw_conv1x1", "conv_pw", None),
    (".pointwise.norm", "pw_norm", "bn", None),
]
_OTHERS = [
    ("stage{s}.{b}.ese.fc", f"{_OSA}.ese.fc", f"{_BLOCK}.attn.fc", None),
    ("linear", "classifier", "head.fc", "output"),
]

# The beginning of a pattern that timm also writes with "_".
_TIMM_BEGINNING = re.compile(r"^(stages|stem)\\\.(?=\d|\()")

_FIELD = re.compile(r"\{(\w)([+-]\d+)?\}")
_TENSOR = r"\.(?P<tensor>weight|bias|running_mean|running_var|num_batches_tracked)"


class KeyMatch(NamedTuple):
    """A key that names a tensor of VoVNet, with the names of this tensor in all :data:`LAYOUTS`
    that have it."""

    layout: str
    names: dict[str, str]


class _Template:
    """A module name with numbers in it, which can be read from a key or written into one."""

    def __init__(self, text: str):
        self.text = text
        literals = _FIELD.split(text)[::3]
        pattern = re.escape(literals[0])
        self.offsets: dict[str, int] = {}
        for (field, offset), literal in zip(_FIELD.findall(text), literals[1:], strict=True):
            pattern += f"(?P={field})" if field in self.offsets else rf"(?P<{field}>\d+)"
            pattern += re.escape(literal)
            self.offsets[field] = int(offset or 0)
        self.pattern = re.compile(_TIMM_BEGINNING.sub(r"\1[._]", pattern) + _TENSOR)

    def parse(self, key: str) -> tuple[dict[str, int], str] | None:
        if not (match := self.pattern.fullmatch(key)):
            return None
        numbers = {field: int(match[field]) - off for field, off in self.offsets.items()}
        return numbers, match["tensor"]

    def write(self, numbers: dict[str, int], tensor: str) -> str:
        name = _FIELD.sub(lambda field: str(numbers[field[1]] + int(field[2] or 0)), self.text)
        return f"{name}.{tensor}"


@cache
def _rows(depthwise: bool) -> list[dict[str, _Template]]:
    # timm names the norm of a depthwise pair as it names a full convolution's, so that a key alone
    # does not tell which it is; the first convolution of the stem is full in every variant.
    parts = _DEPTHWISE_PARTS if depthwise else _FULL_PARTS
    rows = [
        tuple(
            None if name is None or last is None else name + last
            for name, last in zip(module, part, strict=True)
        )
        for modules, parts in ((_ALWAYS_FULL, _FULL_PARTS), (_FULL_OR_DEPTHWISE, parts))
        for module in modules
        for part in parts
    ]
    return [
        {layout: _Template(text) for layout, text in zip(LAYOUTS, row, strict=True) if text}
        for row in rows + _OTHERS
    ]


@lru_cache(maxsize=1 << 14)
def _match_key(key: str, depthwise: bool) -> KeyMatch | None:
    """Recognise a key. A state dict is searched several times while it is loaded."""
    for row in _rows(depthwise):
        for layout, template in row.items():
            if (parsed := template.parse(key)) is not None:
                return KeyMatch(layout, {k: t.write(*parsed) for k, t in row.items()})
    return None


def match_keys(keys: Iterable[str]) -> dict[str, KeyMatch]:
    """Recognise the keys of a state dict, without prefix, that name VoVNet's tensors.

    Args:
        keys: all keys of the state dict. Only all of them show whether convolutions are depthwise.

    Returns:
        the match of each key that is recognised. Other keys are left out.
    """
    keys = list(keys)
    names = {part.strip(".") for part in _DEPTHWISE_PARTS[0] if part}
    depthwise = any(not names.isdisjoint(re.split(r"[./]", key)[-2:-1]) for key in keys)
    matches = {key: _match_key(key, depthwise) for key in keys}
    return {key: match for key, match in matches.items() if match is not None}


def rename_keys(keys: Iterable[str], to: str = "native") -> dict[str, str]:
    """Return a dict from old to new names of the keys of a state dict, in the layout ``to``.

    Only keys that change and that ``to`` has a name for are in the result.

    Args:
        keys: all keys of the state dict, without prefix, in any of :data:`LAYOUTS`.
        to: the layout wanted, one of :data:`LAYOUTS`.
    """
    return {
        key: match.names[to]
        for key, match in match_keys(keys).items()
        if match.names.get(to, key) != key
    }
