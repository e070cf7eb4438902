#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Export a detector, or its backbone with or without FPN, and compare each file with eager PyTorch.

    python tools/export_model.py --config-file output/config.yaml --part detector \\
        --format onnx torchscript --images *.jpg --opts MODEL.WEIGHTS output/model_final.pth
    python tools/export_model.py --config-file output/config.yaml --int8 --calibration own_train \\
        --opts MODEL.WEIGHTS output/model_final.pth

The second command quantizes the dense part (backbone, FPN and dense head) to INT8, for Predictor,
the demo and TEST.INT8, and measures the AP of DATASETS.TEST in float32 and in INT8.

A report of the same name is written next to the files. It lists differences, operators and times.
The exit status is 1 if a file does not agree with the model, and 2 for a mistake in the arguments.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from vovnet_d2 import VoVNetCheckpointer
from vovnet_d2.backends import check_backend
from vovnet_d2.data.image_file import read_image
from vovnet_d2.data.mapper import build_augmentations
from vovnet_d2.engine.any_config import AnyConfig, as_cfg, build_network, load_any_config
from vovnet_d2.engine.arguments import add_options_argument, parse_options_last
from vovnet_d2.engine.devices import parse_device
from vovnet_d2.engine.initial_weights import check_all_loaded
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.engine.quantization import (
    CALIBRATION_IMAGES,
    CALIBRATION_SEED,
    find_images,
    quantize_detector,
)
from vovnet_d2.engine.quantization import to_markdown as to_markdown_int8
from vovnet_d2.errors import UserFileNotFoundError, UserValueError
from vovnet_d2.export import (
    FORMATS,
    PARTS,
    BackboneTarget,
    DetectorTarget,
    check_format,
    export_and_check,
    select_target,
)
from vovnet_d2.export.int8 import KEEP_FLOAT
from vovnet_d2.export.report import to_markdown
from vovnet_d2.words import suggest_path

SIZES = ("224x224", "257x191", "320x480")
LEAST_SIDE = 32  # pixels, the stride of the last stage

SENSITIVITY_IMAGES = 4


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        required=True,
        help="a YAML file, a LazyConfig, or the name of a config of this package",
    )
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="part to export (default: detector). dense: backbone, FPN and dense head",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["onnx"],
        help="formats to write (default: onnx)",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        choices=("preprocessing", "postprocessing"),
        default=[],
        help="leave these out of the graph. preprocessing: normalisation and, in a detector, "
        "padding. postprocessing of a detector: scaling to a height and width, which are two more "
        "inputs, and pasting of masks",
    )
    parser.add_argument(
        "--fixed-shape",
        metavar="NxHxW",
        help="number and size of the images that a backbone's graph takes, such as 6x320x800 "
        "(default: any)",
    )
    parser.add_argument("--output", default="exported", help="folder (default: exported)")
    parser.add_argument(
        "--device",
        type=parse_device,
        default="cpu",
        help="device to export and check on (default: cpu)",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="also export layers that the weights leave at random values",
    )
    _add_quantization(parser.add_argument_group("quantization"))
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument(
        "--images",
        nargs="+",
        metavar="FILE",
        help="images for the comparison, resized as in a test (default: random images, in which a "
        "detector finds nothing)",
    )
    compared.add_argument(
        "--sizes",
        nargs="+",
        default=SIZES,
        metavar="HxW",
        help=f"sizes of random images to compare on (default: {' '.join(SIZES)})",
    )
    add_options_argument(parser)
    return parser


def _add_quantization(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--int8", action="store_true", help="write the quantized dense.int8.onnx instead"
    )
    group.add_argument(
        "--calibration",
        metavar="DATASET",
        help="data set of training images on which the ranges of values are measured",
    )
    group.add_argument(
        "--calibration-images",
        type=int,
        default=CALIBRATION_IMAGES,
        metavar="N",
        help=f"number of its images that are drawn by a fixed seed (default: {CALIBRATION_IMAGES})",
    )
    group.add_argument(
        "--keep-float",
        nargs="*",
        metavar="NAME",
        help="stages, groups of layers, or layers that stay in float32. Without a name: none "
        f"(default: {' '.join(KEEP_FLOAT)})",
    )
    group.add_argument(
        "--for-tensorrt",
        action="store_true",
        help="quantize symmetrically, as TensorRT needs it (default: for CPUs)",
    )
    group.add_argument(
        "--sensitivity",
        action="store_true",
        help="list the error that each layer makes when it is quantized alone, the worst first",
    )


