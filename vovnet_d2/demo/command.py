# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Parse the command line of ``tools/demo.py``, and run the demo."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ..backends import AUTO, BACKENDS, TORCH
from ..drawing.artist import Artist
from ..engine.any_config import as_cfg, load_any_config
from ..engine.arguments import PICKLE_HELP, add_options_argument, parse_options_last
from ..engine.config import find_config
from ..engine.interruption import CTRL_C
from ..engine.launch import run_or_exit
from ..errors import UserValueError
from ..modeling.allocation import keep_freed_memory
from ..predictor import Predictor
from ..words import counted
from .inputs import Camera, Pictures, Video
from .outputs import (
    PictureFiles,
    Sink,
    VideoFile,
    Window,
    plan_pictures,
    plan_video,
    refuse_overwriting,
)
from .results import ResultsFile
from .run import Outcome, Run
from .selection import Selection

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_DESCRIPTION = """\
Detect objects on pictures, a video or a camera.

    python tools/demo.py --config-file output/config.yaml --input pictures/ --output drawn/ \\
        --opts MODEL.WEIGHTS output/model_final.pth
"""

_EPILOG = """\
exit status:
  0    all inputs were read
  1    some could not be read, or not to their end; each was named
  2    the arguments, the config or the weights do not fit; nothing more was done
  130  interrupted (Ctrl-C); what was written until then is complete. A camera has no other end,
       and there it is 0
"""


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file",
        required=True,
        help="a YAML file, a LazyConfig, or the name of a config of this package",
    )
    _add_inputs(parser.add_argument_group("inputs, one of"))
    _add_outputs(parser.add_argument_group("outputs, at least one of"))
    _add_selection(parser.add_argument_group("what is shown"))
    _add_network(parser.add_argument_group("network"))
    return parser


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    kinds = group.add_mutually_exclusive_group(required=True)
    kinds.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="pictures, folders of them, or patterns such as '*.jpg'",
    )
    kinds.add_argument("--video", metavar="FILE", help="video file")
    kinds.add_argument("--webcam", type=int, metavar="N", help="camera, counted from 0")
    group.add_argument(
        "--recursive", action="store_true", help="also look into the folders of a folder"
    )


def _add_outputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        metavar="PATH",
        help="folder for drawn pictures or the video, or a file for one picture or a video",
    )
    group.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="detections in COCO's results format, with file_name added. image_id is the place "
        "among the inputs, or the number of the frame, from 1; category_id is the data set's "
        "where the config's data set is known, else the network's from 0",
    )
    group.add_argument("--show", action="store_true", help="show in a window; q or Escape ends")
    group.add_argument(
        "--codec",
        help="four characters, for a video (default: what goes with the suffix: MJPG for .avi, "
        "VP80 for .webm, and for others avc1, which is H.264, or mp4v where OpenCV cannot write "
        "that)",
    )


def _add_selection(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--score-threshold",
        type=_score,
        default=0.5,
        metavar="S",
        help="least score of a detection, from 0 to 1 (default: 0.5). The config's "
        "SCORE_THRESH_TEST drops detections before",
    )
    group.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only these categories; by number, where the data set of the config is not known",
    )


def _add_network(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        default="",
        help="device, such as cuda:1 (default: the config's, or cpu without a GPU)",
    )
    group.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="dtype of the backbone (default: float32)",
    )
    group.add_argument("--compile", action="store_true", help="compile the backbone")
    group.add_argument(
        "--backend",
        choices=(TORCH, *BACKENDS, AUTO),
        default="",
        help="what runs the backbone, FPN and dense head; auto is the fastest that is installed "
        "(default: the config's TEST.BACKEND, which is torch; with --int8 it is auto)",
    )
    group.add_argument(
        "--int8", default="", metavar="FILE", help="run this file of tools/export_model.py --int8"
    )
    group.add_argument(
        "--tiles",
        type=_size,
        metavar="HxW",
        help="also detect on tiles of this size, for small objects in large images",
    )
    group.add_argument(
        "--overlap",
        type=float,
        metavar="SHARE",
        help="overlap of neighbouring tiles (default: 0.2)",
    )
    group.add_argument(
        "--batch-size",
        type=_positive,
        default=1,
        metavar="N",
        help="images at once (default: 1); more is faster on a GPU where they are of one size",
    )
    for name, help in (
        ("--allow-partial", "run with weights that cover only a part of the network"),
        ("--allow-pickle", PICKLE_HELP),
        ("--allow-unsafe-yaml", "load config files with Python tags, which can run any code"),
    ):
        group.add_argument(name, action="store_true", help=help)
    add_options_argument(group)


