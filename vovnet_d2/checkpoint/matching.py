# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Assign the tensors of a file to the tensors of a model, before anything is loaded."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import nn

from vovnet_d2.modeling.specs import STAGE_NAMES
from vovnet_d2.modeling.vovnet import VoVNet

from ..words import counted
from .metadata import Metadata
from .recognition import Description, config_line, native_names, norm_kind


def find_vovnets(model: nn.Module) -> dict[str, VoVNet]:
    """Return the VoVNets in a model by their prefixes, such as "backbone.bottom_up."."""
    return {
        name + "." if name else "": module
        for name, module in model.named_modules()
        if isinstance(module, VoVNet)
    }


@dataclass
class Match:
    """The tensors of a file that fit a model, and those that do not. All names but ``unexpected``
    are the model's.

    Attributes:
        backbone: the prefix of the VoVNet that is being loaded.
        tensors: the tensors that fit, by name.
        missing: names of the model that the file lacks.
        wrong_shape: the shapes in the file and in the model, by name.
        unexpected: names of the file that the model lacks; in the backbone, our names for them.
    """

    backbone: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def part(self, name: str) -> str:
        """Return the part of the model that a tensor belongs to: a stage, "linear", or "other"."""
        if name.startswith(self.backbone):
            first = name[len(self.backbone) :].partition(".")[0]
            if first in ("stem", *STAGE_NAMES, "linear"):
                return first
        return "other"

    def in_backbone(self, names: Iterable[str]) -> list[str]:
        """Return the ``names`` that belong to the stem and the stages."""
        return [name for name in names if self.part(name) not in ("linear", "other")]

    def table(self) -> str:
        """Return a table of loaded, missing, unexpected and wrongly shaped tensors, counted by
        stage.
        """
        columns = {
            "loaded": self.tensors,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": self.wrong_shape,
        }
        counts = {name: Counter(map(self.part, tensors)) for name, tensors in columns.items()}
        parts = [
            part
            for part in ("stem", *STAGE_NAMES, "linear", "other")
            if any(part in count for count in counts.values())
        ]
        rows = [[part, *(count[part] for count in counts.values())] for part in parts]
        return tabulate(rows, headers=["tensors", *columns], tablefmt="github")


def match_model(
    model: nn.Module, backbone: str, state_dict: Mapping[str, torch.Tensor], found: Description
) -> Match:
    """Match the tensors of a file with those of a model, whose VoVNet has the prefix ``backbone``.
    Raise ValueError if names in the file contradict each other; see :func:`native_names`."""
    renamed = native_names(state_dict, found.prefix)
    # A prefix of the file that ends with the model's, "module.backbone.bottom_up." for instance,
    # belongs to a whole model, the rest of which is loaded as well.
    whole_model = found.prefix.endswith(backbone)
    outer = found.prefix.removesuffix(backbone) if whole_model else ""
    match = Match(backbone)
    target = model.state_dict(keep_vars=True)
    for name, tensor in state_dict.items():
        if name in renamed:
            key = backbone + renamed[name]
        elif whole_model and name.startswith(outer) and name[len(outer) :] in target:
            key = name[len(outer) :]
        else:
            match.unexpected.append(name)
            continue
        if key not in target:
            match.unexpected.append(key)
        elif target[key].shape != tensor.shape:
            match.wrong_shape[key] = (tuple(tensor.shape), tuple(target[key].shape))
        else:
            match.tensors[key] = tensor
    # Old files carry what is no parameter now, and frozen norms do not count batches.
    match.unexpected = [
        name
        for name in match.unexpected
        if not name.endswith((".num_batches_tracked", "pixel_mean", "pixel_std"))
        and "anchor_generator.cell_anchors" not in name
    ]
    # One tensor may go by several names, and the published files count no batches.
    loaded = {id(target[key]) for key in match.tensors}
    match.missing = [
        key
        for key, tensor in target.items()
        if key not in match.tensors
        and key not in match.wrong_shape
        and id(tensor) not in loaded
        and not key.endswith(".num_batches_tracked")
    ]
    return match


