# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the page of a run, as one file that needs no other file."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from ..atomic import atomic_write
from ..data import register_digits
from ..data.check.crowding import DEFAULT_LIMIT
from ..data.own import OwnDataSet, register_own_data
from ..drawing.curves import SCORES
from ..engine.detection_limit import evaluated_detections
from ..errors import UserFileNotFoundError, UserValueError
from ..made import refuse_foreign
from .average_precision import METRICS, AveragePrecision, evaluate
from .detections import Detections, read_detections
from .figures import draw_precision_recall, draw_training, sparkline
from .images import Tile, draw_tile
from .matching import MIN_IOU, ImageMatches, confusion_matrix, match_images, rank_images
from .run_folder import MissingPart, Results, RunFolder, read_run

logger = logging.getLogger(__name__)

_TASKS = {"bbox": "Boxes", "segm": "Masks", "keypoints": "Keypoints"}
# The evaluations of a data set, by the suffix of their tasks and folders.
_EVALUATIONS = {
    "": "",
    "_TTA": ", with test-time augmentation",
    "_EMA": ", with the average of the weights",
}
_NUM_IMAGES = 6  # pictures of the best images, and as many of the worst
_NUM_CONFUSIONS = 8
_MANY_CLASSES = 24  # further curves are hidden until the reader opens them


@dataclass(frozen=True)
class _Table:
    columns: Sequence[str]
    rows: list[tuple[str, list[str]]]  # the name of a row, and its cells


@dataclass(frozen=True)
class _Precision:
    """The average precision of a task, in the form that the page shows."""

    title: str
    table: _Table
    figure: Markup
    sparklines: list[tuple[str, str, list[str]]]  # class, AP50, three polylines


@dataclass(frozen=True)
class _Confusion:
    names: list[str]
    counts: list[list[int]]
    shares: list[list[int]]  # percent for each cell of the row
    most_frequent: list[tuple[str, str, int]]


@dataclass
class _Evaluation:
    """An evaluation on a data set, in the form that the page shows. ``missing`` says why a part is
    not there."""

    title: str
    missing: str = ""
    notes: list[str] = field(default_factory=list)
    recorded: _Table | None = None
    precision: list[_Precision] = field(default_factory=list)
    confusion: _Confusion | None = None
    best: list[Tile] = field(default_factory=list)
    worst: list[Tile] = field(default_factory=list)


def write_page(folder: Path, output: Path | None = None, *, score_threshold: float = 0.5) -> Path:
    """Write a page about a run. A sentence says which files the run did not leave.

    The data sets of ``DATASETS.TEST`` have to be registered, or be in the config's
    ``DATASETS.OWN``. The digits and Detectron2's data sets are registered.

    Args:
        folder: ``OUTPUT_DIR`` of a run, finished or not.
        output: by default ``report.html`` in that folder.
        score_threshold: least score of predictions on images and in the confusion matrix;
            average precision takes all.

    Returns:
        the path of the page.

    Raises:
        FileNotFoundError: there is no such folder, or none for the output.
        ValueError: the folder is not the output of a run, the threshold is not from 0 to 1, or the
            page exists, and this package did not make it.
    """
    if not 0 <= score_threshold <= 1:
        raise UserValueError(f"The score threshold is {score_threshold}: it goes from 0 to 1.")
    run = read_run(folder)
    output = output or folder / "report.html"
    if not output.parent.is_dir():
        raise UserFileNotFoundError(
            f"There is no folder {output.parent} to write {output.name} to."
        )
    refuse_foreign([output])
    register_digits()
    own = map(OwnDataSet.from_config, run.setting("DATASETS.OWN", []))
    # The files of --annotations take the place of the data set's files.
    register_own_data([o.to_config() for o in own if o.name not in DatasetCatalog])
    page = _render(run, score_threshold)
    with atomic_write(output) as partial:
        Path(partial).write_text(page, encoding="utf-8", errors="backslashreplace")
    return output


