# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The connectivity of a block is how strongly each layer uses the features of each layer before it
(VoVNet paper, section 3.1 and Figure 2, after Figure 5 of DenseNet, arXiv 1608.06993).

A source is a layer whose features another layer reads. The strength of the connection is the mean
absolute weight of the slice of the kernel that reads the source, divided by the largest one in the
block.

Each kind of block has other connections:

- One-shot aggregation: each 3x3 layer reads the layer before it. The aggregation reads the input of
  the block and all layers. The residual connection and eSE read no source with weights.
- Depthwise variants: the kernel is the product of the depthwise and the pointwise convolution. If a
  reduction precedes the chain, it reads the input, and the first layer reads the reduction.
- Bottleneck variants: the 1x1 convolution reads the sources.
- Dense blocks: each layer reads the input and all layers before it. So does the transition after
  the block, or the classifier after the last block.
"""

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
from ..errors import UserValueError
from ..modeling.specs import STAGE_NAMES

_INPUT = "input"


@dataclass(frozen=True)
class Connectivity:
    """The strength of the connections in one block.

    Attributes:
        sources: the input of the block, then its layers.
        readers: the layers, then the aggregation, transition or classifier after them.
        strength: (sources, readers), from 0 to 1; NaN if a reader does not read a source.
    """

    block: str
    sources: list[str]
    readers: list[str]
    strength: NDArray[np.float64]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each connection."""
        return [
            {"block": self.block, "reader": reader, "source": source, "strength": round(value, 6)}
            for reader, column in zip(self.readers, self.strength.T.tolist(), strict=True)
            for source, value in zip(self.sources, column, strict=True)
            if not math.isnan(value)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, which has no NaN."""
        matrix = [[None if math.isnan(v) else v for v in row] for row in self.strength.tolist()]
        return {
            "block": self.block,
            "sources": self.sources,
            "readers": self.readers,
            "strength": matrix,
        }

    def summary(self) -> dict[str, Any]:
        """Return the mean strength of the connections to the previous layer, to all earlier layers,
        and of the last reader."""
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
    """Measure the connectivity of each block of a network, in order.

    Args:
        state_dict: the weights of a VoVNet in any layout and below any prefix, or of a CIFAR
            classifier.

    Raises:
        ValueError: the weights are from another network, or their widths contradict each other.
    """
    blocks = _cifar_blocks(state_dict)
    return blocks or _vovnet_blocks(convert_state_dict(state_dict, "native"))


# A reader: its name, its kernel (outputs, inputs, ...), and its sources in the order of its input.
_Reader = tuple[str, torch.Tensor, Sequence[str]]


def _connectivity(
    block: str, widths: Mapping[str, int], readers: Sequence[_Reader]
) -> Connectivity:
    sources = list(widths)
    strength = np.full((len(sources), len(readers)), np.nan)
    for column, (name, kernel, read) in enumerate(readers):
        expected = [widths[source] for source in read]
        if kernel.shape[1] != sum(expected):
            raise UserValueError(
                f"{block}, {name}: the kernel reads {kernel.shape[1]} channels, but the sources "
                f"({', '.join(read)}) have {sum(expected)}."
            )
        for source, weights in zip(read, kernel.double().split(expected, dim=1), strict=True):
            strength[sources.index(source), column] = weights.abs().mean().item()
    largest = np.nanmax(strength)
    if not 0 < largest < np.inf:
        raise UserValueError(f"{block}: the weights are all zero, or not finite.")
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


# DenseNet-40 and its variants with OSA -----------------------------------------------------------


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
        blocks.append(_plain_block(f"block{number}", kernels, last))
    return blocks


# Shared ------------------------------------------------------------------------------------------


def _plain_block(
    block: str,
    kernels: Sequence[torch.Tensor],
    last: tuple[str, torch.Tensor],
) -> Connectivity:
    """Describe a block of densely connected layers or of a chain; their widths tell which."""
    layers = {str(number): kernel for number, kernel in enumerate(kernels, start=1)}
    sources = [_INPUT, *layers]
    first = kernels[0].shape
    widths = dict(zip(sources, [first[1], *(kernel.shape[0] for kernel in kernels)], strict=True))
    dense = len(kernels) > 1 and kernels[1].shape[1] == first[1] + first[0]
    readers = (
        [(name, kernel, sources[:index]) for index, (name, kernel) in enumerate(layers.items(), 1)]
        if dense
        else _chained(layers)
    )
    return _connectivity(block, widths, [*readers, (*last, sources)])


def _chained(layers: Mapping[str, torch.Tensor]) -> list[_Reader]:
    """Return the layers of a chain: each reads the one before it, and the first reads the input."""
    befores = [_INPUT, *layers]
    return [(name, k, [b]) for (name, k), b in zip(layers.items(), befores, strict=False)]


def _count(names: Iterable[str], numbered: str, start: int = 0) -> int:
    """Count the names that begin with ``numbered``, from the number ``start`` on without a gap."""
    names, number = list(names), start
    while any(name.startswith(numbered.format(number)) for name in names):
        number += 1
    return number - start


# Figure ------------------------------------------------------------------------------------------

_MOST_TICKS = 16


def plot_connectivity(blocks: Sequence[Connectivity], title: str) -> Figure:
    """Draw a matrix for each block, as in Figure 2 of the VoVNet paper.

    Readers go from left to right, sources from top to bottom. Grey means no connection.
    """
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
    figure.suptitle(title, parse_math=False)  # the name of a file may have dollar signs
    figure.colorbar(image, ax=list(used), label="mean |weight|, relative to the largest")
    return figure


def _label(axis: Axis, names: Sequence[str]) -> None:
    step = math.ceil(len(names) / _MOST_TICKS)
    # The first and the last name, such as "input" and "aggregation", are always shown.
    shown = sorted({*range(0, len(names) - step, step), len(names) - 1})
    axis.set_ticks(shown, [names[i] for i in shown], fontsize=8)
