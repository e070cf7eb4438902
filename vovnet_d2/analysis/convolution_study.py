# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Measurements of time against memory access (VoVNet paper, section 2).

There are two comparisons at equal multiply-adds, for 1x1 and 3x3 convolutions:

- **shape**: c_in : c_out from 1:1 to 1:12. By equation 1, memory access grows with the difference.
  The comparison shows if time does, too.
- **split**: one convolution against 2, 4 and 8 narrower ones in sequence. The comparison shows if
  the same work is slower in more steps.

Channels are multiples of 32, because kernels work on blocks of channels and are slow for other
widths. With 448 channels in the reference, the work differs by up to 2.1 %, so times and memory
accesses are compared per multiply-add.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import nn

from ..timing import ratios, time_interleaved
from .memory_access import LayerCost, convolution_cost

SHAPE_RATIOS = (1, 2, 4, 6, 8, 12)
SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """A sequence of convolutions, each from ``in_channels`` to ``out_channels``.

    Attributes:
        comparison: "shape" or "split".
        label: the ratio of the channels, or the number of convolutions.
    """

    comparison: str
    label: str
    kernel_size: int
    in_channels: int
    out_channels: int
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.kernel_size}x{self.kernel_size} {self.comparison} {self.label}"

    def cost(self, size: int) -> LayerCost:
        """Return the cost for one image of ``size`` x ``size``, summed over the sequence."""
        one = convolution_cost(size, size, self.in_channels, self.out_channels, self.kernel_size)
        n = self.count
        return LayerCost(n * one.read, n * one.written, n * one.weights, n * one.multiply_adds)

    def build(self) -> nn.Sequential:
        k = self.kernel_size
        return nn.Sequential(
            *(
                nn.Conv2d(self.in_channels, self.out_channels, k, padding=k // 2, bias=False)
                for _ in range(self.count)
            )
        )


def make_cases(channels: int) -> list[Case]:
    """Return the cases of both comparisons, the reference of each comparison first. ``channels``
    are the input and the output channels of the references."""
    cases = []
    for kernel_size in (1, 3):
        for ratio in SHAPE_RATIOS:
            fewer = _multiple_of_32(channels / math.sqrt(ratio))
            more = _multiple_of_32(channels**2 / fewer)
            cases.append(Case("shape", f"1:{more / fewer:.3g}", kernel_size, fewer, more))
        for count in SPLITS:
            width = _multiple_of_32(channels / math.sqrt(count))
            cases.append(Case("split", str(count), kernel_size, width, width, count))
    return cases


def _multiple_of_32(number: float) -> int:
    return max(32, round(number / 32) * 32)


def measure(
    cases: Sequence[Case],
    *,
    size: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    warmup: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Time ``cases`` in turn.

    Returns:
        a row for each case, with its channels, its costs for one image and the median time for the
        batch in milliseconds. The relative memory access and the relative time (median and
        quartiles over the rounds) are per multiply-add, divided by those of the first case of the
        same comparison and kernel size.
    """
    functions = {case.name: _function(case, size, batch, device, dtype) for case in cases}
    with torch.inference_mode():
        times = time_interleaved(functions, device=device, warmup=warmup, repeats=repeats)
    references = {(c.comparison, c.kernel_size): c for c in reversed(cases)}
    rows = []
    for case in cases:
        reference = references[case.comparison, case.kernel_size]
        cost, base = case.cost(size), reference.cost(size)
        work = cost.multiply_adds / base.multiply_adds
        relative = [r / work for r in ratios(times[case.name], times[reference.name])]
        low, middle, high = quantiles(relative, n=4)
        rows.append(
            {
                "comparison": case.comparison,
                "kernel_size": case.kernel_size,
                "label": case.label,
                "in_channels": case.in_channels,
                "out_channels": case.out_channels,
                "convolutions": case.count,
                "multiply_adds": cost.multiply_adds,
                "memory_access": cost.memory_access,
                "time_ms": round(1e3 * median(times[case.name]), 4),
                "relative_memory_access": round(cost.memory_access / base.memory_access / work, 3),
                "relative_time": round(middle, 3),
                "quartile1": round(low, 3),
                "quartile3": round(high, 3),
            }
        )
    return rows


def _function(
    case: Case, size: int, batch: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    network = case.build().to(device, dtype)
    x = torch.rand(batch, case.in_channels, size, size, device=device, dtype=dtype)
    return lambda: network(x)


def plot(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw the relative time (solid) and memory access (dashed) of both comparisons in
    :func:`measure`."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained", sharey=True)
    panels = {
        "shape": ("one convolution of another shape", "input channels : output channels"),
        "split": ("the same work in a sequence", "convolutions in sequence"),
    }
    for axis, (comparison, (heading, xlabel)) in zip(axes, panels.items(), strict=True):
        for kernel_size, colour in ((1, "#4c72b0"), (3, "#c44e52")):
            chosen = [
                row
                for row in rows
                if row["comparison"] == comparison and row["kernel_size"] == kernel_size
            ]
            positions = range(len(chosen))
            times = [row["relative_time"] for row in chosen]
            below = [row["relative_time"] - row["quartile1"] for row in chosen]
            above = [row["quartile3"] - row["relative_time"] for row in chosen]
            label = f"{kernel_size}×{kernel_size}, time (median, quartiles)"
            axis.errorbar(
                positions, times, (below, above), fmt="o-", color=colour, capsize=3, label=label
            )
            access = [row["relative_memory_access"] for row in chosen]
            label = f"{kernel_size}×{kernel_size}, memory access"
            axis.plot(positions, access, "s--", color=colour, alpha=0.5, label=label)
            axis.set_xticks(positions, [row["label"] for row in chosen])
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel(xlabel)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("← relative to the first, at equal multiply-adds")
    legend = sorted(
        zip(*axes[0].get_legend_handles_labels(), strict=True), key=lambda pair: pair[1]
    )
    axes[0].legend(*zip(*legend, strict=True), fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
