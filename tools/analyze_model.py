#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Analyze a network stage by stage: parameters, multiply-adds, activations, memory access and its
lower bound, arithmetic intensity, peak memory. It needs neither weights nor a GPU.

    python tools/analyze_model.py --backbone V-99-eSE --image-size 800 1344
    python tools/analyze_model.py --backbone DenseNet-40 --image-size 32 32
    python tools/analyze_model.py --config-file COCO-Detection/faster_rcnn_V_39_eSE_FPN_3x.yaml
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from vovnet_d2 import VOVNET_SPECS, VoVNet
from vovnet_d2.analysis import analyze
from vovnet_d2.analysis.report import format_table, write_report
from vovnet_d2.data.classification import class_names
from vovnet_d2.engine.config import load_config, resolve_config
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.engine.run_checks import check_network
from vovnet_d2.errors import UserValueError
from vovnet_d2.modeling.baselines.cifar import CIFAR_SPECS, CifarClassifier
from vovnet_d2.timing import describe_environment


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument(
        "--config-file", help="a YAML file: a path, or a name in this package or Detectron2's zoo"
    )
    network.add_argument(
        "--backbone",
        choices=[*VOVNET_SPECS, *CIFAR_SPECS],
        metavar="NAME",
        help="a variant of VoVNet, or a CIFAR classifier: %(choices)s",
    )
    parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="default: 800 1344, or the INPUT.FIXED_SIZE of a config",
    )
    parser.add_argument("--output", type=Path, help="folder for complexity.csv, .json and .png")
    parser.add_argument(
        "--allow-unsafe-yaml",
        action="store_true",
        help="accept Python tags in the file, which can run any code",
    )
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs of the config")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.opts and args.backbone:
        raise UserValueError(f"Config options, {args.opts[0]} here, go with --config-file.")
    with torch.device("meta"):
        if args.backbone:
            model, channels, size = build_backbone(args.backbone), 3, (800, 1344)
        else:
            model, channels, size = build_from_config(args)
    complexity = analyze(model, tuple(args.image_size or size), in_channels=channels)
    name = args.backbone or args.config_file
    print(f"{name}, image of {' x '.join(map(str, complexity.image_size))}\n")
    print(format_table(complexity))
    if args.output:
        environment = describe_environment("cpu")
        header = {"network": name} | {key: environment[key] for key in ("command", "torch")}
        for path in write_report(complexity, args.output, header):
            print(f"Wrote {path}.")


def build_backbone(name: str) -> nn.Module:
    if name in CIFAR_SPECS:
        return CifarClassifier(name)
    # An FPN keeps all these feature maps.
    return VoVNet(name, out_features=["stage2", "stage3", "stage4", "stage5"])


def build_from_config(args: argparse.Namespace) -> tuple[nn.Module, int, tuple[int, int]]:
    """Return the network, its number of input channels, and the size of its images."""
    path, trusted = resolve_config(args.config_file)
    trusted = trusted or args.allow_unsafe_yaml
    try:
        cfg = load_config(path, args.opts, allow_unsafe_yaml=trusted)
    except KeyError as error:
        if "PRETRAIN" not in error.args[0]:
            raise
        return build_classifier(path, args, trusted)
    check_network(cfg)
    cfg.MODEL.DEVICE = "meta"
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    fixed = cfg.INPUT.FIXED_SIZE
    return model, len(cfg.MODEL.PIXEL_MEAN), (fixed, fixed) if fixed else (800, 1344)


def build_classifier(
    path: str, args: argparse.Namespace, trusted: bool
) -> tuple[nn.Module, int, tuple[int, int]]:
    # Here, as it needs timm.
    from vovnet_d2.engine.classifier import build_network
    from vovnet_d2.engine.pretrain import add_pretraining_config

    cfg = load_config(path, args.opts, allow_unsafe_yaml=trusted, add_config=add_pretraining_config)
    data, side = cfg.PRETRAIN.DATA, cfg.PRETRAIN.IMAGE_SIZE
    if not data:
        print("PRETRAIN.DATA is empty: 1000 classes are taken.\n")
    cfg.PRETRAIN.NUM_CLASSES = len(class_names(data, cfg.DATASETS.TEST[0])) if data else 1000
    return build_network(cfg), 3, (side, side)


def main(argv: Sequence[str] | None = None) -> None:
    run_or_exit(run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