def run(args: argparse.Namespace) -> None:
    if args.int8:
        _quantize(args)
        return
    if args.calibration or args.keep_float is not None or args.sensitivity or args.for_tensorrt:
        raise UserValueError(
            "--calibration, --keep-float, --for-tensorrt and --sensitivity go with --int8: add it."
        )
    args.part = args.part or "detector"
    kind = DetectorTarget if args.part == "detector" else BackboneTarget
    for format in args.format:
        check_format(format, kind)
    if kind is BackboneTarget and "postprocessing" in args.without:
        raise UserValueError(f"The part {args.part} has no post-processing to leave out.")
    # Otherwise a difference could be eager's rounding to TF32.
    torch.backends.cudnn.allow_tf32 = False
    shape = _read_shape(args.fixed_shape) if args.fixed_shape else None
    if shape and args.images:
        raise UserValueError("--fixed-shape is compared on random images: leave out --images.")
    config, cfg = _load_config(args, str(args.device))
    images = _read_images(cfg, args.images) if args.images else None
    model = build_network(config, cfg).eval()
    _load_weights(model, cfg.MODEL.WEIGHTS, args.part, allow_partial=args.allow_partial)
    target = select_target(
        model,
        args.part,
        preprocessing="preprocessing" not in args.without,
        postprocessing="postprocessing" not in args.without,
        shape=shape,
    )
    if shape:
        size = (shape[0], len(model.pixel_mean), *shape[1:])
        images = [torch.rand(size, device=model.pixel_mean.device) * 255 for _ in range(2)]
    if images is None:
        images = _random_images(args.sizes, model, batched=target.batched)
    _require_size(images, args.part)
    about = {
        "config": args.config_file,
        "weights": cfg.MODEL.WEIGHTS or "none: random",
        "channels": cfg.INPUT.FORMAT,
    }
    folder = Path(args.output)
    report = export_and_check(target, args.format, folder, args.part, images, about=about)
    print(to_markdown(report))
    nothing = not any(_found(check) for export in report["exports"] for check in export["checks"])
    if nothing:
        print("Nothing was detected, so no boxes were compared: give pictures with --images.")
    disagreeing = [export["file"] for export in report["exports"] if not export["agrees"]]
    if disagreeing:
        sys.exit(f"Not the same as eager: {', '.join(disagreeing)}.")
    agreement = "All find nothing, as eager does" if nothing else "All agree with eager"
    print(f"{agreement}. Files and report: {folder / args.part}.*")


def _quantize(args: argparse.Namespace) -> None:
    if not args.calibration:
        raise UserValueError(
            "--int8 needs images: name a data set by --calibration, such as own_train."
        )
    if args.part not in (None, "dense") or args.format != ["onnx"] or args.without:
        raise UserValueError("--int8 writes the part dense as onnx: leave out --part and --format.")
    if args.calibration_images < 1:
        raise UserValueError(f"--calibration-images {args.calibration_images} is less than 1.")
    check_backend("onnxruntime", torch.device("cpu"))
    config, cfg = _load_config(args, "cpu")
    records = find_images(cfg, args.calibration, args.calibration_images, CALIBRATION_SEED)
    model = build_network(config, cfg).eval()
    _load_weights(model, cfg.MODEL.WEIGHTS, "dense", allow_partial=args.allow_partial)
    report = quantize_detector(
        model,
        cfg,
        records,
        Path(args.output),
        keep_float=args.keep_float,
        symmetric=args.for_tensorrt,
        sensitivity=SENSITIVITY_IMAGES if args.sensitivity else 0,
        about={
            "config": args.config_file,
            "weights": cfg.MODEL.WEIGHTS or "none: random",
            "calibration": args.calibration,
        },
    )
    print(to_markdown_int8(report))
    print(f"File and report: {Path(args.output) / 'dense.int8'}.*")


