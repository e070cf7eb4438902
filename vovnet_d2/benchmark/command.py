# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Parse the command line of the benchmark, and run it."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from ..engine.arguments import add_options_argument, parse_options_last
from ..engine.devices import parse_device
from ..engine.interruption import exit_on_signal
from ..engine.launch import run_or_exit
from ..errors import UserValueError
from ..made import refuse_foreign
from .exports import check_images
from .networks import BACKBONES, DEFAULT_NORM, backbone, detector, takes_norm
from .published import PAPER_TABLES, PaperTable, format_paper_table
from .report import FILES, format_table, write_study
from .study import MODES, Plan, Study
from .treatments import TREATMENTS

_DESCRIPTION = """Networks side by side, by the VoVNet paper's six figures: GFLOPs, latency and FPS,
parameters, peak memory, energy per image, computation efficiency. All cases are timed in turn,
round after round.

    python tools/benchmark.py --models V-39-eSE ResNet-50 timm:ese_vovnet39b \\
        --treatments plain optimized bf16 --sizes 480x640 800x1344 --batches 1 8
    python tools/benchmark.py --preset resnet --output output/resnet    # V-39/R-50, V-57/R-101
    python tools/benchmark.py --preset gpu --output output/gpu          # backbones on a GPU
    python tools/benchmark.py --preset resnet --device cuda --batches 1 8 --output output/gpu_resnet
    python tools/benchmark.py --config-file COCO-Detection/retinanet_V_39_eSE_FPN_1x.yaml \\
        COCO-Detection/retinanet_R_50_FPN_1x.yaml --modes inference training
    python tools/benchmark.py --preset deploy --output output/deploy    # backends, INT8; on a CPU
    python tools/benchmark.py --preset deploy --models --config-file output/config.yaml --weights \\
        --output output/deploy_own --opts MODEL.WEIGHTS output/model_final.pth      # with AP
    python tools/benchmark.py --preset table2 --output output/table2    # the paper's DSOD300
    python tools/benchmark.py --preset table4 --output output/table4    # the paper's RefineDet320

Models: {backbones}, and timm:NAME for any of timm's with maps of strides 4 to 32.
Treatments: {treatments}.
"""

_MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_{}_FPN_3x.yaml"

PRESETS: dict[str, dict[str, Any]] = {
    **{
        name: {
            "config_file": table.config_files,
            "sizes": [None],
            "reference": [table.reference],
        }
        for name, table in PAPER_TABLES.items()
    },
    "resnet": {
        "models": ["V-39", "ResNet-50", "V-57", "ResNet-101"],
        "config_file": [_MASK_RCNN.format(n) for n in ("V_39", "R_50", "V_57", "R_101")],
        "opts": ["MODEL.VOVNET.NORM", "FrozenBN"],  # the same as in the configs of ResNet
        "treatments": ["plain", "optimized", "bf16"],
        "reference": [
            "V-39=ResNet-50",
            "ResNet-50=ResNet-50",
            "V-57=ResNet-101",
            "ResNet-101=ResNet-101",
            "mask_rcnn_V_39_FPN_3x=mask_rcnn_R_50_FPN_3x",
            "mask_rcnn_R_50_FPN_3x=mask_rcnn_R_50_FPN_3x",
            "mask_rcnn_V_57_FPN_3x=mask_rcnn_R_101_FPN_3x",
            "mask_rcnn_R_101_FPN_3x=mask_rcnn_R_101_FPN_3x",
        ],
    },
    "gpu": {
        "models": [
            *("V-39-eSE", "V-57-eSE", "V-99-eSE", "V-19-slim-dw-eSE"),
            *("ResNet-50", "ResNet-101", "timm:ese_vovnet39b"),
            *("timm:hgnet_tiny", "timm:hgnetv2_b4"),
        ],
        "treatments": [t.name for t in TREATMENTS.values() if not t.backend],
        "modes": list(MODES),
        "batches": [1, 8],
        "sizes": [(480, 640), (800, 1344)],
        "device": "cuda",
        "warmup": 10,
        "repeats": 50,
    },
    "deploy": {
        "models": ["V-39-eSE", "V-19-slim-dw-eSE", "ResNet-50", "timm:ese_vovnet39b"],
        "config_file": [
            *(_MASK_RCNN.format(name) for name in ("V_39_eSE", "R_50")),
            "COCO-Detection/retinanet_V_39_eSE_FPN_3x.yaml",
        ],
        "treatments": [
            *("plain", "optimized", "openvino", "onnxruntime"),
            *("openvino-bf16", "openvino-int8", "onnxruntime-int8"),
        ],
        "deployment": True,
        "reference": [
            "V-39-eSE=ResNet-50",
            "V-19-slim-dw-eSE=ResNet-50",
            "ResNet-50=ResNet-50",
            "timm:ese_vovnet39b=ResNet-50",
            "mask_rcnn_V_39_eSE_FPN_3x=mask_rcnn_R_50_FPN_3x",
            "mask_rcnn_R_50_FPN_3x=mask_rcnn_R_50_FPN_3x",
            "retinanet_V_39_eSE_FPN_3x=mask_rcnn_R_50_FPN_3x",
        ],
    },
}