def _render(run: RunFolder, score_threshold: float) -> str:
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = run.results or _last_results(run)
    return environment.get_template("page.html").render(
        run=run,
        title=_title(run),
        status=_describe_status(run),
        headlines=_headlines(results),
        results=_tabulate_results(results),
        training=draw_training(run.series),
        evaluations=[
            _show_evaluation(run, dataset, suffix, score_threshold)
            for suffix in _EVALUATIONS
            for dataset in run.test_sets
            if not suffix or run.predictions_file(dataset, suffix).is_file()
        ],
        score_threshold=score_threshold,
        min_iou=MIN_IOU,
        many_classes=_MANY_CLASSES,
    )


def _title(run: RunFolder) -> str:
    config = run.facts.get("config", "none")
    return Path(config).stem if config != "none" else run.path.resolve().name


def _describe_status(run: RunFolder) -> str:
    planned = run.setting("SOLVER.MAX_ITER")
    if run.facts:
        return ", ".join(run.facts[key] for key in ("kind", "date") if key in run.facts)
    if not run.iterations or not isinstance(planned, int):
        return ""
    if run.iterations >= planned:
        return f"training, {planned} iterations"
    return f"training, not at its end: {run.iterations} of {planned} iterations"


# Recorded results


def _last_results(run: RunFolder) -> Results:
    """Return the results of the last evaluation in metrics.json."""
    results: Results = {}
    for main in (name for name in run.series if name.endswith(SCORES)):
        prefix = main.rpartition("/")[0]
        dataset, _, task = prefix.rpartition("/")
        values = {
            name.removeprefix(f"{prefix}/"): points[-1][1]
            for name, points in run.series.items()
            if name.startswith(f"{prefix}/")
        }
        usual = {name: values.pop(name) for name in METRICS if name in values}
        metrics: dict[str, float | None] = {**usual, **values}  # JSON sorts APl before APm and APs
        dataset = dataset or next(iter(run.test_sets), "")
        results.setdefault(dataset, {})[task] = metrics
    return results


def _headlines(results: Results) -> list[tuple[str, str]]:
    """Return the main metric of each task of the first data set."""
    found = []
    for task, metrics in next(iter(results.values()), {}).items():
        main = next((name for name in ("AP", "PQ", "mIoU", "IoU", "top1") if name in metrics), "")
        if main:
            found.append((f"{_TASKS.get(task, task)}: {main}", _format(metrics[main])))
    return found


def _tabulate_results(results: Results) -> list[_Table]:
    """Make a table for each set of metrics, without metrics of single classes such as
    ``AP-dog``."""
    tables: dict[tuple[str, ...], _Table] = {}
    for dataset, tasks in results.items():
        for task, metrics in tasks.items():
            overall = {name: value for name, value in metrics.items() if "-" not in name}
            table = tables.setdefault(tuple(overall), _Table(list(overall), []))
            heading = f"{_TASKS.get(task, task)}, {dataset}" if dataset else _TASKS.get(task, task)
            table.rows.append((heading, [_format(value) for value in overall.values()]))
    return list(tables.values())


def _tabulate_recorded_classes(tasks: dict[str, dict[str, float | None]]) -> _Table | None:
    columns = {
        _TASKS.get(task, task): {
            name.removeprefix("AP-"): value
            for name, value in metrics.items()
            if name.startswith("AP-")
        }
        for task, metrics in tasks.items()
    }
    columns = {task: values for task, values in columns.items() if values}
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = [(name, [_format(values.get(name)) for values in columns.values()]) for name in names]
    return _Table([f"{task}: AP" for task in columns], rows) if rows else None


def _format(value: object) -> str:
    """Write a metric, or a dash where COCO's is NaN or None, or LVIS's is negative."""
    known = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
    return f"{value:.1f}" if known else "–"


# Evaluations, which are computed anew from the predictions


