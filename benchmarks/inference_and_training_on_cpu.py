# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Inference and training of this package against the network as commonly written and against what
simple means give: norms folded, channels-last, torch.compile with frozen weights.

Each cell of a table runs in processes of its own, its cases interleaved in each; a cell that is in
the CSV file already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vovnet_d2 import VoVNet, optimize_for_inference
from vovnet_d2.analysis.saved_memory import saved_bytes
from vovnet_d2.benchmark.plain import plain
from vovnet_d2.benchmark.protocol import describe_environment, ratios, time_interleaved, write_csv
from vovnet_d2.modeling.convolution import ConvNormAct
from vovnet_d2.modeling.folding import fold_norms
from vovnet_d2.modeling.onednn import PackedConv2d

STAGES = ("stage2", "stage3", "stage4", "stage5")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STREAM = ((480, 640), (512, 608), (448, 672), (576, 544), (416, 704), (640, 480))
# Of a training step: bytes, and relative differences of all gradients together.
ERRORS = ("gradient error to plain", "gradient error to float64", "gradient error in float64")
FACTS = ("saved", *ERRORS)

Cases = Mapping[str, Callable[[], object]]


def backbone(variant: str, device: str) -> VoVNet:
    torch.manual_seed(0)
    return VoVNet(variant, out_features=STAGES).eval().to(device)


def compiled(optimized: nn.Module) -> nn.Module:
    """The simple recipe: the same folded weights and order of channels, by torch.compile."""
    recipe = copy.deepcopy(optimized)
    for module in recipe.modules():
        if type(module) is PackedConv2d:
            module.__class__ = ConvNormAct
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(recipe, dynamic=False, options={"freezing": True})


def inference(variant: str, sizes: tuple[tuple[int, int], ...], dtype: str, device: str) -> Cases:
    model = backbone(variant, device)
    inputs = [torch.randn(1, 3, *size, device=device) for size in sizes]
    ours = optimize_for_inference(model, dtype=DTYPES[dtype])
    cases = {"plain": plain(model), "recipe": compiled(ours), "ours": ours}

    def run(network: nn.Module) -> None:
        with torch.no_grad():
            for x in inputs:
                network(x)

    return {name: lambda n=network: run(n) for name, network in cases.items()}


