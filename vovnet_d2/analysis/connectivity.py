# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""How strongly each layer of a block uses the features of each layer before it (VoVNet paper,
section 3.1 and Figure 2, after Figure 5 of DenseNet, arXiv 1608.06993).

For a layer and a source whose features it reads: the mean absolute weight over the slice of the
layer's kernel that reads the source, divided so that the largest in the block is 1.

What reads and what is read, by kind of block:

- One-shot aggregation: each 3x3 layer reads the layer before it, the aggregation reads the block's
  input and all layers. What adds no weights adds nothing here: the residual connection, and eSE,
  which gates the result and reads no source.
- Depthwise variants: nothing stands between the depthwise and the pointwise convolution, so that
  the kernel is their product. The reduction that may precede the chain reads the input and is read
  by the first layer.
- Bottleneck variants and DenseNets with bottlenecks: the 1x1 convolution is what reads the sources.
- Dense blocks: each layer reads the input and all layers before it; so does the transition after
  the block, or, after the last block, the classifier.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..checkpoint import convert_state_dict
from ..modeling.specs import STAGE_NAMES

__all__ = ["Connectivity", "measure_connectivity", "plot_connectivity"]

_INPUT = "input"


@dataclass(frozen=True)
class Connectivity:
    """One block.

    Attributes:
        sources: whose features are read: the block's input, then its layers.
        readers: its layers, and what follows them: an aggregation, a transition or a classifier.
        strength: (sources, readers), from 0 to 1; NaN where a reader does not read a source.
    """

    block: str
    sources: list[str]
    readers: list[str]
    strength: NDArray[np.float64]

    def rows(self) -> list[dict[str, Any]]:
        """One line per connection, for tables."""
        return [
            {"block": self.block, "reader": reader, "source": source, "strength": round(value, 6)}
            for reader, column in zip(self.readers, self.strength.T.tolist(), strict=True)
            for source, value in zip(self.sources, column, strict=True)
            if not math.isnan(value)
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        matrix = [[None if math.isnan(v) else v for v in row] for row in self.strength.tolist()]
        return {
            "block": self.block,
            "sources": self.sources,
            "readers": self.readers,
            "strength": matrix,
        }

    def summary(self) -> dict[str, Any]:
        """Mean strength of the layers' connections to the layer right before them, of those to
        all others, and of the connections of the last reader."""
        layers = self.strength[:, :-1]
        # Reader i follows source i: the first layer (or reduction) reads the input.
        neighbours = np.eye(*layers.shape) == 1
        others = layers[~neighbours & ~np.isnan(layers)]
        return {
            "block": self.block,
            "previous layer": float(layers[neighbours].mean()),
            "earlier layers": float(others.mean()) if others.size else None,
            "last reader": float(np.nanmean(self.strength[:, -1])),
        }


def measure_connectivity(state_dict: Mapping[str, torch.Tensor]) -> list[Connectivity]:
    """
    Args:
        state_dict: of a VoVNet in any layout and below any prefix, of one of our CIFAR
            classifiers, or of a DenseNet of torchvision or timm.

    Returns:
        its blocks in order.

    Raises:
        ValueError: it is none of these, or widths in it contradict each other.
    """
    for find in (_cifar_blocks, _densenet_blocks):
        if blocks := find(state_dict):
            return blocks
    return _vovnet_blocks(convert_state_dict(state_dict, "native"))


# A reader: its name, its kernel (outputs, inputs, ...), and the sources that it reads, in the order
# in which its input has them.
_Reader = tuple[str, torch.Tensor, Sequence[str]]


def _connectivity(
    block: str, widths: Mapping[str, int], readers: Sequence[_Reader]
) -> Connectivity:
    sources = list(widths)
    strength = np.full((len(sources), len(readers)), np.nan)
    for column, (name, kernel, read) in enumerate(readers):
        expected = [widths[source] for source in read]
        if kernel.shape[1] != sum(expected):
            raise ValueError(
                f"{block}, {name}: its kernel reads {kernel.shape[1]} channels, and its sources "
                f"({', '.join(read)}) have {sum(expected)}."
            )
        for source, weights in zip(read, kernel.double().split(expected, dim=1), strict=True):
            strength[sources.index(source), column] = weights.abs().mean().item()
    largest = np.nanmax(strength)
    if not 0 < largest < np.inf:
        raise ValueError(f"{block}: its weights are all zero, or not finite.")
    return Connectivity(block, sources, [name for name, *_ in readers], strength / largest)


# VoVNet ------------------------------------------------------------------------------------------


def _vovnet_blocks(tensors: Mapping[str, torch.Tensor]) -> list[Connectivity]:
    return [
        _osa_block(tensors, f"{stage}.{number}")
        for stage in STAGE_NAMES
        for number in range(_count(tensors, f"{stage}." + "{}."))
    ]


def _osa_block(tensors: Mapping[str, torch.Tensor], block: str) -> Connectivity:
    count = _count(tensors, f"{block}.layers." + "{}.")
    chain = {str(i + 1): _layer_kernel(tensors, f"{block}.layers.{i}") for i in range(count)}
    widths = {str(i + 1): _layer_width(tensors, f"{block}.layers.{i}") for i in range(count)}
    aggregated = [_INPUT, *chain]
    if (reduction := tensors.get(f"{block}.reduction.weight")) is not None:
        chain = {"reduction": reduction, **chain}
        widths = {"reduction": reduction.shape[0], **widths}
    widths = {_INPUT: next(iter(chain.values())).shape[1], **widths}
    readers = [
        *_chained(chain),
        ("aggregation", tensors[f"{block}.aggregation.weight"], aggregated),
    ]
    return _connectivity(block, widths, readers)


def _layer_kernel(tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    if (depthwise := tensors.get(f"{layer}.depthwise.weight")) is not None:
        return tensors[f"{layer}.pointwise.weight"] * depthwise.transpose(0, 1)
    bottleneck = tensors.get(f"{layer}.reduce.weight")
    return tensors[f"{layer}.weight"] if bottleneck is None else bottleneck


def _layer_width(tensors: Mapping[str, torch.Tensor], layer: str) -> int:
    names = (f"{layer}.{part}weight" for part in ("", "pointwise.", "conv."))
    return next(tensors[name].shape[0] for name in names if name in tensors)


# DenseNet-40 and its OSA twins -------------------------------------------------------------------


_CIFAR_BEGINNING = re.compile(r"(.*\.)?block1\.layers\.0\.conv\.weight")


def _cifar_blocks(tensors: Mapping[str, torch.Tensor]) -> list[Connectivity]:
    if (found := next(filter(None, map(_CIFAR_BEGINNING.fullmatch, tensors)), None)) is None:
        return []
    prefix = found[1] or ""
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    blocks = []
    for number in range(1, 1 + _count(tensors, "block{}.layers.", start=1)):
        layers = f"block{number}.layers."
        count = _count(tensors, layers + "{}.")
        kernels = [tensors[f"{layers}{index}.conv.weight"] for index in range(count)]
        after = f"transition{number}"
        final = tensors.get(f"{after}.conv.weight")
        last = ("linear", tensors["linear.weight"]) if final is None else (after, final)
        blocks.append(_plain_block(f"block{number}", kernels, [k.shape[0] for k in kernels], last))
    return blocks


# DenseNets of torchvision and timm ---------------------------------------------------------------

# Old files of torchvision write conv.1 for conv1.
_DENSE_LAYER = re.compile(r"(.*denseblock(\d+)\.)denselayer(\d+)\.conv(\.?)1\.weight")


def _densenet_blocks(tensors: Mapping[str, torch.Tensor]) -> list[Connectivity]:
    layers: dict[int, list[re.Match[str]]] = {}
    for match in filter(None, map(_DENSE_LAYER.fullmatch, tensors)):
        layers.setdefault(int(match[2]), []).append(match)
    blocks = []
    for number, matches in sorted(layers.items()):
        matches.sort(key=lambda match: int(match[3]))
        kernels = [tensors[match[0]] for match in matches]
        outputs = [tensors[f"{m[1]}denselayer{m[3]}.conv{m[4]}2.weight"].shape[0] for m in matches]
        after = f"transition{number}"
        final = tensors.get(matches[0][1].replace(f"denseblock{number}.", f"{after}.conv.weight"))
        last = ("classifier", tensors["classifier.weight"]) if final is None else (after, final)
        blocks.append(_plain_block(f"denseblock{number}", kernels, outputs, last))
    return blocks


# Shared ------------------------------------------------------------------------------------------


def _plain_block(
    block: str,
    kernels: Sequence[torch.Tensor],
    outputs: Sequence[int],
    last: tuple[str, torch.Tensor],
) -> Connectivity:
    """A block of layers that are densely connected or in a chain, as their kernels' widths tell."""
    layers = {str(number): kernel for number, kernel in enumerate(kernels, start=1)}
    sources = [_INPUT, *layers]
    widths = dict(zip(sources, [kernels[0].shape[1], *outputs], strict=True))
    dense = len(kernels) > 1 and kernels[1].shape[1] == kernels[0].shape[1] + outputs[0]
    readers = (
        [(name, kernel, sources[:index]) for index, (name, kernel) in enumerate(layers.items(), 1)]
        if dense
        else _chained(layers)
    )
    return _connectivity(block, widths, [*readers, (*last, sources)])


def _chained(layers: Mapping[str, torch.Tensor]) -> list[_Reader]:
    """Layers of which each reads the one before it, and the first the block's input."""
    befores = [_INPUT, *layers]
    return [(name, k, [b]) for (name, k), b in zip(layers.items(), befores, strict=False)]


def _count(names: Iterable[str], numbered: str, start: int = 0) -> int:
    """How many of ``numbered`` there are, counted from ``start`` without a gap."""
    names, number = list(names), start
    while any(name.startswith(numbered.format(number)) for name in names):
        number += 1
    return number - start


# Figure ------------------------------------------------------------------------------------------

_MOST_TICKS = 16


def plot_connectivity(blocks: Sequence[Connectivity], title: str) -> Figure:
    """One matrix per block, as in Figure 2 of the VoVNet paper: readers from left to right, their
    sources from top to bottom. Grey: no connection."""
    columns = min(len(blocks), 4)
    lines = math.ceil(len(blocks) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(1.2 + 3.1 * columns, 0.9 + 3.2 * lines),
        layout="constrained",
        squeeze=False,
    )
    used, unused = axes.flat[: len(blocks)], axes.flat[len(blocks) :]
    for axis in unused:
        axis.remove()
    for axis, block in zip(used, blocks, strict=True):
        axis.set_facecolor("0.85")
        image = axis.imshow(block.strength, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(block.block, fontsize=10)
        _label(axis.xaxis, block.readers)
        axis.tick_params(axis="x", labelrotation=90)
        _label(axis.yaxis, block.sources)
    figure.supxlabel("reader")
    figure.supylabel("source")
    figure.suptitle(title, parse_math=False)  # with the name of a config file
    figure.colorbar(image, ax=list(used), label="mean |weight|, relative to the largest")
    return figure


def _label(axis: Axis, names: Sequence[str]) -> None:
    step = math.ceil(len(names) / _MOST_TICKS)
    # The ends have names of their own, "input" and "aggregation": they are always shown.
    shown = sorted({*range(0, len(names) - step, step), len(names) - 1})
    axis.set_ticks(shown, [names[i] for i in shown], fontsize=8)
