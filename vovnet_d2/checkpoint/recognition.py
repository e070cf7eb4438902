# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The network in a state dict is recognised by names and shapes."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from vovnet_d2.layouts import match_keys
from vovnet_d2.modeling.specs import STAGE_NAMES, VOVNET_SPECS, ESEPlacement, VoVNetSpec

from ..errors import UserValueError
from ..words import counted

# What a name of any layout begins with, after the prefix.
_BEGINNING = re.compile(
    r"(?:^|(?<=\.))(?=stem\.|stem_\d\.|stage\d\.|stages[._]\d"
    r"|features\.(?:init_block|stage\d)\.)"
)
# Parts of our own blocks that no other layout has a name for.
_NATIVE_ONLY = re.compile(
    r"stage\d\.\d+\.layers\.\d+\."
    r"(?:(?:reduce|conv)(?:\.norm)?|offset)\."
    r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
)
_OTHER_NETWORKS = {
    r"(^|\.)res[2-5]\.\d+\.conv1\.": "a Detectron2 ResNet",
    r"^res[2-5]_\d+_branch": "a Caffe2 (Detectron1) ResNet",
    r"(^|\.)layer[2-4]\.\d+\.conv1\.": "a ResNet or one of its relatives in torchvision's names",
    r"(^|\.)(blocks|layers)\.\d+\.(blocks\.\d+\.)?attn\.(qkv|proj)\.": "a vision transformer",
    r"(^|\.)stages[._]\d\.blocks\.\d+\.conv_dw\.": "a ConvNeXt or one of its relatives",
    r"(^|\.)denseblock\d\.": "a DenseNet",
}


@dataclass(frozen=True)
class Description:
    """The VoVNet in a state dict, as far as names and shapes tell.

    Attributes:
        layout: the layout of its names, one of ``vovnet_d2.layouts.LAYOUTS``.
        prefix: the prefix of all names, such as "backbone.bottom_up.".
        fields: the fields of :class:`VoVNetSpec` that names and shapes show: all but ``stem`` and
            ``residual``. Values by stage have as many entries as the file has stages.
        in_channels: the number of channels of the input.
        num_classes: the number of outputs of the classifier; None without one.
        norm: "BN" (running statistics), "GN" (weight and bias alone) or "" (none).
    """

    layout: str
    prefix: str
    fields: Mapping[str, Any]
    in_channels: int
    num_classes: int | None
    norm: str

    @property
    def variant(self) -> str:
        """Name of the variant that is nearest, a key of ``VOVNET_SPECS``."""

        def distance(name: str) -> tuple[int, bool]:
            differences = self.differences(VOVNET_SPECS[name])
            return len(differences), "none" in differences.get("ese", ())

        return min(VOVNET_SPECS, key=distance)

    def differences(self, spec: VoVNetSpec) -> dict[str, tuple[Any, Any]]:
        """Return the fields in which the file is not ``spec``, with both values, the file's first.

        A file of fewer stages is compared as far as it goes.
        """
        found = {}
        for name, value in self.fields.items():
            other = getattr(spec, name)
            if name.startswith(("stage_", "blocks_")):
                other = other[: len(value)]
            elif name == "ese":
                other = _canonical(other, spec.blocks_per_stage[: self.num_stages])
            if value != other:
                found[name] = (value, other)
        return found

    @property
    def num_stages(self) -> int:
        return len(self.fields["blocks_per_stage"])

    def config_lines(self) -> list[str]:
        """Return the lines of ``MODEL.VOVNET`` that describe the file, apart from stem and
        residual.
        """
        lines = [f'MODEL.VOVNET.CONV_BODY: "{self.variant}"']
        differences = self.differences(VOVNET_SPECS[self.variant])
        return lines + [config_line(name, value) for name, (value, _) in differences.items()]

    def __str__(self) -> str:
        differences = self.differences(VOVNET_SPECS[self.variant])
        changed = ", ".join(f"{name} {value}" for name, (value, _) in differences.items())
        parts = [
            self.variant + (f" with {changed}" if changed else ""),
            f"{self.layout} names" + (f" below {self.prefix!r}" if self.prefix else ""),
            counted(self.in_channels, "input channels"),
            f"{self.num_classes} classes" if self.num_classes else "no classifier",
        ]
        if self.num_stages < len(STAGE_NAMES):
            parts.append(f"no stages beyond {STAGE_NAMES[self.num_stages - 1]}")
        return ", ".join(parts)


