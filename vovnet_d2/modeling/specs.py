# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The variants of VoVNet as data.

VoVNet (v1): :paper:`VoVNet` arXiv 1904.09730, Table 1. VoVNetV2 (eSE): :paper:`CenterMask`
arXiv 1911.06667, section 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from ..errors import UserValueError
from ..words import suggest

STAGE_NAMES = ("stage2", "stage3", "stage4", "stage5")

Stem = Literal["strided", "pooled"]
ESEPlacement = Literal["all", "last", "none"]


@dataclass(frozen=True)
class VoVNetSpec:
    """One architecture of the VoVNet family. Derive others with :func:`dataclasses.replace`.

    Attributes:
        stage_mid_channels: width of the 3x3 convolutions inside the OSA blocks of stages 2 to 5.
        stage_out_channels: width of the outputs of stages 2 to 5.
        blocks_per_stage: number of OSA blocks in stages 2 to 5.
        layers_per_block: number of 3x3 convolutions in an OSA block.
        stem_channels: widths of the stem's three convolutions.
        stem: ``"strided"`` for convolutions of stride 2, 1, 2, as in all published PyTorch weights;
            ``"pooled"`` for strides 2, 1, 1 and a max-pooling at the start of stage2, as in Table 1
            of the paper.
        residual: whether every block except the first of a stage adds its input to its result.
        ese: the blocks with effective squeeze-excitation: ``"all"``, the ``"last"`` of each stage,
            or ``"none"``.
        depthwise: whether 3x3 convolutions, except the first one, are depthwise-separable.
        bottleneck: whether a 1x1 convolution to half of ``stage_mid_channels`` precedes each 3x3
            convolution (Table 3 of the paper).

    Raises:
        ValueError: the value of a field is outside its choices or range.
    """

    stage_mid_channels: tuple[int, int, int, int]
    stage_out_channels: tuple[int, int, int, int]
    blocks_per_stage: tuple[int, int, int, int]
    layers_per_block: int
    stem_channels: tuple[int, int, int] = (64, 64, 128)
    stem: Stem = "strided"
    residual: bool = True
    ese: ESEPlacement = "none"
    depthwise: bool = False
    bottleneck: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if hint is bool:
                if not isinstance(value, bool):
                    raise UserValueError(f"VoVNetSpec.{name} is {value!r}: expected True or False.")
            elif hint in (Stem, ESEPlacement):
                if value not in get_args(hint):
                    raise UserValueError(
                        f"VoVNetSpec.{name} is {value!r}: choose from {', '.join(get_args(hint))}."
                    )
            elif hint is int:
                if not _is_positive_int(value):
                    raise UserValueError(
                        f"VoVNetSpec.{name} is {value!r}: expected a positive integer."
                    )
            else:
                count = len(get_args(hint))
                if (
                    not isinstance(value, Sequence)
                    or len(value) != count
                    or not all(map(_is_positive_int, value))
                ):
                    raise UserValueError(
                        f"VoVNetSpec.{name} is {value!r}: expected {count} positive integers."
                    )
                # Lists come from YAML; a tuple keeps the spec hashable.
                object.__setattr__(self, name, tuple(value))
        if self.depthwise and self.bottleneck:
            raise UserValueError(
                "VoVNetSpec: depthwise and bottleneck exclude each other; set one."
            )
        if self.bottleneck and any(mid % 2 for mid in self.stage_mid_channels):
            raise UserValueError(
                f"VoVNetSpec.stage_mid_channels is {self.stage_mid_channels}: a bottleneck halves "
                "these widths, so they must be even."
            )


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_SLIM_V1 = VoVNetSpec(
    stage_mid_channels=(64, 80, 96, 112),
    stage_out_channels=(128, 256, 384, 512),
    blocks_per_stage=(1, 1, 1, 1),
    layers_per_block=5,
)
_V39 = VoVNetSpec(
    stage_mid_channels=(128, 160, 192, 224),
    stage_out_channels=(256, 512, 768, 1024),
    blocks_per_stage=(1, 1, 2, 2),
    layers_per_block=5,
)
_V57 = replace(_V39, blocks_per_stage=(1, 1, 4, 3))
_V99 = replace(_V39, blocks_per_stage=(1, 3, 9, 3))
_V19_ESE = replace(_V39, blocks_per_stage=(1, 1, 1, 1), layers_per_block=3, ese="all")
_V19_SLIM_ESE = replace(
    _SLIM_V1, stage_out_channels=(112, 256, 384, 512), layers_per_block=3, ese="all"
)
_DEPTHWISE: dict[str, Any] = {"depthwise": True, "stem_channels": (64, 64, 64)}

VOVNET_SPECS: dict[str, VoVNetSpec] = {
    "V-27-slim": _SLIM_V1,
    "V-39": _V39,
    "V-57": _V57,
    "V-75": replace(_V39, blocks_per_stage=(1, 2, 6, 3)),
    "V-93": replace(_V39, blocks_per_stage=(1, 3, 8, 3)),
    "V-99": _V99,
    "V-19-slim-dw-eSE": replace(_V19_SLIM_ESE, **_DEPTHWISE),
    "V-19-dw-eSE": replace(_V19_ESE, **_DEPTHWISE),
    "V-19-slim-eSE": _V19_SLIM_ESE,
    "V-19-eSE": _V19_ESE,
    "V-39-eSE": replace(_V39, ese="all"),
    "V-57-eSE": replace(_V57, ese="all"),
    "V-99-eSE": replace(_V99, ese="all"),
}
"""The specs of the variants by name. No other place has their widths (Table 1 of the papers)."""


def get_spec(spec: str | VoVNetSpec, **overrides: Any) -> VoVNetSpec:
    """Return the spec of a variant, with other values for some fields.

    Args:
        spec: the name of a variant, a key of :data:`VOVNET_SPECS`; or a spec.
        overrides: fields of :class:`VoVNetSpec` with their values.

    Raises:
        ValueError: there is no such variant or field, or a value is out of range.
    """
    if isinstance(spec, str):
        if spec not in VOVNET_SPECS:
            raise UserValueError(
                f"Unknown VoVNet variant {spec!r}.{suggest(spec, VOVNET_SPECS, cutoff=0.5)} "
                f"Choose from: {', '.join(VOVNET_SPECS)}."
            )
        spec = VOVNET_SPECS[spec]
    known = {field.name for field in fields(VoVNetSpec)}
    if unknown := sorted(overrides.keys() - known):
        raise UserValueError(
            f"VoVNetSpec has no field {', '.join(unknown)}. Its fields: {', '.join(sorted(known))}."
        )
    return replace(spec, **overrides)
