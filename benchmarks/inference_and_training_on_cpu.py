# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Inference and training of this package against the network as commonly written and against what
simple means give: norms folded, channels-last, torch.compile with frozen weights.

Each cell of the table runs in processes of its own, its cases interleaved in each; a cell that is
in the CSV file already is not run again, unless ``--again`` says so. For a GPU there is
``tools/benchmark.py --preset gpu``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor import config as inductor

from vovnet_d2 import VoVNet, optimize_for_inference
from vovnet_d2.analysis.saved_memory import saved_bytes
from vovnet_d2.benchmark.plain import plain
from vovnet_d2.benchmark.protocol import describe_environment, ratios, time_interleaved, write_csv
from vovnet_d2.checkpoint.atomic import atomic_write
from vovnet_d2.engine.memory_format import prefers_channels_last
from vovnet_d2.modeling.allocation import keep_freed_memory
from vovnet_d2.modeling.folding import fold_norms

STAGES = ("stage2", "stage3", "stage4", "stage5")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STREAM = ((480, 640), (512, 608), (448, 672), (576, 544), (416, 704), (640, 480))
# Of a training step: bytes, and relative differences of all gradients together.
ERRORS = ("gradient error to plain", "gradient error to float64", "gradient error in float64")
FACTS = ("saved", *ERRORS)
OF_A_CELL = ("date", "vovnet_d2")  # of the environment, as cells may be measured at different times

Cases = Mapping[str, Callable[[], object]]


def backbone(variant: str) -> VoVNet:
    torch.manual_seed(0)
    return VoVNet(variant, out_features=STAGES).eval()


def compiled(model: VoVNet, dtype: torch.dtype) -> Callable[[Tensor], object]:
    """The simple recipe: the plain network with folded norms, in channels-last, by torch.compile
    with frozen weights, for each size anew."""
    folded = copy.deepcopy(model).requires_grad_(False)
    fold_norms(folded)
    recipe = plain(folded).to(dtype=dtype, memory_format=torch.channels_last)
    torch._dynamo.config.cache_size_limit = 64
    inductor.freezing = True  # as an option of torch.compile it freezes nothing
    recipe = torch.compile(recipe, dynamic=False)
    return lambda x: {
        name: maps.float() for name, maps in recipe(in_channels_last(x, dtype)).items()
    }


def in_channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def inference(variant: str, sizes: tuple[tuple[int, int], ...], dtype: str) -> Cases:
    model = backbone(variant)
    inputs = [torch.randn(1, 3, *size) for size in sizes]
    cases = {
        "plain": plain(model),
        "recipe": compiled(model, DTYPES[dtype]),
        "ours": optimize_for_inference(model, dtype=DTYPES[dtype]),
    }

    def run(network: Callable[[Tensor], object]) -> None:
        with torch.no_grad():
            for x in inputs:
                network(x)

    return {name: lambda n=network: run(n) for name, network in cases.items()}