def config_line(field: str, value: Any) -> str:
    """Return the line of a config that sets a field of :class:`VoVNetSpec`."""
    text = f'"{value}"' if isinstance(value, str) else value
    return f"MODEL.VOVNET.{field.upper()}: {list(text) if isinstance(text, tuple) else text}"


def find_prefix(names: Iterable[str], preferred: str | None = None) -> str:
    """Return the prefix of VoVNet's names in a state dict, such as "module.backbone.bottom_up.".

    Args:
        preferred: if there are several VoVNets, the one with this prefix, or with a prefix that
            ends with it, is taken.

    Raises:
        ValueError: there is no VoVNet, or there are several. The message says what was found.
    """
    names = list(names)
    split: dict[str, list[str]] = {}
    for name in names:
        for match in _BEGINNING.finditer(name):
            split.setdefault(name[: match.start()], []).append(name[match.start() :])
    counts = Counter(
        {
            prefix: number
            for prefix, rest in split.items()
            if (number := sum(not name.startswith(("stem.", "stem_")) for name in match_keys(rest)))
        }
    )
    if not counts:
        raise UserValueError(_no_vovnet(names))
    if preferred is not None and preferred in counts:
        return preferred
    if preferred and len(inside := [p for p in counts if p.endswith(preferred)]) == 1:
        return inside[0]
    (best, most), *others = counts.most_common()
    if twins := [prefix for prefix, number in others if number == most]:
        places = ", ".join(map(repr, [best, *twins]))
        raise UserValueError(
            f"There are {len(twins) + 1} VoVNets in it, below {places}: take one out by "
            "`tools/convert_weights.py --prefix`."
        )
    return best


def _no_vovnet(names: list[str]) -> str:
    guesses = [
        what
        for pattern, what in _OTHER_NETWORKS.items()
        if any(re.search(pattern, name) for name in names)
    ]
    looks = f"It looks like {guesses[0]}. " if guesses else ""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"No VoVNet is in it. {looks}Its tensors: {some}."


