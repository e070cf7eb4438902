# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The tools as functions of a data set, and the outcome of a call."""

import contextlib
import hashlib
import io
import json
import logging
import re
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import check_dataset
import convert_weights
import export_model
import report
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.logger import setup_logger
from engine_runs import FASTER_RCNN, MASK_RCNN, TINY, quick
from input_kinds import FOUND, REFUSED, WORKS, Data
from test_lazyconfig import TINY as LAZY_TINY

from vovnet_d2 import Predictor
from vovnet_d2.demo import main as demo
from vovnet_d2.drawing import sheet
from vovnet_d2.engine import argument_parser, run
from vovnet_d2.engine.data_pictures_command import main as visualize_data
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.engine.lazy import lazy_argument_parser
from vovnet_d2.engine.lazy import run as run_lazy

MOST_SECONDS, MOST_MEGABYTES = 60, 400

LAZY = {
    False: "lazy/COCO-Detection/faster_rcnn_V_39_eSE_FPN_1x.py",
    True: "lazy/COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.py",
}
SHORT = ["SOLVER.MAX_ITER", "2", "MODEL.DEVICE", "cpu"]


@dataclass
class Setting:
    """Settings for the run of a tool.

    Attributes:
        folder: the folder to write to.
        masks: True if the networks learn masks.
        trained: the folder of the training on the good data.
        options: keys and values of the config.
        file: the weights to use. By default they are the weights of that training.
        pictures: True if runs draw pictures for their reports.
    """

    folder: Path
    masks: bool
    trained: Path
    options: tuple[str, ...] = ()
    file: str = ""
    pictures: bool = False

    @property
    def config(self) -> str:
        return MASK_RCNN if self.masks else FASTER_RCNN

    @property
    def weights(self) -> str:
        return self.file or str(self.trained / "model_final.pth")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a tool.

    Attributes:
        kind: WORKS, FOUND or REFUSED, or a description of a fault.
        text: all printed text.
        result: the result of the tool, in a form that tests can compare.
    """

    kind: str
    text: str
    result: Any = None


def attempt(tool: Callable[[Data, Setting], Any], data: Data, setting: Setting) -> Outcome:
    """Call a tool, and return the outcome."""
    forget()
    text = io.StringIO()
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    result: Any = None
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            with quick(pictures=setting.pictures), small_sheets():
                result, status = tool(data, setting), 0
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
            status = -1
    forget()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    told = text.getvalue()
    kind = _classify(told, status)
    if time.monotonic() - start > MOST_SECONDS:
        kind = f"takes {time.monotonic() - start:.0f} s"
    if grown > MOST_MEGABYTES:
        kind = f"takes {grown:.0f} MB"
    return Outcome(kind, told, result)


@contextlib.contextmanager
def small_sheets() -> Iterator[None]:
    """Draw sheets of pictures with a quarter of the usual pixels."""
    half = {name: getattr(sheet, name) / 2 for name in ("_WIDTH", "_SHORT_SIDE")}
    with mock.patch.multiple(sheet, **half):
        yield


def forget() -> None:
    """Remove the data sets and the log handlers of the last tool."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "vovnet_d2"):
        logging.getLogger(name).handlers.clear()


def _classify(text: str, status: Any) -> str:
    if "Traceback" in text:
        return "traceback: " + text.strip().splitlines()[-1][:200]
    if status == 0:
        return WORKS
    if status == 1:
        return FOUND
    sentences = re.findall("^error: .*", text, re.MULTILINE)
    if status == 2 and len(sentences) == 1 and text.rstrip().endswith(sentences[0].rstrip()):
        return REFUSED
    return f"status {status} with {len(sentences)} sentences"


def last_sentence(outcome: Outcome) -> str:
    return outcome.text.strip().rpartition("\n")[2]


# The tools ----------------------------------------------------------------------------------------


def own_flags(data: Data, *splits: str) -> list[str]:
    words = []
    for split in splits:
        words += [f"--{split}-json", str(data.path(split)), f"--{split}-images", str(data.images)]
    return words


def train(data: Data, setting: Setting) -> Any:
    return _train(data, setting, setting.folder / "train")


def _train(data: Data, setting: Setting, out: Path) -> Any:
    words = ["--config-file", setting.config, *own_flags(data, "train", "val"), *TINY, *SHORT]
    words += ["OUTPUT_DIR", str(out), *setting.options]
    results = run_or_exit(run, argument_parser().parse_args(words))
    return digest(out / "model_final.pth"), in_order(results)


def in_order(results: Any) -> str:
    """Return results as text in a fixed order of categories. As text, NaN equals NaN."""
    return str({task: sorted(metrics.items()) for task, metrics in results.items()})