def against_timm(size: tuple[int, int], dtype: str, device: str) -> Cases:
    """Both folded and channels-last, at the same weights' shapes, without a classifier."""
    peer = timm.create_model("ese_vovnet39b", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    x = torch.randn(1, 3, *size, device=device)
    fold_norms(peer)
    peer = peer.to(device, DTYPES[dtype], memory_format=torch.channels_last).requires_grad_(False)
    ours = optimize_for_inference(backbone("V-39-eSE", device), dtype=DTYPES[dtype])

    def run_timm() -> list[Tensor]:
        with torch.no_grad():
            return peer(x.to(DTYPES[dtype], memory_format=torch.channels_last))

    return {"timm": run_timm, "ours": lambda: ours(x)}


def training(device: str) -> tuple[Cases, dict[str, Any]]:
    """Steps of V-39-eSE with FrozenBN, and what each saves and gives as gradients."""
    torch.manual_seed(0)
    ours = VoVNet("V-39-eSE", out_features=STAGES).train().to(device)
    recomputing = copy.deepcopy(ours)
    recomputing.checkpoint_blocks = True
    networks = {
        "plain": plain(ours),
        "ours": ours.to(memory_format=torch.channels_last),
        "ours, per-block checkpointing": recomputing.to(memory_format=torch.channels_last),
    }
    size = (256, 320) if device == "cpu" else (800, 1344)
    x = torch.randn(2, 3, *size, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    images = {name: x if name == "plain" else last for name in networks}

    exact = gradients(copy.deepcopy(networks["plain"]).double(), x.double())
    reference = gradients(networks["plain"], x)
    facts = {}
    for name, network in networks.items():
        found = gradients(network, images[name])
        facts[name] = {
            "saved": saved_bytes(network, images[name]),
            "gradient error to plain": difference(found, reference),
            "gradient error to float64": difference(found, exact),
            "gradient error in float64": difference(
                gradients(copy.deepcopy(network).double(), images[name].double()), exact
            ),
        }
    return {n: lambda n=n: train_step(networks[n], images[n]) for n in networks}, facts


def train_step(network: nn.Module, x: Tensor) -> None:
    network.zero_grad()
    sum(y.square().mean() for y in network(x).values()).backward()


def gradients(network: nn.Module, x: Tensor) -> Tensor:
    train_step(network, x)
    return torch.cat([p.grad.double().flatten() for p in network.parameters()])


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


CELLS: dict[str, tuple[str, Callable[[str], Any]]] = {}
for _variant, _size in (
    ("V-39-eSE", (480, 640)),
    ("V-39-eSE", (800, 1344)),
    ("V-99-eSE", (480, 640)),
    ("V-19-slim-dw-eSE", (480, 640)),
):
    for _dtype in DTYPES:
        CELLS[f"{_variant}, {_size[0]}x{_size[1]}, {_dtype}"] = (
            "recipe",
            lambda d, v=_variant, s=_size, t=_dtype: (inference(v, (s,), t, d), {}),
        )
for _dtype in DTYPES:
    CELLS[f"V-39-eSE, six sizes, {_dtype}"] = (
        "recipe",
        lambda d, t=_dtype: (inference("V-39-eSE", STREAM, t, d), {}),
    )
    CELLS[f"timm ese_vovnet39b, 480x640, {_dtype}"] = (
        "timm",
        lambda d, t=_dtype: (against_timm((480, 640), t, d), {}),
    )
CELLS["training step, V-39-eSE, two images"] = ("plain", training)


def measure(cell: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """One process's lines of a cell."""
    reference, make = CELLS[cell]
    cases, facts = make(device)
    times = time_interleaved(cases, device=device, warmup=2, repeats=repeats)
    first = next(iter(times))
    return [
        {
            "cell": cell,
            "case": case,
            "ms": 1e3 * median(t),
            f"/ {first}": median(ratios(t, times[first])),
            "reference": reference,
            "/ reference": median(ratios(t, times[reference])),
            **facts.get(case, {}),
        }
        for case, t in times.items()
    ]


def medians(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Over the processes, of each number of each line."""
    lines = []
    for same in zip(*runs, strict=True):
        line = {"cell": same[0]["cell"], "case": same[0]["case"]}
        line["ms"] = round(median(x["ms"] for x in same), 1)
        line["reference"] = same[0]["reference"]
        against = [x["/ reference"] for x in same]
        line["ratio"] = round(median(against), 3)
        line["lowest"], line["highest"] = round(min(against), 3), round(max(against), 3)
        plain_ratio = [x["/ plain"] for x in same if "/ plain" in x]
        line["/ plain"] = round(median(plain_ratio), 3) if plain_ratio else ""
        for fact in FACTS:
            line[fact] = same[0].get(fact, "")
        line["processes"] = len(same)
        lines.append(line)
    return lines


def run_in_processes(cell: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--only", cell, "--device", args.device]
    command += ["--repeats", str(args.repeats)]
    runs = []
    for _ in range(args.processes):
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(result.stdout.splitlines()[-1]))
    return medians(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7, help="rounds in each process")
    parser.add_argument("--cells", default="", help="only cells whose name has this in it")
    parser.add_argument("--output", type=Path, help="CSV file, resumed where it is there")
    parser.add_argument("--only", choices=CELLS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.device, args.repeats)))
        return
    path = args.output or Path(__file__).with_suffix("") / f"{args.device}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    if path.exists():
        rows = [row for row in path.read_text().splitlines() if not row.startswith("#")]
        lines = list(csv.DictReader(rows))
    protocol = describe_environment(args.device) | {
        "warm-up": "2 rounds",
        "repeats": f"{args.repeats} interleaved rounds in each process, median",
        "processes": "median, lowest and highest of the ratios of the processes",
        "ratio": "of a case to the reference of its cell",
    }
    for cell in CELLS:
        if args.cells not in cell or any(line["cell"] == cell for line in lines):
            continue
        lines += run_in_processes(cell, args)
        write_csv(path, lines, protocol)
        print(*lines[-3:], sep="\n", flush=True)


if __name__ == "__main__":
    main()