def misfits(net: VoVNet, match: Match, found: Description) -> list[str]:
    """List the architecture mismatches between a file and the VoVNet of a model, as sentences with
    the config lines that fit the file. The list is empty if there is none."""
    sentences = []
    if differences := found.differences(net.spec):
        values = "; ".join(
            f"{name} is {file} in the file and {model} in the model"
            for name, (file, model) in differences.items()
        )
        sentences.append(
            f"It holds {found}, and {values}. Config lines that fit it: "
            f"{', '.join(found.config_lines())}."
        )
    if (channels := net.stem.conv1.in_channels) != found.in_channels:
        sentences.append(
            f"It takes {found.in_channels} input channels and the model {channels}: "
            f"MODEL.PIXEL_MEAN and MODEL.PIXEL_STD with {found.in_channels} values fit it."
        )
    if norm_kind(net.state_dict()) != found.norm:
        fitting = {"BN": '"FrozenBN" or "BN"', "GN": '"GN"', "": '""'}[found.norm]
        sentences.append(
            f"Its norms are not the model's. The config line that fits it: MODEL.VOVNET.NORM: "
            f"{fitting}."
        )
    if not sentences:
        sentences += _surplus(net, match) + _incomplete(match)
    return sentences


def contradictions(net: VoVNet, known: Metadata) -> list[str]:
    """List the differences that leave no trace in the tensors of a file: stem and residual."""
    sentences = []
    for name, value in (("stem", known.stem), ("residual", known.residual)):
        # Single blocks have no residual in any case.
        matters = name != "residual" or any(number > 1 for number in net.spec.blocks_per_stage)
        if value is not None and matters and value != getattr(net.spec, name):
            sentences.append(
                f"Its {name} is {value} ({known.source or 'it says so'}), and "
                f"{getattr(net.spec, name)} in the model. The config line that fits it: "
                f"{config_line(name, value)}."
            )
    return sentences


def _surplus(net: VoVNet, match: Match) -> list[str]:
    """List the tensors that a file of the right architecture has and the model lacks, in the stages
    that the model builds.

    Without them, the network would not compute what it was trained to.
    """
    built = ("stem", *net.stage_names)
    surplus = [name for name in match.unexpected if match.part(name) in built]
    if not surplus:
        return []
    sentence = (
        f"It has {counted(len(surplus), 'tensors')} of the backbone that the model has no "
        f"place for, such as {surplus[0]}."
    )
    if any(".offset." in name for name in surplus):
        everything = [*match.tensors, *match.wrong_shape, *match.unexpected]
        deformable = {match.part(name) for name in everything if ".offset." in name}
        stages = [stage in deformable for stage in STAGE_NAMES]
        sentence += (
            f" Its convolutions are deformable. The config line that fits it: "
            f"MODEL.VOVNET.STAGE_WITH_DCN: {stages}."
        )
    return [sentence]


def _incomplete(match: Match) -> list[str]:
    """List the tensors of the backbone that a file of the right architecture lacks."""
    sentences = []
    # Plain weights are a good start for deformable convolutions, whose offsets begin at zero.
    missing = [name for name in match.in_backbone(match.missing) if ".offset." not in name]
    if missing:
        sentences.append(
            f"It lacks {counted(len(missing), 'tensors')} of the backbone, such as {missing[0]}."
        )
    for name in match.in_backbone(match.wrong_shape)[:1]:
        file, model = match.wrong_shape[name]
        sentences.append(f"Its {name} has shape {file}, where the model has {model}.")
    for name in match.in_backbone(match.tensors):
        tensor = match.tensors[name]
        if not (tensor.is_floating_point() or name.endswith(".num_batches_tracked")):
            sentences.append(f"Its {name} is of {tensor.dtype}, not of floating point.")
            break
        if not tensor.float().isfinite().all():
            sentences.append(f"Its {name} has values that are not finite: the training diverged.")
            break
    return sentences
