#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert VoVNet's weights from any layout to another: names, channel order, normalisation.

    python tools/convert_weights.py timm://ese_vovnet39b.ra_in1k vovnet39.pth --to-bgr
    python tools/convert_weights.py v99://fcos3d v99.pth --to detectron2 \\
        --output-prefix img_backbone. --output-key state_dict    # for PETR, StreamPETR, ...
    python tools/convert_weights.py --list                       # the weights that can be had

The result is the backbone (and its classifier, if there is one): what stands beside it in a
detector's file is left out, since such files load as they are.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vovnet_d2.checkpoint.conversion import (
    convert_state_dict,
    fold_normalization,
    osmr_caveats,
    reorder_channels,
    timm_caveats,
)
from vovnet_d2.checkpoint.metadata import InputConvention, Metadata
from vovnet_d2.checkpoint.recognition import Description, describe_state_dict
from vovnet_d2.checkpoint.sources import read_weights
from vovnet_d2.checkpoint.writing import save_weights
from vovnet_d2.checkpoint.zoo import metadata_of_layout
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.errors import UserValueError
from vovnet_d2.layouts import LAYOUTS
from vovnet_d2.zoo_page import table_of_weights


class _PrintTable(argparse.Action):
    """Print the zoo and exit, as --help does, with any other arguments."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        print(table_of_weights(), end="")
        parser.exit()


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="what MODEL.WEIGHTS takes: a file, a URL or a name of --list")
    parser.add_argument("output", help="file to write: .pth, .pt, .bin or .safetensors")
    parser.add_argument("--to", choices=LAYOUTS, default="native", help="names of the tensors")
    parser.add_argument(
        "--prefix", help="take the VoVNet below this prefix, if the file has several"
    )
    parser.add_argument(
        "--output-prefix",
        default="",
        help="prefix of the names in the output, such as backbone.bottom_up.",
    )
    parser.add_argument(
        "--output-key",
        choices=("model", "state_dict"),
        default="model",
        help="key of the tensors in the output: Detectron2 reads model, OpenMMLab's projects read "
        "state_dict; a .safetensors file has none",
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--to-bgr",
        dest="order",
        action="store_const",
        const="BGR",
        help="reorder the channels for BGR input; exact",
    )
    order.add_argument(
        "--to-rgb",
        dest="order",
        action="store_const",
        const="RGB",
        help="reorder the channels for RGB input; exact",
    )
    parser.add_argument(
        "--fold-normalization",
        choices=("std", "mean-std"),
        help="let the first convolution do the input's normalisation. std: MODEL.PIXEL_STD becomes "
        "1; exact. mean-std: PIXEL_MEAN becomes 0, too; NOT exact at padded borders, where zeros "
        "meant the mean colour and now mean black: there the first convolution's output is off by "
        "as much as its own size (8%% of the stem's output for 224x224, 1 to 2%% of stage5's)",
    )
    given = parser.add_argument_group(
        "input convention", "for files that do not tell what they expect"
    )
    given.add_argument("--input-format", choices=("BGR", "RGB"))
    given.add_argument(
        "--pixel-mean", nargs="+", type=float, help="mean of each channel, for values from 0 to 255"
    )
    given.add_argument("--pixel-std", nargs="+", type=float)
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read a .pkl of Detectron2's model zoo"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--list",
        action=_PrintTable,
        nargs=0,
        help="print the weights that have names, with their licences, and exit",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    if Path(args.output).exists() and not args.overwrite:
        raise UserValueError(
            f"{args.output} exists already: choose another name or add --overwrite."
        )
    checkpoint, known = read_weights(args.input, allow_pickle=args.allow_pickle)
    found = describe_state_dict(checkpoint["model"], args.prefix)
    print(f"{args.input} holds {found}.")
    known = known or metadata_of_layout(found, checkpoint["model"])
    convention = _convention(args, known)

    tensors = convert_state_dict(checkpoint["model"], "native", prefix=found.prefix)
    print(f"{len(checkpoint['model']) - len(tensors)} other tensors are left out.")
    if args.order or args.fold_normalization:
        if convention is None:
            raise UserValueError(
                f"{args.input} does not tell what input it expects: add --input-format, "
                "--pixel-mean and --pixel-std."
            )
        if args.order:
            tensors, convention = reorder_channels(tensors, convention, args.order)
        if args.fold_normalization:
            tensors, convention = fold_normalization(tensors, convention, args.fold_normalization)
    tensors = convert_state_dict(tensors, args.to, prefix="")
    source = known.source or args.input
    metadata = Metadata(known.stem, known.residual, convention, source)
    save_weights(
        args.output,
        {args.output_prefix + name: t for name, t in tensors.items()},
        metadata,
        key=args.output_key,
    )
    _report(args, found, metadata)


def _convention(args: argparse.Namespace, known: Metadata) -> InputConvention | None:
    given = (args.input_format, args.pixel_mean, args.pixel_std)
    if not any(given):
        return known.input
    if not all(given):
        raise UserValueError(
            "--input-format, --pixel-mean and --pixel-std go together: give all three."
        )
    return InputConvention(args.input_format, tuple(args.pixel_mean), tuple(args.pixel_std))


def _report(args: argparse.Namespace, found: Description, metadata: Metadata) -> None:
    print(f"Wrote {args.output}, {args.to} names.")
    if metadata.input is not None:
        print("A config for it says:", *metadata.input.config_lines(), sep="\n  ")
    caveats = {"timm": timm_caveats, "osmr": osmr_caveats}
    for caveat in caveats[args.to](found, metadata) if args.to in caveats else []:
        print(f"Note: {caveat}")


def main(argv: Sequence[str] | None = None) -> None:
    run_or_exit(run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