def image_size(text: str) -> tuple[int, int] | None:
    if text == "own":
        return None
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither HEIGHTxWIDTH, as 480x640, nor own")
    return int(sides[1]), int(sides[2])


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Print the description as it is, and the defaults of the options."""


def argument_parser() -> argparse.ArgumentParser:
    treatments = "; ".join(f"{t.name} ({t.description})" for t in TREATMENTS.values())
    described = _DESCRIPTION.format(backbones=", ".join(BACKBONES), treatments=treatments)
    parser = argparse.ArgumentParser(description=described, formatter_class=_HelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="set the defaults of all other options")
    parser.add_argument("--models", nargs="*", metavar="NAME", default=[], help="backbones")
    parser.add_argument(
        "--config-file",
        nargs="*",
        metavar="FILE",
        default=[],
        help="configs of detectors: paths, or names in this package or in Detectron2's model zoo",
    )
    add_options_argument(parser)
    parser.add_argument(
        "--weights", action="store_true", help="load MODEL.WEIGHTS of these configs"
    )
    parser.add_argument(
        "--allow-unsafe-yaml", action="store_true", help="accept Python tags in these files"
    )
    parser.add_argument(
        "--norm", help=f"norm of VoVNet and ResNet in --models (default: {DEFAULT_NORM})"
    )
    parser.add_argument(
        "--treatments",
        nargs="+",
        default=["plain", "optimized"],
        choices=TREATMENTS,
        metavar="NAME",
        help="see above",
    )
    parser.add_argument(
        "--modes", nargs="+", default=["inference"], choices=MODES, help="what is timed"
    )
    parser.add_argument(
        "--batches", nargs="+", type=positive, default=[1], metavar="N", help="images in a call"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=image_size,
        default=[(480, 640)],
        metavar="HEIGHTxWIDTH",
        help="image sizes; own is the INPUT.FIXED_SIZE of each config",
    )
    parser.add_argument("--device", type=parse_device, default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--warmup", type=positive, default=3, help="calls that are not timed")
    parser.add_argument("--repeats", type=positive, default=20, help="rounds that are timed")
    parser.add_argument(
        "--reference",
        nargs="+",
        default=[],
        metavar="NAME",
        help="network that the others are compared with (default: the first), or MODEL=NAME for "
        "the reference of one model",
    )
    parser.add_argument(
        "--reference-treatment", metavar="NAME", help="the first of --treatments unless given"
    )
    parser.add_argument(
        "--accuracy",
        nargs="+",
        default=[],
        metavar="NAME=AP",
        help="accuracy of the networks, for the plots",
    )
    parser.add_argument(
        "--energy-seconds",
        type=float,
        default=2.0,
        help="seconds per energy measurement; 0 disables it",
    )
    parser.add_argument(
        "--deployment",
        action="store_true",
        help="also measure the size of the files; on a CPU the memory of a process, and the "
        "throughput of one process with one thread on each core; and with --weights the AP on the "
        "first data set of DATASETS.TEST, once for each treatment. INT8 is then calibrated on "
        "training images",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for JSON, CSV, Markdown and plots; replaces the files of an earlier benchmark",
    )
    return parser


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line. Missing options have the values of the preset."""
    parser = argument_parser()
    chosen, _ = parser.parse_known_args(words)
    parser.set_defaults(**PRESETS.get(chosen.preset, {}))
    return parse_options_last(parser, words)