def _score(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HxW, such as 640x640")
    return int(match[1]), int(match[2])


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of ``tools/demo.py``, and exit with a status that ``--help`` lists."""
    sys.exit(run_or_exit(_run, parse_options_last(_argument_parser(), argv)))


def _run(args: argparse.Namespace) -> int:
    if not (args.output or args.json or args.show):
        raise UserValueError(
            "Nothing would be kept of the results: add --output, --json or --show."
        )
    # Mistakes in the inputs and the config are found before the network is loaded.
    file = find_config(args.config_file)
    config = load_any_config(file, args.opts, allow_unsafe_yaml=args.allow_unsafe_yaml)
    source = _open_source(args)
    read = [*source.files, Path(file), Path(as_cfg(config).MODEL.WEIGHTS)]
    if args.json:
        refuse_overwriting([args.json], read)
    with ExitStack() as stack:
        sinks = [stack.enter_context(sink) for sink in _open_sinks(args, source, read)]
        keep_freed_memory()
        predictor = Predictor(
            config,
            device=args.device,
            dtype=_DTYPES[args.dtype],
            compile=args.compile,
            backend=args.backend,
            int8=args.int8,
            tiles=args.tiles,
            overlap=args.overlap,
            batch_size=args.batch_size,
            allow_partial=args.allow_partial,
            allow_pickle=args.allow_pickle,
        )
        metadata = predictor.metadata
        selection = Selection(metadata, min_score=args.score_threshold, names=args.classes)
        results = stack.enter_context(ResultsFile(args.json, metadata)) if args.json else None
        outcome = Run(predictor, selection, Artist(metadata), sinks, results)(source)
    return _conclude(source, outcome)


def _open_source(args: argparse.Namespace) -> Pictures | Video | Camera:
    if args.video is not None:
        return Video(args.video)
    if args.webcam is not None:
        return Camera(args.webcam)
    return Pictures(args.input, recursive=args.recursive)


def _open_sinks(
    args: argparse.Namespace, source: Pictures | Video | Camera, read: Sequence[Path]
) -> Iterator[Sink]:
    if not args.output:
        pass
    elif isinstance(source, Pictures):
        targets = plan_pictures(args.output, source.pictures)
        refuse_overwriting(targets, read)
        yield PictureFiles(targets)
    else:
        path = plan_video(args.output, source.files[0].stem if source.files else "camera")
        refuse_overwriting([path], read)
        yield VideoFile(path, fps=source.fps, codec=args.codec)
    if args.show:
        yield Window(wait=isinstance(source, Pictures))


def _conclude(source: Pictures | Video | Camera, outcome: Outcome) -> int:
    """Say what was done, and return the exit status."""
    of = f" of {source.total}" if source.total else ""
    found = "" if outcome.objects is None else f", {counted(outcome.objects, 'objects')} shown"
    print(f"Done: {outcome.done}{of} {source.unit}s{found}.", end="")
    print(f" Not read: {outcome.skipped}, named above." if outcome.skipped else "")
    if outcome.done and outcome.objects == 0:
        print("To show more, lower --score-threshold or name more --classes.")
    if outcome.interrupted and not isinstance(source, Camera):
        return CTRL_C
    return 1 if outcome.skipped else 0
