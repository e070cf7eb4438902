# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Keep facts about weights that their tensors cannot tell: the input that the network expects, and
the parts of the architecture that have no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from detectron2.config import CfgNode
from torch import nn

from vovnet_d2.modeling.specs import Stem, VoVNetSpec

from ..errors import UserValueError


@dataclass(frozen=True)
class InputConvention:
    """The input that a network expects, in Detectron2's terms.

    Attributes:
        format: the order of the channels, "BGR" or "RGB"; empty if it is not known, or if there are
            not three channels.
        pixel_mean: the mean of each channel, in the order of ``format``, which is subtracted from
            values from 0 to 255.
        pixel_std: the standard deviation by which the difference is divided.

    Raises:
        ValueError: the format is unknown, or the numbers of means and deviations differ.
    """

    format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.format not in ("", "BGR", "RGB"):
            raise UserValueError(f"Input format {self.format!r}: choose BGR or RGB.")
        for name in ("pixel_mean", "pixel_std"):
            # Lists come from files.
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        if len(self.pixel_mean) != len(self.pixel_std) or not all(s > 0 for s in self.pixel_std):
            raise UserValueError(
                f"Input with mean {self.pixel_mean} and standard deviation {self.pixel_std}: one "
                "of each is needed for a channel, and no deviation is 0."
            )

    @classmethod
    def of_config(cls, cfg: CfgNode) -> InputConvention:
        """Return the input that a config gives to its model."""
        channels = cfg.INPUT.FORMAT if cfg.INPUT.FORMAT in ("BGR", "RGB") else ""
        return cls(channels, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))

    @classmethod
    def of_model(cls, model: nn.Module) -> InputConvention | None:
        """Return the input that a detector of Detectron2 gives to its backbone; None for other
        models.
        """
        mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
        if not isinstance(mean, torch.Tensor) or not isinstance(std, torch.Tensor):
            return None
        channels = getattr(model, "input_format", None)
        return cls(
            channels if channels in ("BGR", "RGB") else "",
            tuple(round(v, 4) for v in mean.flatten().tolist()),
            tuple(round(v, 4) for v in std.flatten().tolist()),
        )

    def config_lines(self) -> list[str]:
        """Return the three lines of a config that give a model this input."""
        numbers = [
            f"[{', '.join(f'{round(v, 4):g}' for v in values)}]"
            for values in (self.pixel_mean, self.pixel_std)
        ]
        return [
            f'INPUT.FORMAT: "{self.format}"',
            f"MODEL.PIXEL_MEAN: {numbers[0]}",
            f"MODEL.PIXEL_STD: {numbers[1]}",
        ]

    def agrees_with(self, other: InputConvention) -> bool:
        """Return True if both give a network the same input, up to a hundredth of the deviation."""
        if self.format and other.format and self.format != other.format:
            return False
        if len(self.pixel_mean) != len(other.pixel_mean):
            return False
        channels = zip(
            self.pixel_mean, other.pixel_mean, self.pixel_std, other.pixel_std, strict=True
        )
        # Deviations of 1 stand for weights that have absorbed the true ones, of about 57.
        return all(
            abs(m1 - m2) <= 0.01 * max(s1, 57.0) and abs(s1 - s2) <= 0.01 * s1
            for m1, m2, s1, s2 in channels
        )


BGR_255 = InputConvention("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
"""Detectron2's default, which the published Detectron2 weights were trained with."""

BGR_IMAGENET = InputConvention("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))
"""The customary normalisation of ImageNet in BGR, which DD3D's weights were trained with."""

RGB_IMAGENET = InputConvention("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""The customary normalisation of ImageNet, which most of timm's weights were trained with."""


def check_input_convention(
    cfg: CfgNode, convention: InputConvention | tuple[InputConvention, ...] | None
) -> str | None:
    """Compare the input that a config gives to the network with the input that the weights expect.

    Args:
        convention: the input that the weights expect, such as
            :attr:`VoVNetCheckpointer.input_convention` after loading. It is None if that is not
            known, and a tuple if one of several is meant.

    Returns:
        a warning that names the three config lines to change; None if nothing is wrong.
    """
    if convention is None:
        return None
    candidates = convention if isinstance(convention, tuple) else (convention,)
    config = InputConvention.of_config(cfg)
    if any(candidate.agrees_with(config) for candidate in candidates):
        return None
    weights = " or ".join(", ".join(candidate.config_lines()) for candidate in candidates)
    return (
        "The weights expect another input than the config gives. Weights: "
        f"{weights}; config: {', '.join(config.config_lines())}. "
        "Set the weights' three lines in the config, or turn the weights into the config's "
        "convention by tools/convert_weights.py."
    )


@dataclass(frozen=True)
class Metadata:
    """Facts about weights apart from their tensors; None or empty means "not known".

    Attributes:
        stem: see :class:`VoVNetSpec`.
        residual: see :class:`VoVNetSpec`.
        input: the input that the network expects.
        source: the origin of the weights, in words.
        candidates: possible inputs, if ``input`` is not known. Not written to files.
    """

    stem: Stem | None = None
    residual: bool | None = None
    input: InputConvention | None = None
    source: str = field(default="", compare=False)
    candidates: tuple[InputConvention, ...] = ()

    @classmethod
    def of_spec(
        cls, spec: VoVNetSpec, convention: InputConvention | None, source: str = ""
    ) -> Metadata:
        return cls(spec.stem, spec.residual, convention, source)

    @classmethod
    def from_dict(cls, data: Any) -> Metadata:
        """Read the result of :meth:`to_dict`. Raise ValueError if ``data`` is something else."""
        try:
            convention = data.get("input")
            stem, residual = data.get("stem"), data.get("residual")
            if stem not in (None, *get_args(Stem)) or not isinstance(residual, bool | None):
                raise TypeError(f"stem {stem!r}, residual {residual!r}")
            return cls(
                stem,
                residual,
                InputConvention(**convention) if convention is not None else None,
                str(data.get("source", "")),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise UserValueError(
                f"its entry 'vovnet_d2' is not what it should be ({error})."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that can be written to a file."""
        convention = self.input and {
            "format": self.input.format,
            "pixel_mean": list(self.input.pixel_mean),
            "pixel_std": list(self.input.pixel_std),
        }
        return {
            "stem": self.stem,
            "residual": self.residual,
            "input": convention,
            "source": self.source,
        }