def read_references(words: list[str], names: list[str]) -> dict[str, str]:
    """Read ``["A", "B=C"]``: the reference of B is C, and A is the reference of all others."""
    general = [word for word in words if "=" not in word]
    if len(general) > 1:
        raise UserValueError(
            f"--reference names {len(general)} networks for all: give one, or pairs."
        )
    references = dict.fromkeys(names, general[0]) if general else {}
    return references | dict(word.split("=", 1) for word in words if "=" in word)


def _references(args: argparse.Namespace, names: list[str]) -> dict[str, str]:
    found = read_references(args.reference, names)
    if args.reference is PRESETS.get(args.preset, {}).get("reference"):  # of all networks
        return {name: other for name, other in found.items() if {name, other} <= set(names)}
    return found


def read_accuracy(words: list[str]) -> dict[str, float]:
    """Read ``["A=37.5", "B=40"]``."""
    try:
        return {name: float(value) for name, value in (word.rsplit("=", 1) for word in words)}
    except ValueError:
        raise UserValueError(f"--accuracy takes pairs as NAME=AP: {' '.join(words)}") from None


def make_plan(args: argparse.Namespace) -> Plan:
    """Return what the benchmark measures. Raise FileNotFoundError, KeyError or ValueError if the
    arguments do not make sense."""
    if not args.models and not args.config_file:
        raise UserValueError("Nothing to measure: give --models, --config-file or --preset.")
    if not args.config_file and (args.opts or args.weights or args.allow_unsafe_yaml):
        raise UserValueError("--opts, --weights and --allow-unsafe-yaml go with --config-file.")
    norm = DEFAULT_NORM if args.norm is None else args.norm
    networks = [backbone(name, norm=norm) for name in args.models]
    if args.norm is not None and not any(takes_norm(name) for name in args.models):
        raise UserValueError("--norm is of VoVNet and ResNet in --models, and there is none.")
    networks += [
        detector(file, args.opts, weights=args.weights, unsafe=args.allow_unsafe_yaml)
        for file in args.config_file
    ]
    if args.deployment:
        for network in networks:
            check_images(network, int8=any(TREATMENTS[t].int8 for t in args.treatments))
    return Plan(
        networks=networks,
        treatments=list(dict.fromkeys(args.treatments)),
        modes=list(dict.fromkeys(args.modes)),
        batches=list(dict.fromkeys(args.batches)),
        sizes=list(dict.fromkeys(args.sizes)),
        device=args.device,
        warmup=args.warmup,
        repeats=args.repeats,
        references=_references(args, [network.name for network in networks]),
        reference_treatment=args.reference_treatment,
        accuracy=read_accuracy(args.accuracy),
        energy_seconds=args.energy_seconds,
        deployment=args.deployment,
    )


def make_folder(path: Path) -> None:
    """Make the folder of the results, before anything is measured. Raise ValueError if it cannot be
    made, or has files of these names that this package did not make."""
    refuse_foreign(path / name for name in FILES)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserValueError(f"--output {path} cannot be a folder: {error.strerror}.") from error
    if not os.access(path, os.W_OK):
        raise UserValueError(f"--output {path} is a folder that cannot be written to.")


def run(args: argparse.Namespace) -> None:
    """Measure what the arguments ask for, write the results after each cell, and print them. An
    interruption keeps what is measured.

    Raises:
        FileNotFoundError, KeyError: the arguments do not make sense.
        ValueError: the arguments do not make sense, or nothing that they ask for could run.
    """
    study = Study(make_plan(args))
    if args.output:
        make_folder(args.output)
    table: PaperTable | None = PAPER_TABLES.get(args.preset)

    def save() -> list[Path]:
        if args.output and any(not row["error"] for row in study.rows):
            return write_study(study, args.output, table)
        return []

    with exit_on_signal():
        study.run(save)
    written: list[Path] = []
    try:
        written = save()
    finally:  # printed at least
        print(*(f"{name}: {value}" for name, value in study.protocol.items()), sep="\n")
        print(f"\n{format_table(study.rows)}\n")
        if table:
            print(f"{format_paper_table(table, study.rows)}\n")
    for path in written:
        print(f"Wrote {path}.")
    if study.interruption is not None:
        raise study.interruption
    failed = sum(bool(row["error"]) for row in study.rows)
    if failed == len(study.rows):
        raise UserValueError("Nothing could run: the table above says why. No file was written.")
    if failed:
        print(f"{failed} of {len(study.rows)} cases could not run: see above.", file=sys.stderr)


def main() -> None:
    run_or_exit(run, parse_arguments())
