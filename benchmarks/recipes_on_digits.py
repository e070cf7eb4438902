#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes compared on the digits: SGD and AdamW with and without the average of the weights, FCOS
and GFL, a student with and without a teacher. The runs of a table see the same number of images.

    python benchmarks/recipes_on_digits.py --work output/recipes_on_digits

Run from the repository's root. The script does not repeat the trainings that it finds finished in
the folder of --work.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from seeded_runs import Run, describe, experiment_parser, mean_and_spread, read_run, run_all_once
from tabulate import tabulate

from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.engine import load_config
from vovnet_d2.timing import write_csv

STUDENT = "configs/Digits/mask_rcnn_V_19_slim_eSE_half_FPN.yaml"
TEACHER = "configs/Digits/mask_rcnn_V_39_eSE_FPN_128.yaml"
EMA = {"SOLVER.EMA": 0.99}
SGD = {"SOLVER.OPTIMIZER": "SGD", "SOLVER.BASE_LR": 0.04, "SOLVER.WEIGHT_DECAY": 0.0001}
TEACHER_ITERATIONS = 1000

Row = dict[str, Any]


class Recipe(NamedTuple):
    """A recipe is trained once with each seed.

    Attributes:
        config: file of the config.
        options: config keys to values that differ from the file's.
        tasks: names in metrics.json of the tasks that are reported.
    """

    config: str
    options: dict[str, object]
    tasks: tuple[str, ...]


BOXES_AND_MASKS = ("bbox", "segm", "bbox_EMA", "segm_EMA")
RECIPES = {
    "SGD": Recipe(STUDENT, SGD | EMA, BOXES_AND_MASKS),
    "AdamW": Recipe(STUDENT, EMA, BOXES_AND_MASKS),
    "AdamW with a teacher": Recipe(STUDENT, EMA, BOXES_AND_MASKS),
    "FCOS": Recipe("configs/Digits/fcos_V_19_slim_eSE_half_FPN.yaml", {}, ("bbox",)),
    "GFL": Recipe("configs/Digits/gfl_V_19_slim_eSE_half_FPN.yaml", {}, ("bbox",)),
}


def main() -> None:
    parser = experiment_parser(__file__, __doc__, "results.csv and README.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    args = parser.parse_args()
    teacher, rows = run_all(args)
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "results.csv") as partial:
        write_csv(partial, rows)
    report = write_report(args, teacher, rows)
    write_text(args.output / "README.md", report)
    print(report)


def run_all(args: argparse.Namespace) -> tuple[Row, list[Row]]:
    """Train everything that is not finished.

    Returns:
        the teacher's AP of boxes and masks, and a row of results for each recipe, seed and task.
    """
    options = {"SEED": 1, "SOLVER.MAX_ITER": TEACHER_ITERATIONS}
    teacher = Run("train_net", TEACHER, args.work / "teacher", options)
    run_all_once([teacher])
    taught = {
        "DISTILLATION.TEACHER": teacher.output_dir / "config.yaml",
        "DISTILLATION.WEIGHTS": teacher.output_dir / "model_final.pth",
    }
    runs = {}
    for seed in args.seeds:
        for name, recipe in RECIPES.items():
            folder = args.work / f"{name.replace(' ', '_')}_{seed}"
            of_teacher = taught if name.endswith("teacher") else {}
            options = {"SEED": seed, **recipe.options, **of_teacher}
            runs[name, seed] = Run("train_net", recipe.config, folder, options)
    run_all_once(list(runs.values()), args.jobs)
    rows = [
        {"recipe": name, "seed": seed, "task": task, "AP": last_ap(run, task)}
        for (name, seed), run in runs.items()
        for task in RECIPES[name].tasks
    ]
    return {task: last_ap(teacher, task) for task in ("bbox", "segm")}, rows


def last_ap(run: Run, task: str) -> float:
    iterations = int(run.options.get("SOLVER.MAX_ITER") or load_config(run.config).SOLVER.MAX_ITER)
    return read_run(run.output_dir, {}, iterations, {f"{task}/AP": "AP"})[-1]["AP"]


def write_report(args: argparse.Namespace, teacher: Row, rows: list[Row]) -> str:
    def aps(recipe: str, task: str) -> str:
        values = [r["AP"] for r in rows if (r["recipe"], r["task"]) == (recipe, task)]
        return mean_and_spread(values) if values else "–"

    table = [[name, *(aps(name, task) for task in BOXES_AND_MASKS)] for name in RECIPES]
    headers = ["recipe", "box AP", "mask AP", "box AP of the average", "mask AP of the average"]
    cfg = load_config(STUDENT)
    images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    protocol = {
        "network": f"{STUDENT} and the FCOS and GFL files of the same folder with the same "
        f"backbone; from scratch; {cfg.SOLVER.MAX_ITER} iterations ({images:,} images) for all",
        "SGD": f"learning rate {SGD['SOLVER.BASE_LR']}, momentum {cfg.SOLVER.MOMENTUM}, decay "
        f"{SGD['SOLVER.WEIGHT_DECAY']}; AdamW: {cfg.SOLVER.BASE_LR}, {cfg.SOLVER.WEIGHT_DECAY}. "
        "Both with the cosine schedule and its warm-up. The learning rates were not searched for",
        "average": f"SOLVER.EMA {EMA['SOLVER.EMA']}, of the same trainings",
        "teacher": f"{TEACHER}, {TEACHER_ITERATIONS} iterations: box AP {teacher['bbox']:.1f}, "
        f"mask AP {teacher['segm']:.1f}",
        "data": "200 images of digits_val, whose digits are not in the training set",
        "seeds": f"{', '.join(map(str, args.seeds))}; mean ± sample standard deviation",
    }
    return "\n\n".join(
        [
            "# Recipes on the digits",
            tabulate(table, headers, tablefmt="pipe", disable_numparse=True),
            describe(protocol) + "\n",
        ]
    )


if __name__ == "__main__":
    main()