def _show_evaluation(
    run: RunFolder, dataset: str, suffix: str, score_threshold: float
) -> _Evaluation:
    title = f"{dataset}{_EVALUATIONS[suffix]}"
    others = tuple(other for other in _EVALUATIONS if other not in ("", suffix))
    recorded = {
        task: metrics
        for task, metrics in run.results.get(dataset, {}).items()
        if task.endswith(suffix) and not task.endswith(others)
    }
    try:
        detections = read_detections(run, dataset, suffix)
    except MissingPart as error:
        logger.warning("%s is left out. %s", title, error)
        return _Evaluation(title, missing=str(error), recorded=_tabulate_recorded_classes(recorded))
    shown = _Evaluation(title)
    for task in detections.tasks:
        logger.info("Evaluating %s of %s ...", _TASKS[task].lower(), title)
        api = run.setting("TEST.COCO_API", "auto")
        given = run.setting("TEST.DETECTIONS_PER_IMAGE", DEFAULT_LIMIT)
        limit = evaluated_detections(given, MetadataCatalog.get(dataset))
        found = evaluate(detections, task, api, limit=limit)
        shown.precision.append(_show_precision(found, detections))
        known = recorded.get(task + suffix, {}).get("AP")
        if known is not None and abs(known - found.metrics()["AP"]) > 0.1:
            shown.notes.append(
                f"The predictions are not those of results.json, whose {_TASKS[task].lower()} have "
                f"AP {_format(known)}: an evaluation since then has replaced them."
            )
    logger.info("Drawing images of %s ...", title)
    images = match_images(detections.truth, detections.predictions, min_score=score_threshold)
    shown.confusion = _show_confusion(
        confusion_matrix(images, list(detections.class_names)), detections
    )
    best, worst = _ends(rank_images(images))
    shown.best = [draw_tile(detections, image) for image in best]
    shown.worst = [draw_tile(detections, image) for image in worst]
    return shown


def _ends(ranked: list[ImageMatches]) -> tuple[list[ImageMatches], list[ImageMatches]]:
    """Return the first images, and the last ones from the worst on. No image is in both."""
    first = ranked[: min(_NUM_IMAGES, (len(ranked) + 1) // 2)]
    return first, ranked[len(first) :][-_NUM_IMAGES:][::-1]


def _show_precision(found: AveragePrecision, detections: Detections) -> _Precision:
    overall, curves = found.metrics(), found.curves()
    rows = [("all classes", _cells(sum(found.counts.values()), overall.values()))]
    sparklines = []
    for category_id, name in detections.class_names.items():
        metrics = found.metrics(category_id)
        rows.append((name, _cells(found.counts[category_id], metrics.values())))
        if found.counts[category_id]:
            lines = found.curves(category_id).values()
            points = [sparkline(found.recalls, values) for values in lines]
            sparklines.append((name, _format(metrics["AP50"]), points))
    measure = "OKS" if found.task == "keypoints" else "IoU"
    names = {"AP50": f"{measure} .50", "AP75": f"{measure} .75", "AP": f"{measure} .50–.95"}
    labels = [f"{names[name]} (AP {_format(overall[name])})" for name in curves]
    return _Precision(
        title=_TASKS[found.task],
        table=_Table(["objects", *overall], rows),
        figure=draw_precision_recall(found.recalls, curves, labels),
        sparklines=sparklines,
    )


def _cells(count: int, values: Iterable[float]) -> list[str]:
    return [f"{count:,}", *(_format(value) for value in values)]


def _show_confusion(matrix: NDArray[np.int64], detections: Detections) -> _Confusion:
    """Leave out the classes that neither occur nor are predicted."""
    background = len(matrix) - 1
    used = [k for k in range(background) if matrix[k].any() or matrix[:, k].any()]
    used.append(background)
    names = [*detections.class_names.values(), "background"]
    counts = matrix[np.ix_(used, used)]
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    between = [
        (names[i], names[j], int(matrix[i, j]))
        for i, j in np.argwhere(matrix)
        if i != j and background not in (i, j)
    ]
    return _Confusion(
        names=[names[k] for k in used],
        counts=counts.tolist(),
        shares=np.rint(100 * counts / totals).astype(int).tolist(),
        most_frequent=sorted(between, key=lambda item: -item[2])[:_NUM_CONFUSIONS],
    )
