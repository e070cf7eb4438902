# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The cost of a network, stage by stage, found by one forward pass on tensors without data."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from .detector_heads import Head, countable_heads
from .memory_access import LayerCost, layer_cost
from .observe import PartTracker, observe
from .peak_memory import PeakMemory

CONVENTIONS = {
    "parameters": "weights and biases, including scale and shift of frozen norms, without running "
    "statistics",
    "multiply_adds": "multiply-adds of convolutions, fully-connected layers and attention for one "
    "image; norms, activations, pooling and additions count nothing",
    "activations": "output elements of the same layers",
    "memory_access": "elements of the inputs, outputs and weights of the same layers (VoVNet "
    "paper, equation 1)",
    "lower_bound": "the least memory access of layers with the same work, weights and sizes of "
    "feature maps",
    "intensity": "multiply_adds / memory_access",
    "peak_memory": "the most bytes of tensors that are alive at one time in an eager float32 "
    "forward pass without autograd; without parameters, workspaces of kernels and the rounding of "
    "the allocator",
}
"""Rules by which the quantities are counted."""


@dataclass(frozen=True)
class PartComplexity:
    """The cost of one part of a network, for one image; :data:`CONVENTIONS` has the rules.

    Attributes:
        output_shape: (C, H, W) of its output, or None if this is not one feature map.
        peak_memory: bytes alive while it ran, including those of earlier parts.
    """

    part: str
    output_shape: tuple[int, int, int] | None
    parameters: int
    multiply_adds: int
    activations: int
    memory_access: int
    lower_bound: float
    peak_memory: int

    @property
    def intensity(self) -> float:
        return self.multiply_adds / self.memory_access if self.memory_access else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return all quantities by their names in :data:`CONVENTIONS`."""
        return asdict(self) | {
            "output_shape": "x".join(map(str, self.output_shape or ())) or None,
            "lower_bound": round(self.lower_bound),
            "intensity": round(self.intensity, 3),
        }


@dataclass(frozen=True)
class Complexity:
    """Holds the costs of a network, part by part.

    Attributes:
        image_size: (height, width) of the input after padding.
        parts: the costs of the parts, in the order in which they run.
        total: the cost of all parts.
        notes: sentences about parts that are left out and about the number of regions of heads.
    """

    image_size: tuple[int, int]
    parts: list[PartComplexity]
    total: PartComplexity
    notes: list[str]


def analyze(model: nn.Module, image_size: tuple[int, int], *, in_channels: int = 3) -> Complexity:
    """Count parameters, work, memory access and peak memory.

    A ``model`` that was built under ``torch.device("meta")`` needs no memory.

    Args:
        model: a backbone, a classifier or a detector; it is put in evaluation mode. The parts are
            the children of the network, or of the bottom-up network of an FPN, and the heads of a
            detector that do a fixed amount of work.
        image_size: (height, width) in pixels.
        in_channels: number of channels of the image.
    """
    model.eval()
    backbone: nn.Module = getattr(model, "backbone", model)
    heads = countable_heads(model) if backbone is not model else []
    parts = _backbone_parts(backbone) | {head.name: head.modules for head in heads}

    divisor = max(getattr(backbone, "size_divisibility", 0), 1)
    height, width = (math.ceil(side / divisor) * divisor for side in image_size)
    device = next(chain(model.parameters(), model.buffers())).device
    run = _Run(torch.empty(1, in_channels, height, width, device=device), parts)
    run.forward(backbone, heads)

    rows = [run.part(name, _parameters(modules)) for name, modules in parts.items()]
    in_parts = _parameters(chain.from_iterable(parts.values()))
    everything = _parameters([backbone]) | in_parts
    outside = {key: p for key, p in everything.items() if key not in in_parts}
    rows.append(run.part(_OUTSIDE, outside))
    return Complexity(
        image_size=(height, width),
        parts=[row for row in rows if row.parameters or row.multiply_adds],
        total=run.total(everything),
        notes=_notes(model, heads, everything),
    )


# The name of the operators between the modules that are parts.
_OUTSIDE = "other"


def _backbone_parts(backbone: nn.Module) -> dict[str, list[nn.Module]]:
    body: nn.Module = getattr(backbone, "bottom_up", backbone)
    parts: dict[str, list[nn.Module]] = {}
    for name, child in body.named_children():
        if isinstance(child, nn.ModuleList):  # a list is never called itself
            parts |= {f"{name}.{i}": [module] for i, module in enumerate(child)}
        else:
            parts[name] = [child]
    if body is not backbone:
        parts["fpn"] = [child for child in backbone.children() if child is not body]
    return parts


def _parameters(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Return all parameters by id, with the scale and shift of frozen norms."""
    found: dict[int, Tensor] = {}
    for module in chain.from_iterable(top.modules() for top in modules):
        tensors = list(module.parameters(recurse=False))
        if isinstance(module, FrozenBatchNorm2d):
            tensors += [module.weight, module.bias]
        found |= {id(tensor): tensor for tensor in tensors}
    return found