def against_timm(size: tuple[int, int], dtype: str) -> Cases:
    """Both folded and channels-last, at the same weights' shapes, without a classifier."""
    peer = timm.create_model("ese_vovnet39b", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    x = torch.randn(1, 3, *size)
    fold_norms(peer)
    peer = peer.to(DTYPES[dtype], memory_format=torch.channels_last).requires_grad_(False)
    ours = optimize_for_inference(backbone("V-39-eSE"), dtype=DTYPES[dtype])

    def run_timm() -> list[Tensor]:
        with torch.no_grad():
            return peer(in_channels_last(x, DTYPES[dtype]))

    return {"timm": run_timm, "ours": lambda: ours(x)}


def training() -> tuple[Cases, dict[str, Any]]:
    """Steps of V-39-eSE with FrozenBN, and what each saves and gives as gradients."""
    torch.manual_seed(0)
    ours = VoVNet("V-39-eSE", out_features=STAGES).train()
    recomputing = copy.deepcopy(ours)
    recomputing.checkpoint_blocks = True
    networks = {"plain": plain(ours), "ours": ours, "ours, per-block checkpointing": recomputing}
    x = torch.randn(2, 3, 256, 320)
    order = torch.channels_last if prefers_channels_last("cpu") else torch.contiguous_format
    images = {name: x.contiguous(memory_format=order) for name in networks} | {"plain": x}
    for name in ("ours", "ours, per-block checkpointing"):
        networks[name].to(memory_format=order)

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


# Name to the case that the others are compared with, and to what makes all of them.
CELLS: dict[str, tuple[str, Callable[[], Any]]] = {}
for _variant, _size in (
    ("V-39-eSE", (480, 640)),
    ("V-39-eSE", (800, 1344)),
    ("V-99-eSE", (480, 640)),
    ("V-19-slim-dw-eSE", (480, 640)),
):
    for _dtype in DTYPES:
        CELLS[f"{_variant}, {_size[0]}x{_size[1]}, {_dtype}"] = (
            "recipe",
            lambda v=_variant, s=_size, t=_dtype: (inference(v, (s,), t), {}),
        )
for _dtype in DTYPES:
    CELLS[f"V-39-eSE, six sizes, {_dtype}"] = (
        "recipe",
        lambda t=_dtype: (inference("V-39-eSE", STREAM, t), {}),
    )
    CELLS[f"timm ese_vovnet39b, 480x640, {_dtype}"] = (
        "timm",
        lambda t=_dtype: (against_timm((480, 640), t), {}),
    )
CELLS["training step, V-39-eSE, two images"] = ("plain", training)


def measure(cell: str, repeats: int) -> list[dict[str, Any]]:
    """One process's lines of a cell."""
    environment = describe_environment("cpu")  # before somebody changes the checkout
    reference, make = CELLS[cell]
    keep_freed_memory()  # for all cases, as it holds for the whole process
    cases, facts = make()
    times = time_interleaved(cases, device="cpu", warmup=2, repeats=repeats)
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
            **{name: environment[name] for name in OF_A_CELL},
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
        line |= {name: ", ".join(dict.fromkeys(x[name] for x in same)) for name in OF_A_CELL}
        lines.append(line)
    return lines


def resume(path: Path, protocol: Mapping[str, str]) -> list[dict[str, Any]]:
    """The lines that are there.

    Raises:
        SystemExit: they were measured otherwise.
    """
    if not path.exists():
        return []
    text = path.read_text().splitlines()
    header = dict(row[2:].split(": ", 1) for row in text if row.startswith("# "))
    for name, value in protocol.items():
        if header.get(name) != value:
            sys.exit(
                f"{path} was measured with {name} {header.get(name)}, not {value}: give another "
                "file for --output."
            )
    return list(csv.DictReader(row for row in text if not row.startswith("#")))


def run_in_processes(cell: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--only", cell, "--repeats", str(args.repeats)]
    runs = []
    for _ in range(args.processes):
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(result.stdout.splitlines()[-1]))
    return medians(runs)


def write_report(lines: Sequence[Mapping[str, Any]], protocol: Mapping[str, str]) -> str:
    cells: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        cells.setdefault(line["cell"], {})[line["case"]] = line
    inference, training = [], []
    for cell, cases in cells.items():
        if CELLS[cell][0] == "plain":
            training += [[name, *_of_step(line, cases["plain"])] for name, line in cases.items()]
        else:
            ours, reference = cases["ours"], cases[CELLS[cell][0]]
            times = [ours["ms"], reference["ms"], reference["case"]]
            of_plain = f"{float(ours['/ plain']):.3f}" if ours["/ plain"] else "–"
            inference.append([cell, *times, _ratio(ours), of_plain, ours["processes"]])
    parts = ["# Inference and training on a CPU", _CASES]
    parts.append(tabulate(inference, _OF_INFERENCE, tablefmt="pipe", disable_numparse=True))
    if training:
        parts += ["## A step of V-39-eSE: two images of 256×320, FrozenBN", _OF_GRADIENTS]
        parts.append(tabulate(training, _OF_TRAINING, tablefmt="pipe", disable_numparse=True))
    protocol = {**protocol, "command": "python benchmarks/inference_and_training_on_cpu.py"}
    for name in OF_A_CELL:
        protocol |= {name: ", ".join(sorted({line[name] for line in lines}))}
    parts.append("\n".join(f"- {name}: {value}" for name, value in protocol.items()))
    return "\n\n".join(parts) + "\n"


def _of_step(line: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    saved = int(line["saved"]) / int(plain["saved"])
    return [_ratio(line), f"{saved:.3f}", *(f"{float(line[error]):.1e}" for error in ERRORS)]


def _ratio(line: Mapping[str, Any]) -> str:
    ratio, lowest, highest = (float(line[name]) for name in ("ratio", "lowest", "highest"))
    return f"{ratio:.3f} ({lowest:.3f} to {highest:.3f})"


_CASES = """- **plain**: the network as commonly written, in float32 and NCHW, with separate norms
  (`vovnet_d2/benchmark/plain.py`);
- **recipe**: it with folded norms, in channels-last, by `torch.compile` with frozen weights, for
  each size of image anew;
- **timm**: timm's `ese_vovnet39b`, folded and channels-last, eager;
- **ours**: `optimize_for_inference` with its defaults but the dtype, which compiles nothing; or a
  training step as the package has it."""
_OF_INFERENCE = ["cell", "ours (ms)", "reference (ms)", "reference", "ours / reference"]
_OF_INFERENCE += ["ours / plain", "processes"]
_OF_GRADIENTS = """Saved are the activations that the forward pass keeps for the backward pass; a
step's peak memory also has weights, gradients and what an operator needs for itself. Gradients of
all parameters together are off by so much, relative. In float64 they are the plain network's. In
float32 they are about as far from those of float64 as the plain network's own, as a value near zero
passes a ReLU in one and not in the other."""
_OF_TRAINING = ["case", "time / plain", "saved / plain", *ERRORS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7, help="rounds in each process")
    parser.add_argument("--cells", default="", help="only cells whose name has this in it")
    parser.add_argument("--again", action="store_true", help="also cells that are there")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).with_suffix("") / "cpu.csv",
        help="CSV file, resumed where it is there",
    )
    parser.add_argument("--only", choices=CELLS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.repeats)))
        return
    environment = describe_environment("cpu")
    known = {n: value for n, value in environment.items() if n not in (*OF_A_CELL, "command")}
    protocol = known | {
        "warm-up": "2 rounds",
        "repeats": f"{args.repeats} interleaved rounds in each process, median",
        "processes": "median, lowest and highest of the ratios of the processes of each cell",
        "ratio": "of a case to the reference of its cell",
        "memory": "freed memory is kept (glibc's mallopt) for all cases",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = resume(args.output, protocol)
    for cell in CELLS:
        is_there = any(line["cell"] == cell for line in lines)
        if args.cells not in cell or (is_there and not args.again):
            continue
        new = run_in_processes(cell, args)
        lines = [line for line in lines if line["cell"] != cell] + new
        with atomic_write(args.output) as partial:
            write_csv(partial, lines, protocol)
        print(*new, sep="\n", flush=True)
    report = write_report(lines, protocol)
    with atomic_write(args.output.with_name("README.md")) as partial:
        Path(partial).write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
