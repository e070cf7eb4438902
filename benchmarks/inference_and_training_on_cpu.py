# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare the speed of this package on a CPU with the plain network, which is VoVNet as commonly
written, and with what a user reaches by simple means: fused norms, channels-last, torch.compile
with frozen weights.

Each cell of the table runs in its own processes, and each process times the cases of its cell in
turn. The script measures only the cells that are not in the CSV file, and with ``--again`` all.
Training steps have their own page: ``--cells training --output
benchmarks/training_step_on_cpu/cpu.csv``. Use
``tools/benchmark.py --preset gpu`` for a GPU.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor import config as inductor

from vovnet_d2 import VoVNet, optimize_for_inference
from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.benchmark.memory import saved_bytes
from vovnet_d2.benchmark.plain import plain
from vovnet_d2.benchmark.workload import detector_inputs, random_images
from vovnet_d2.engine import load_config
from vovnet_d2.engine.compilation import compile_backbone
from vovnet_d2.engine.memory_format import prefers_channels_last
from vovnet_d2.modeling.allocation import keep_freed_memory
from vovnet_d2.modeling.fpn import attach_fpn
from vovnet_d2.modeling.fusion import fuse_norms
from vovnet_d2.timing import describe_environment, ratios, time_interleaved, write_csv

STAGES = ("stage2", "stage3", "stage4", "stage5")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STREAM = ((480, 640), (512, 608), (448, 672), (576, 544), (416, 704), (640, 480))
# Each case to its SOLVER.COMPILE.MEMORY_BUDGET.
COMPILED = {"compiled": 1.0, "compiled, memory budget 0.5": 0.5}
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.yaml"
ERRORS = ("gradient error to plain", "gradient error to float64", "gradient error in float64")
# The saved bytes of a training step, and the relative differences of all its gradients together.
FACTS = ("saved", *ERRORS)
# Cells may be measured on different days and commits, so each line has its own.
OF_A_CELL = ("date", "vovnet_d2")

Cases = Mapping[str, Callable[[], object]]


def backbone(variant: str) -> VoVNet:
    torch.manual_seed(0)
    return VoVNet(variant, out_features=STAGES).eval()