def native_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Translate the names of VoVNet's tensors in a file to our own.

    Args:
        names: all names of a state dict.
        prefix: the prefix of VoVNet's names; see :func:`find_prefix`.

    Returns:
        for each name that is VoVNet's, our own name for it, without prefix.

    Raises:
        ValueError: two names mean the same tensor, or the stem or a stage has a tensor that no
            VoVNet has.
    """
    below = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    found = {name: match.names["native"] for name, match in match_keys(below).items()}
    found |= {name: name for name in below if _NATIVE_ONLY.fullmatch(name)}
    if doubled := [name for name, count in Counter(found.values()).items() if count > 1]:
        raise UserValueError(
            f"The file has {counted(len(doubled), 'tensors')} in two layouts, such as "
            f"{doubled[0]}: keep one layout."
        )
    strange = [name for name in below if name not in found and _BEGINNING.match(name)]
    if strange:
        raise UserValueError(
            f"It is like a VoVNet below {prefix!r}, but {len(strange)} of its tensors are nothing "
            f"that VoVNetSpec describes, such as {prefix}{strange[0]}."
        )
    return {prefix + name: native for name, native in found.items()}


def describe_state_dict(
    state_dict: Mapping[str, torch.Tensor], prefix: str | None = None
) -> Description:
    """Recognise the VoVNet in a state dict of any layout.

    Args:
        prefix: the prefix of VoVNet's names; None finds it.

    Returns:
        a description of the VoVNet.

    Raises:
        ValueError: there is no VoVNet, or it is not complete enough to tell which.
    """
    if prefix is None:
        prefix = find_prefix(state_dict)
    names = native_names(state_dict, prefix)
    below = [name[len(prefix) :] for name in names]
    layouts = Counter(match.layout for match in match_keys(below).values())
    shapes = {native: tuple(state_dict[name].shape) for name, native in names.items()}
    first = _shape(shapes, "stem.conv1.weight", 4)
    classifier = shapes.get("linear.weight")
    return Description(
        layout=layouts.most_common(1)[0][0],
        prefix=prefix,
        fields=_fields(shapes),
        in_channels=first[1],
        num_classes=classifier[0] if classifier else None,
        norm=norm_kind(shapes),
    )


def _fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    numbers = [_count(shapes, f"stage{stage}." + "{}.") for stage in range(2, 6)]
    blocks = tuple(takewhile(bool, numbers))
    if not blocks:
        raise UserValueError("The VoVNet in it has no stage2: the file is damaged or was cut.")
    layers = _count(shapes, "stage2.0.layers.{}.")
    firsts = [f"stage{stage}.0" for stage in range(2, 2 + len(blocks))]
    return {
        "stage_mid_channels": tuple(_width(shapes, f"{name}.layers.0") for name in firsts),
        "stage_out_channels": tuple(_width(shapes, f"{name}.aggregation") for name in firsts),
        "blocks_per_stage": blocks,
        "layers_per_block": layers,
        "stem_channels": tuple(_width(shapes, f"stem.conv{i}") for i in (1, 2, 3)),
        "ese": _ese_placement(shapes, blocks),
        "depthwise": any(".depthwise." in name for name in shapes),
        "bottleneck": any(".reduce." in name for name in shapes),
    }


def _count(shapes: Mapping[str, Any], numbered: str) -> int:
    """Return the length of the sequence from 0 without a gap in ``numbered``."""
    number = 0
    while any(name.startswith(numbered.format(number)) for name in shapes):
        number += 1
    return number


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, dims: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserValueError(f"The VoVNet in it lacks {name}: the file is damaged or was cut.")
    if len(shapes[name]) != dims or 0 in shapes[name]:
        raise UserValueError(f"The VoVNet in it is damaged: {name} has shape {shapes[name]}.")
    return shapes[name]


def _width(shapes: Mapping[str, tuple[int, ...]], layer: str) -> int:
    """Return the number of output channels of a layer of any kind."""
    convolutions = (f"{layer}.{last}weight" for last in ("", "pointwise.", "conv."))
    name = next((name for name in convolutions if name in shapes), f"{layer}.weight")
    return _shape(shapes, name, 4)[0]


def _ese_placement(shapes: Mapping[str, Any], blocks: tuple[int, ...]) -> ESEPlacement:
    places = {
        (stage, block)
        for stage, number in enumerate(blocks, start=2)
        for block in range(number)
        if f"stage{stage}.{block}.ese.fc.weight" in shapes
    }
    lasts = {(stage, number - 1) for stage, number in enumerate(blocks, start=2)}
    if not places:
        return "none"
    return _canonical("last" if places == lasts else "all", blocks)


def _canonical(ese: ESEPlacement, blocks: tuple[int, ...]) -> ESEPlacement:
    """Return "all" for "last" if each stage has one block, as both mean the same then."""
    return "all" if ese == "last" and all(number == 1 for number in blocks) else ese


def norm_kind(names: Iterable[str]) -> str:
    """Return the kind of norm that the names of a VoVNet's tensors in our own layout tell.

    It is "BN" (any norm with running statistics), "GN" (any norm with weight and bias alone) or ""
    (none).
    """
    names = set(names)
    if "stem.conv1.norm.running_mean" in names:
        return "BN"
    return "GN" if "stem.conv1.norm.weight" in names else ""