def _load_config(args: argparse.Namespace, device: str) -> tuple[AnyConfig, CfgNode]:
    for key in ("MODEL.DEVICE", "train.device"):
        if key in {word.partition("=")[0] for word in args.opts}:
            raise UserValueError(f"{key} is among the config options: use --device instead.")
    config = load_any_config(args.config_file, args.opts)
    cfg = as_cfg(config)
    cfg.MODEL.DEVICE = device
    return config, cfg


def _read_shape(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"([1-9]\d*)x(\d+)x(\d+)", text)
    if match is None:
        raise UserValueError(
            f"--fixed-shape {text!r} is not of the form NxHxW, such as 6x320x800: a number of "
            "images, their height and their width."
        )
    return int(match[1]), int(match[2]), int(match[3])


def _load_weights(model: nn.Module, weights: str, part: str, *, allow_partial: bool) -> None:
    """Load weights into a model, and refuse those that leave some of an exported part random."""
    if not weights and not allow_partial:
        raise UserValueError(
            "There are no weights to export: set MODEL.WEIGHTS to a file (a training writes "
            "OUTPUT_DIR/model_final.pth). To export random values all the same, add "
            "--allow-partial."
        )
    checkpointer = VoVNetCheckpointer(model, allow_partial=allow_partial)
    checkpointer.load(weights)
    if not allow_partial:
        prefix = {"detector": "", "fpn": "backbone."}.get(part, _bottom_up_prefix(model))
        check_all_loaded(checkpointer, weights, part=prefix)


def _bottom_up_prefix(model: nn.Module) -> str:
    return "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."


def _found(check: dict[str, Any]) -> bool:
    """Return whether there was something to compare."""
    return check["differences"].get("detections", {"expected": 1})["expected"] > 0


def _read_images(cfg: CfgNode, files: list[str]) -> list[torch.Tensor]:
    """Return each image as (1, C, H, W), in the size of a test."""
    (resize,) = build_augmentations(cfg, is_train=False)
    images = []
    for file in files:
        try:
            image = read_image(file, cfg.INPUT.FORMAT)
        except FileNotFoundError as error:
            raise UserFileNotFoundError(f"There is no file {file}.{suggest_path(file)}") from error
        image = resize.get_transform(image).apply_image(image).astype("float32")
        images.append(torch.from_numpy(image).permute(2, 0, 1)[None].to(cfg.MODEL.DEVICE))
    return images


def _require_size(images: Sequence[torch.Tensor], part: str) -> None:
    """Refuse images that are too small for a backbone alone. A detector pads such images."""
    for image in images:
        height, width = image.shape[2:]
        if part != "detector" and min(height, width) < LEAST_SIDE:
            raise UserValueError(
                f"An image of {height}x{width} pixels, as a test resizes it, is too thin for the "
                f"part {part}, which takes {LEAST_SIDE} a side and more: give others with --images "
                "or --sizes."
            )


def _random_images(sizes: Sequence[str], model: nn.Module, *, batched: bool) -> list[torch.Tensor]:
    """Return one image, then two at once, then three, ... where the target takes several."""
    images = []
    for number, size in enumerate(sizes, start=1):
        match = re.fullmatch(r"(\d+)x(\d+)", size)
        if match is None:
            raise UserValueError(f"Size {size!r} is not of the form HxW, such as {SIZES[0]}.")
        shape = (number if batched else 1, len(model.pixel_mean), *map(int, match.groups()))
        images.append(torch.rand(shape, device=model.pixel_mean.device) * 255)
    return images


def main(argv: Sequence[str] | None = None) -> None:
    run_or_exit(run, parse_options_last(argument_parser(), argv))


if __name__ == "__main__":
    main()