class _Run:
    """Observes what each part of a network does in one forward pass."""

    def __init__(self, image: Tensor, parts: Mapping[str, Sequence[nn.Module]]):
        self.image = image
        self.parts = parts
        self.tracker = PartTracker()
        self.costs: dict[str, list[LayerCost]] = defaultdict(list)
        self.memory = PeakMemory(self.tracker, image)
        self.shapes: dict[str, tuple[int, int, int]] = {}

    def forward(self, backbone: nn.Module, heads: Sequence[Head]) -> None:
        watch = self.tracker.watch(self.parts, self._note_output)
        with torch.no_grad(), watch, observe(self, self.memory):
            features = backbone(self.image)
            for head in heads:
                head.run(features)

    def observe(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        if (cost := layer_cost(func, args, kwargs, out)) is not None:
            self.costs[self.tracker.current or _OUTSIDE].append(cost)

    def _note_output(self, part: str, output: Any) -> None:
        one_map = isinstance(output, Tensor) and output.dim() == 4
        if one_map and len(self.parts[part]) == 1:
            _, channels, height, width = output.shape
            self.shapes[part] = (channels, height, width)

    def part(self, name: str, parameters: Mapping[int, Tensor]) -> PartComplexity:
        peak = self.memory.peak["" if name == _OUTSIDE else name]
        return _sum(name, self.costs[name], parameters, self.shapes.get(name), peak)

    def total(self, parameters: Mapping[int, Tensor]) -> PartComplexity:
        costs = list(chain.from_iterable(self.costs.values()))
        return _sum("total", costs, parameters, None, max(self.memory.peak.values()))


def _sum(
    part: str,
    costs: Sequence[LayerCost],
    parameters: Mapping[int, Tensor],
    output_shape: tuple[int, int, int] | None,
    peak_memory: int,
) -> PartComplexity:
    return PartComplexity(
        part=part,
        output_shape=output_shape,
        parameters=sum(p.numel() for p in parameters.values()),
        multiply_adds=sum(c.multiply_adds for c in costs),
        activations=sum(c.written for c in costs),
        memory_access=sum(c.memory_access for c in costs),
        lower_bound=sum(c.lower_bound for c in costs),
        peak_memory=peak_memory,
    )


def _notes(model: nn.Module, heads: Sequence[Head], counted: Mapping[int, Tensor]) -> list[str]:
    notes = [f"The {head.name} is counted for {head.regions}." for head in heads if head.regions]
    left_out = {
        name: sum(p.numel() for key, p in _parameters([child]).items() if key not in counted)
        for name, child in model.named_children()
    }
    for name, number in left_out.items():
        if number:
            notes.append(f"Not counted: {number:,} parameters of {name}, which cannot run alone.")
    if heads:
        notes.append("Not counted: the choice of boxes, RoI pooling and post-processing.")
    return notes