def compiled(model: VoVNet, dtype: torch.dtype) -> Callable[[Tensor], object]:
    """Compile the plain network with fused norms, in channels-last and with frozen weights, for
    each size anew."""
    folded = copy.deepcopy(model).requires_grad_(False)
    fuse_norms(folded)
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
    """Return both networks with fused norms, in channels-last, without a classifier."""
    peer = timm.create_model("ese_vovnet39b", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    x = torch.randn(1, 3, *size)
    fuse_norms(peer)
    peer = peer.to(DTYPES[dtype], memory_format=torch.channels_last).requires_grad_(False)
    ours = optimize_for_inference(backbone("V-39-eSE"), dtype=DTYPES[dtype])

    def run_timm() -> list[Tensor]:
        with torch.no_grad():
            return peer(in_channels_last(x, DTYPES[dtype]))

    return {"timm": run_timm, "ours": lambda: ours(x)}


Inputs = Any  # images, or images with objects as Detectron2's data loader gives them
Trained = tuple[nn.Module, Inputs]


def backbone_to_train(shape: tuple[int, ...], *, fpn: bool) -> Trained:
    """Return V-39-eSE with FrozenBN, and random images."""
    torch.manual_seed(0)
    network = VoVNet("V-39-eSE", out_features=STAGES)
    if fpn:
        network = attach_fpn(network, in_features=STAGES, out_channels=256, top_block=None)
    return network.train(), torch.randn(shape)


def detector_to_train(size: tuple[int, int]) -> Trained:
    """Return Mask R-CNN with V-39-eSE, and an image with eight objects."""
    torch.manual_seed(0)
    model = build_model(load_config(MASK_RCNN, ["MODEL.DEVICE", "cpu"])).train()
    return model, detector_inputs(model, random_images(1, size, torch.device("cpu")))


def training(make: Callable[[], Trained], *, with_compiled: bool) -> tuple[Cases, dict[str, Any]]:
    """Return training steps of the plain network, of the trainer's, with activation checkpointing,
    and compiled; and for each step the bytes that it saves and the errors of its gradients."""
    model, inputs = make()
    order = torch.channels_last if prefers_channels_last("cpu") else torch.contiguous_format
    networks = {"plain": plain(model)}
    for name in ("ours", "ours, per-block checkpointing", *(COMPILED if with_compiled else ())):
        networks[name] = copy.deepcopy(model).to(memory_format=order)
    for module in networks["ours, per-block checkpointing"].modules():
        if isinstance(module, VoVNet):
            module.checkpoint_blocks = True
    given = dict.fromkeys(networks, inputs)
    if isinstance(inputs, Tensor):
        given |= {n: inputs.contiguous(memory_format=order) for n in networks if n != "plain"}
    exact = reference = None
    facts = {}
    for name, network in networks.items():
        # The gradients of a detector cannot be compared: it chooses proposals by scores whose last
        # bits differ. The float64 copy is not compiled.
        if isinstance(inputs, Tensor):
            twin = copy.deepcopy(network).double()
            precise = gradients(twin, given[name].double())
            exact = precise if exact is None else exact
        if name in COMPILED:
            compile_backbone(network, memory_budget=COMPILED[name], dynamic=False)
        found = gradients(network, given[name])
        with one_draw():
            facts[name] = {"saved": saved_bytes(network, given[name])}
        if exact is not None:
            reference = found if reference is None else reference
            errors = (found, reference), (found, exact), (precise, exact)
            facts[name] |= {n: difference(*e) for n, e in zip(ERRORS, errors, strict=True)}
    return {n: lambda n=n: train_step(networks[n], given[n]) for n in networks}, facts


@contextmanager
def one_draw() -> Iterator[None]:
    """Let a detector draw the same samples each time, and give it a storage for its events."""
    torch.manual_seed(0)
    with EventStorage():
        yield


def train_step(network: nn.Module, inputs: Inputs) -> None:
    network.zero_grad()
    with one_draw():
        outputs = network(inputs)
    # A detector returns losses, which are numbers. A backbone returns feature maps.
    sum(y.square().mean() if y.dim() else y for y in outputs.values()).backward()


def gradients(network: nn.Module, inputs: Inputs) -> Tensor:
    train_step(network, inputs)
    return torch.cat([p.grad.double().flatten() for p in network.parameters()])


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# The name of a cell to its reference case, and to the function that makes its cases.
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
for _name, _make, _compiled in (
    ("V-39-eSE, 2x256x320", partial(backbone_to_train, (2, 3, 256, 320), fpn=False), False),
    ("V-39-eSE, 1x480x640", partial(backbone_to_train, (1, 3, 480, 640), fpn=False), False),
    ("V-39-eSE with FPN, 2x256x320", partial(backbone_to_train, (2, 3, 256, 320), fpn=True), True),
    ("Mask R-CNN with V-39-eSE, 1x480x640", partial(detector_to_train, (480, 640)), False),
):
    CELLS[f"training step, {_name}"] = (
        "plain",
        lambda m=_make, c=_compiled: training(m, with_compiled=c),
    )


def measure(cell: str, repeats: int) -> list[dict[str, Any]]:
    """Measure a cell in this process, and return its lines."""
    environment = describe_environment("cpu")  # now, because the checkout may change meanwhile
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
    """Return the median over the processes for each number of each line."""
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
    """Return the lines of an earlier run.

    Raises:
        SystemExit: the earlier run had another machine, other versions or another protocol.
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
            name = cell.removeprefix("training step, ")
            training += [[name, c, *_of_step(x, cases["plain"])] for c, x in cases.items()]
        else:
            ours, reference = cases["ours"], cases[CELLS[cell][0]]
            times = [ours["ms"], reference["ms"], reference["case"]]
            of_plain = f"{float(ours['/ plain']):.3f}" if ours["/ plain"] else "–"
            inference.append([cell, *times, _ratio(ours), of_plain, ours["processes"]])
    title = "# Inference on a CPU" if inference else "# A training step on a CPU"
    parts = [title, _CASES]
    if inference:
        parts.append(tabulate(inference, _OF_INFERENCE, tablefmt="pipe", disable_numparse=True))
    if training:
        parts += ["## A training step, FrozenBN, float32", _OF_GRADIENTS]
        parts.append(tabulate(training, _OF_TRAINING, tablefmt="pipe", disable_numparse=True))
    protocol = {**protocol, "command": "python benchmarks/inference_and_training_on_cpu.py"}
    for name in OF_A_CELL:
        protocol |= {name: ", ".join(sorted({line[name] for line in lines}))}
    parts.append("\n".join(f"- {name}: {value}" for name, value in protocol.items()))
    return "\n\n".join(parts) + "\n"


def _of_step(line: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    saved = int(line["saved"]) / int(plain["saved"])
    errors = (f"{float(line[e]):.1e}" if line[e] != "" else "–" for e in ERRORS)
    return [line["ms"], _ratio(line), f"{saved:.3f}", *errors, line["processes"]]


def _ratio(line: Mapping[str, Any]) -> str:
    ratio, lowest, highest = (float(line[name]) for name in ("ratio", "lowest", "highest"))
    return f"{ratio:.3f} ({lowest:.3f} to {highest:.3f})"


_CASES = """- **plain**: the network as commonly written, in float32 and NCHW, with separate norms
  (`vovnet_d2/benchmark/plain.py`);
- **recipe**: the plain network with fused norms, in channels-last, compiled by `torch.compile` with
  frozen weights for each image size;
- **timm**: timm's `ese_vovnet39b` with fused norms, in channels-last, not compiled;
- **ours**: `optimize_for_inference`, which compiles nothing, or a training step of this package."""
_OF_INFERENCE = ["cell", "ours (ms)", "reference (ms)", "reference", "ours / reference"]
_OF_INFERENCE += ["ours / plain", "processes"]
_OF_GRADIENTS = """**plain** is in NCHW. **ours** is a step of the trainer. **compiled** is this
step with `SOLVER.COMPILE`; the first step, which compiles, is not timed. The loss of a backbone is
the sum of the mean squares of its feature maps. The loss of a detector is the sum of its losses for
one image with eight objects.

**Saved** are the activations that the forward pass keeps for the backward pass. The peak memory of
a step also has weights, gradients and temporary buffers. A **gradient error** is the relative
difference of the gradients of all parameters together. In float64, the step of this package has
the gradients of the plain network. In float32 the gradients differ, because a value near zero may
pass a ReLU in one and not in the other. The gradients of a detector are not compared, because it
chooses its proposals by scores whose last bits differ.
[what_was_tried.md](../training_step_on_cpu/what_was_tried.md) has the measurements that led to this
code."""
_OF_TRAINING = ["cell", "case", "ms", "time / plain", "saved / plain", *ERRORS, "processes"]


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
    # A cell of an earlier script may no longer exist.
    lines = [line for line in resume(args.output, protocol) if line["cell"] in CELLS]
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
    write_text(args.output.with_name("README.md"), report)
    print(report)


if __name__ == "__main__":
    main()
