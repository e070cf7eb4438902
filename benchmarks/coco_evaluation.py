# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""COCO evaluation by each choice of TEST.COCO_API, timed in turn on the same predictions: random
truth, and detections that are the truth moved about, mistaken for other classes, or invented.

    python benchmarks/coco_evaluation.py --output benchmarks/coco_evaluation
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.engine import build_evaluator, load_config
from vovnet_d2.timing import describe_environment, ratios, time_interleaved, write_csv

CLASSES, TRUTH_PER_IMAGE, HEIGHT, WIDTH = 80, 7, 480, 640  # as COCO's validation images, roughly
APIS = ("pycocotools", "faster-coco-eval")
NAME = "random_coco"


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are timed")
    return parser


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return boxes of all of COCO's sizes, with sides from 6 to 400 pixels: (count, 4), XYXY."""
    sides = np.exp(rng.uniform(np.log(6), np.log(400), (count, 2)))
    centres = rng.uniform(0, 1, (count, 2)) * (WIDTH, HEIGHT)
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    return boxes.clip(0, (WIDTH, HEIGHT, WIDTH, HEIGHT))


def write_truth(path: Path, images: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the boxes and classes of each image."""
    rng = np.random.default_rng(0)
    truths, annotations = [], []
    for image in range(images):
        count = rng.poisson(TRUTH_PER_IMAGE)
        boxes, classes = random_boxes(rng, count), rng.integers(0, CLASSES, count)
        truths.append((boxes, classes))
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), classes.tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.01),
                }
            )
    content = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(CLASSES)],
    }
    path.write_text(json.dumps(content))
    return truths


def detect(truth: tuple[np.ndarray, np.ndarray], count: int, rng: np.random.Generator) -> Instances:
    """Return detections. Half of them are true boxes, moved by up to a quarter of their sides."""
    boxes, classes = random_boxes(rng, count), rng.integers(0, CLASSES, count)
    scores = rng.uniform(0, 0.7, count)
    if len(truth[0]):
        chosen = rng.integers(0, len(truth[0]), count // 2)
        sides = np.tile(truth[0][chosen, 2:] - truth[0][chosen, :2], 2)
        copies = len(chosen)
        boxes[:copies] = truth[0][chosen] + rng.uniform(-0.25, 0.25, (copies, 4)) * sides
        right = rng.random(copies) < 0.7
        classes[:copies][right] = truth[1][chosen][right]
        scores[:copies] += 0.3
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
    instances.pred_classes = torch.as_tensor(classes)
    instances.scores = torch.as_tensor(scores, dtype=torch.float32)
    return instances


def make_evaluators(args: argparse.Namespace, folder: Path) -> dict[str, COCOEvaluator]:
    """Return an evaluator for each API. The first one holds the predictions."""
    truths = write_truth(folder / "truth.json", args.images)
    register_coco_instances(NAME, {}, str(folder / "truth.json"), str(folder))
    MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id = {i: i for i in range(CLASSES)}
    MetadataCatalog.get(NAME).thing_classes = [f"class {i}" for i in range(CLASSES)]
    evaluators = {}
    for api in APIS:
        options = ["DATASETS.TEST", str((NAME,)), "OUTPUT_DIR", str(folder / api)]
        evaluators[api] = build_evaluator(load_config("", [*options, "TEST.COCO_API", api]), NAME)
        evaluators[api].reset()
    rng = np.random.default_rng(1)
    for index, truth in enumerate(truths):
        output = {"instances": detect(truth, args.detections, rng)}
        evaluators[APIS[0]].process([{"image_id": index}], [output])
    return evaluators


def evaluate_in_turn(
    evaluators: dict[str, COCOEvaluator], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the seconds of each round, and the results."""
    saved = pickle.dumps(evaluators[APIS[0]]._predictions)
    results: dict[str, Any] = {}
    cases = {api: lambda api=api: results.update({api: evaluators[api].evaluate()}) for api in APIS}
    times: dict[str, list[float]] = {api: [] for api in APIS}
    for _ in range(repeats):
        for evaluator in evaluators.values():
            evaluator._predictions = pickle.loads(saved)  # an evaluation changes them
        for api, seconds in time_interleaved(cases, device="cpu", warmup=0, repeats=1).items():
            times[api] += seconds
    return times, results


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference in points of AP, over all metrics and classes."""
    if {k: one[k].keys() for k in one} != {k: other[k].keys() for k in other}:
        raise ValueError("The two results do not have the same metrics.")
    values, others = ([r[task][name] for task in one for name in one[task]] for r in (one, other))
    if not np.array_equal(np.isnan(values), np.isnan(others)):
        raise ValueError("A metric is a number in one of the two results alone.")
    return float(np.nanmax(np.abs(np.subtract(values, others))))


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        evaluators = make_evaluators(args, Path(folder))
        times, results = evaluate_in_turn(evaluators, args.repeats)
    rows = []
    for api in APIS:
        relative = ratios(times[api], times[APIS[0]])
        rows.append(
            {
                "TEST.COCO_API": api,
                "seconds": round(median(times[api]), 2),
                "of pycocotools' time": round(median(relative), 3),
                "least": round(min(relative), 3),
                "most": round(max(relative), 3),
                "box AP": round(results[api]["bbox"]["AP"], 4),
                "largest difference": f"{largest_difference(results[api], results[APIS[0]]):.1e}",
            }
        )
    protocol = describe_environment("cpu") | {
        "faster-coco-eval": version("faster-coco-eval"),
        "pycocotools": version("pycocotools"),
        "data": f"{args.images} images of {HEIGHT}x{WIDTH} with {TRUTH_PER_IMAGE} random boxes of "
        f"{CLASSES} classes on average, and {args.detections} detections each",
        "time": "of COCOEvaluator.evaluate(), its files included; median",
        "repeats": f"{args.repeats} rounds of both; no warm-up",
        "difference": "in points of AP, over all metrics and classes",
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "times.csv") as partial:
        write_csv(partial, rows, protocol)
    lines = ["# COCO evaluation by pycocotools and by faster-coco-eval", ""]
    lines += [tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True), ""]
    lines += [f"- {name}: {value}" for name, value in protocol.items()]
    write_text(args.output / "README.md", "\n".join(lines) + "\n")
    print(*lines[2:], sep="\n")


if __name__ == "__main__":
    main(argument_parser().parse_args())