def digest(weights: Path) -> str:
    content = torch.load(weights, weights_only=False)
    model = content.get("model", content)
    tensors = (value for value in model.values() if isinstance(value, torch.Tensor))
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def train_lazy(data: Data, setting: Setting) -> Any:
    for split in ("train", "val"):
        register_coco_instances(split, {}, str(data.path(split)), str(data.images))
    out = setting.folder / "lazy"
    options = [o for o in LAZY_TINY if setting.masks or "mask_head" not in o]
    options += ["train.max_iter=2", f"train.output_dir={out}", "model.roi_heads.num_classes=3"]
    options += ["dataloader.train.dataset.names=train", "dataloader.test.dataset.names=val"]
    words = ["--config-file", LAZY[setting.masks], *options]
    results = run_or_exit(run_lazy, lazy_argument_parser().parse_args(words))
    return digest(out / "model_final.pth"), in_order(results)


def evaluate(data: Data, setting: Setting) -> Any:
    words = ["--config-file", str(setting.trained / "config.yaml"), "--eval-only"]
    words += [*own_flags(data, "val"), "MODEL.WEIGHTS", setting.weights, *setting.options]
    words += ["OUTPUT_DIR", str(setting.folder / "evaluated")]
    results = run_or_exit(run, argument_parser().parse_args(words))
    found = (setting.folder / "evaluated/inference/coco_instances_results.json").read_text()
    return [(p["bbox"], p["score"]) for p in json.loads(found)], in_order(results)


def check(data: Data, setting: Setting, *words: str) -> Any:
    words = (*own_flags(data, "train", "val"), *(["--masks"] if setting.masks else []), *words)
    status = check_dataset.main(list(words))
    if status:
        raise SystemExit(status)


def fix(data: Data, setting: Setting) -> Any:
    """Fix a data set, and train on the result if there is one."""
    fixed = Data.__new__(Data)
    fixed.folder, fixed.images, fixed.raw = setting.folder / "fixed", data.images, {}
    fixed.folder.mkdir()
    with contextlib.suppress(SystemExit):
        check(data, setting, "--fix", *(str(fixed.path(split)) for split in ("train", "val")))
    if not fixed.path("train").exists():
        raise SystemExit(2)
    check(fixed, setting)
    forget()
    return _train(fixed, setting, setting.folder / "trained_on_fixed")


def draw(data: Data, setting: Setting) -> Any:
    for what in ("annotations", "training"):
        out = setting.folder / f"{what}.png"
        words = [what, str(out), "--config-file", setting.config, *own_flags(data, "train")]
        visualize_data([*words, "--opts", *TINY, *SHORT, *setting.options])
        forget()


def run_demo(data: Data, setting: Setting) -> Any:
    words = ["--config-file", str(setting.trained / "config.yaml"), "--input", str(data.images)]
    words += ["--recursive", "--output", str(setting.folder / "drawn"), "--score-threshold", "0"]
    words += ["--json", str(setting.folder / "found.json")]
    try:
        demo([*words, "--opts", "MODEL.WEIGHTS", setting.weights])
    except SystemExit as error:
        if error.code:
            raise
    found = json.loads((setting.folder / "found.json").read_text())
    return [(result["bbox"], result["score"]) for result in found]


def predict(data: Data, setting: Setting) -> Any:
    def call(_: None) -> Any:
        config = str(setting.trained / "config.yaml")
        predictor = Predictor(config, setting.weights)
        found = predictor([p for p in sorted(data.images.rglob("*")) if p.is_file()])
        return [prediction["instances"].scores.tolist() for prediction in found]

    return run_or_exit(call, None)


def write_report(data: Data, setting: Setting) -> Any:
    folder = setting.folder / "evaluated"
    if not (folder / "inference").is_dir():  # the evaluation was refused
        return None
    (page := folder / "report.html").unlink(missing_ok=True)
    run_or_exit(report.run, report.argument_parser().parse_args([str(folder)]))
    assert page.stat().st_size > 10_000
    return None


def export(data: Data, setting: Setting) -> Any:
    """Export a network, and compare it on the images."""
    words = ["--config-file", str(setting.trained / "config.yaml"), "--part", "backbone"]
    words += ["--format", "torchscript", "--output", str(setting.folder / "exported"), "--images"]
    words += [str(p) for p in sorted(data.images.rglob("*")) if p.is_file()][:2]
    return run_or_exit(
        export_model.run,
        export_model.argument_parser().parse_args(
            [*words, "--opts", "MODEL.WEIGHTS", setting.weights]
        ),
    )


def convert(data: Data, setting: Setting) -> Any:
    out = setting.folder / "converted.pth"
    words = [setting.weights, str(out), "--to", "native"]
    run_or_exit(convert_weights.run, convert_weights.argument_parser().parse_args(words))
    return digest(out)


WEIGHTS_TOOLS = {
    "evaluate": evaluate,
    "demo": run_demo,
    "Predictor": predict,
    "export": export,
    "convert": convert,
}
TOOLS: dict[str, Callable[[Data, Setting], Any]] = {
    "train": train,
    "lazy": train_lazy,
    "evaluate": evaluate,
    "check": check,
    "fix": fix,
    "draw": draw,
    "demo": run_demo,
    "Predictor": predict,
    "report": write_report,
    "export": export,
}
