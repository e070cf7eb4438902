# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The report page of a run. Its numbers are compared with pycocotools and a second computation.
Other tests check the parts of the page, and pages of incomplete runs. test_report_page.py opens the
page in a browser."""

import json
import math
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import report
import yaml
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from report_runs import CLASSES, CONFIG, DATASET, SECTIONS, make_shapes, write_run
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.report import average_precision, figures, register_files, write_page
from vovnet_d2.report import page as page_module
from vovnet_d2.report.average_precision import AveragePrecision, evaluate
from vovnet_d2.report.detections import Detections, read_detections
from vovnet_d2.report.figures import _thin, draw_training, sparkline
from vovnet_d2.report.images import draw_tile, judge
from vovnet_d2.report.matching import ImageMatches, confusion_matrix, match_images, rank_images
from vovnet_d2.report.run_folder import read_run

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.usefixtures("equal_curves_are_drawn_once")

HOSTILE = "</script><script>alert('1')</script><img src=x onerror=alert(2)>"


@pytest.fixture
def run(catalogs: None, tmp_path: Path) -> Path:
    return write_run(tmp_path)


class Reader(HTMLParser):
    """Parser of the elements and attributes of a page, and of its visible text by heading."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {"": ""}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in ("h2", "h3"):
            self.sections["?"] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass
        if tag in ("h2", "h3"):
            self.sections[self.sections.pop("?").strip()] = ""

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.sections[list(self.sections)[-1]] += f"{data} "

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.sections.values()).split())


def read_page(run: Path) -> Reader:
    return Reader(write_page(run).read_text())


# Average precision


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    truth, predictions = make_shapes(CLASSES)
    path = tmp_path_factory.mktemp("shapes") / "truth.json"
    path.write_text(json.dumps(truth))
    return path, predictions


@pytest.fixture(scope="module", params=["bbox", "segm", "keypoints"])
def found(shapes: tuple[Path, list[dict]], request: pytest.FixtureRequest) -> AveragePrecision:
    path, predictions = shapes
    return evaluate(Detections(COCO(path), predictions, {}), request.param)


def summarize(shapes: tuple[Path, list[dict]], task: str, category: int | None) -> list[float]:
    """Return AP, AP50, AP75 and the AP by size from pycocotools."""
    path, predictions = shapes
    truth = COCO(path)
    unused = {"segm": "bbox"}.get(task)  # without it, pycocotools would use areas of masks
    kept = [{k: v for k, v in p.items() if k != unused} for p in predictions]
    theirs = COCOeval(truth, truth.loadRes(kept), task)
    if category is not None:
        theirs.params.catIds = [category]
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    return [100 * v if v >= 0 else math.nan for v in theirs.stats[: 5 if "key" in task else 6]]


@pytest.mark.parametrize("category", [None, *CLASSES])
def test_metrics_equal_those_of_pycocotools(
    shapes: tuple[Path, list[dict]], found: AveragePrecision, category: int | None
) -> None:
    """Compare metrics with pycocotools, and the areas below the curves with these metrics."""
    metrics, theirs = found.metrics(category), summarize(shapes, found.task, category)
    assert list(metrics.values()) == pytest.approx(theirs, nan_ok=True, abs=1e-9)
    assert 0 < metrics["AP"] < metrics["AP50"] < 100
    curves = found.curves(category)
    assert [curves[name].shape for name in ("AP", "AP50", "AP75")] == [found.recalls.shape] * 3
    areas = [100 * curves[name].mean() for name in ("AP", "AP50", "AP75")]
    assert areas == pytest.approx(theirs[:3])
    for values in curves.values():
        assert (np.diff(values) <= 1e-12).all() or category is None


@pytest.mark.parametrize(
    ("api", "installed", "package"),
    [
        ("auto", True, "faster_coco_eval"),
        ("faster-coco-eval", True, "faster_coco_eval"),
        ("pycocotools", True, "pycocotools"),
        ("auto", False, "pycocotools"),
        ("faster-coco-eval", False, "pycocotools"),  # for a run on another machine
    ],
)
def test_the_page_uses_the_api_of_the_run(
    shapes: tuple[Path, list[dict]],
    monkeypatch: pytest.MonkeyPatch,
    api: str,
    installed: bool,
    package: str,
) -> None:
    pytest.importorskip("faster_coco_eval")
    monkeypatch.setattr(average_precision, "has_faster_coco", lambda: installed)
    used, plain = [], average_precision._evaluate_predictions_on_coco

    def look(*args: Any, cocoeval_fn: type, **words: Any) -> Any:
        used.append(cocoeval_fn)
        return plain(*args, cocoeval_fn=cocoeval_fn, **words)

    monkeypatch.setattr(average_precision, "_evaluate_predictions_on_coco", look)
    path, predictions = shapes
    found = evaluate(Detections(COCO(path), predictions, {}), "segm", api)
    assert (used == [COCOeval]) == (package == "pycocotools")
    assert found.metrics()["AP"] == pytest.approx(summarize(shapes, "segm", None)[0], abs=1e-9)


def test_objects_are_counted_without_crowds(found: AveragePrecision) -> None:
    assert sum(found.counts.values()) == 4 * 8 - 1


def test_objects_without_keypoints_are_not_counted_for_keypoints() -> None:
    annotations = [{"keypoints": [5, 5, 2], "num_keypoints": 1}]
    annotations += [
        {"keypoints": [0, 0, 0], "num_keypoints": 0},
        {"iscrowd": 1, "num_keypoints": 1},
    ]
    anns = {i: {"category_id": 4} | each for i, each in enumerate(annotations)}
    detections: Any = SimpleNamespace(truth=SimpleNamespace(cats={4: {}}, anns=anns))
    assert average_precision._count_objects(detections, "keypoints") == {4: 1}
    assert average_precision._count_objects(detections, "bbox") == {4: 2}


def test_a_class_without_objects(shapes: tuple[Path, list[dict]]) -> None:
    path, predictions = shapes
    truth = COCO(path)
    truth.dataset["categories"].append({"id": 9, "name": "absent"})
    truth.createIndex()
    found = evaluate(Detections(truth, predictions, {}), "bbox")
    assert all(map(math.isnan, found.metrics(9).values()))
    assert found.metrics()["AP"] == pytest.approx(summarize(shapes, "bbox", None)[0])


def test_classes_are_in_the_order_of_their_ids() -> None:
    truth = COCO()
    truth.cats = {7: {"name": "c"}, 2: {"name": "a"}, 5: {"name": "b"}}
    found = Detections(truth, [], {}).class_names
    assert list(found.items()) == [(2, "a"), (5, "b"), (7, "c")]


# Matching


def coco_of(annotations: list[dict], images: int = 1) -> COCO:
    truth = COCO()
    annotations = [
        {"id": i, "image_id": 1, "iscrowd": 0, **a} for i, a in enumerate(annotations, start=1)
    ]
    truth.dataset = {
        "images": [{"id": i} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in (1, 2)],
    }
    truth.createIndex()
    return truth


def item(category: int, x: float, width: float = 10, **more: float) -> dict:
    """Return an item from left to right that is 10 pixels high and at the top."""
    return {"image_id": 1, "category_id": category, "bbox": [x, 0, width, 10], **more}


def matrix_of(truths: list[dict], predictions: list[dict], min_score: float = 0.5) -> list:
    images = match_images(coco_of(truths), predictions, min_score=min_score)
    return confusion_matrix(images, [1, 2]).tolist()


@pytest.mark.parametrize(
    ("truths", "predictions", "expected"),
    [
        # One object is right, and one is confused with the other class.
        ([item(1, 0), item(2, 50)], [item(1, 1, score=0.9), item(1, 50, score=0.6)], "100 / 100 /"),
        # One object is missed, and one prediction has no object. The first IoU is only 4 / 16.
        ([item(1, 0)], [item(1, 6, score=0.9)], "001 // 100"),
        ([item(2, 0)], [item(2, 0, score=0.4)], "/ 001 /"),
        ([], [item(2, 0, score=0.5)], "// 010"),
        # The overlap decides, and neither the score nor the class.
        ([item(1, 0)], [item(1, 2, score=0.9), item(2, 1, score=0.6)], "010 // 100"),
        # The score decides between equal overlaps.
        ([item(1, 0)], [item(2, 1, score=0.6), item(1, 1, score=0.9)], "100 // 010"),
        # The remaining prediction gets the next best object: first 10 / 10, then 8 / 12.
        (
            [item(1, 0), item(2, 2)],
            [item(1, 0, score=0.9), item(2, 0, score=0.8)],
            "100 / 010 /",
        ),
        # An IoU of exactly 0.5 is enough.
        ([item(1, 0)], [item(1, 0, width=5, score=0.9)], "100 //"),
        # A crowd matches predictions of its class inside it, and is no object to be found.
        (
            [item(1, 0, width=100, iscrowd=1)],
            [item(1, 20, score=0.9), item(1, 40, score=0.9), item(2, 60, score=0.9)],
            "// 010",
        ),
        # A detection that matches a crowd is not counted, and the next detection keeps its match.
        (
            [item(1, 0, width=100, iscrowd=1), item(2, 150)],
            [item(1, 20, score=0.9), item(2, 150, score=0.8)],
            "/ 010 /",
        ),
        # An object in a crowd is matched first.
        ([item(1, 0, width=100, iscrowd=1), item(1, 20)], [item(1, 20, score=0.9)], "100 //"),
    ],
)
def test_confusion_matrix_by_hand(
    truths: list[dict], predictions: list[dict], expected: str
) -> None:
    rows = [row.strip() or "000" for row in expected.split("/")]
    assert matrix_of(truths, predictions) == [[int(digit) for digit in row] for row in rows]


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def label_pairs(truths: list[dict], predictions: list[dict]) -> list[tuple[int, int]]:
    """Match again by brute force: take the best remaining pair until none is good enough."""
    truths, predictions, labels = list(truths), list(predictions), []
    while truths and predictions:
        best = max(
            ((t, p) for t in truths for p in predictions),
            key=lambda x: iou(*(i["bbox"] for i in x)),
        )
        if iou(best[0]["bbox"], best[1]["bbox"]) < 0.5:
            break
        labels.append((best[0]["category_id"], best[1]["category_id"]))
        truths.remove(best[0])
        predictions.remove(best[1])
    background = 99
    labels += [(truth["category_id"], background) for truth in truths]
    return labels + [(background, prediction["category_id"]) for prediction in predictions]


def test_confusion_matrix_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    truths, predictions, labels = [], [], []
    for image in range(1, 41):
        boxes = rng.uniform([0, 0, 20, 20], [60, 60, 60, 60], size=(12, 4)).tolist()
        items = [
            {"image_id": image, "category_id": int(rng.integers(1, 3)), "bbox": box}
            for box in boxes
        ]
        scored = [{**i, "score": float(rng.uniform())} for i in items[6:]]
        truths += items[:6]
        predictions += scored
        labels += label_pairs(items[:6], [p for p in scored if p["score"] >= 0.3])
    images = match_images(coco_of(truths, images=40), predictions, min_score=0.3)
    expected = sklearn_confusion_matrix(*zip(*labels, strict=True), labels=[1, 2, 99])
    assert confusion_matrix(images, [1, 2]).tolist() == expected.tolist()
    assert expected[:2, :2].min() >= 5


def test_images_from_best_to_worst() -> None:
    truths = [item(1, 0), item(1, 50), item(1, 100)]
    cases = {
        # image: (objects, predictions, F1)
        1: (truths[:1], [item(1, 0)], 1),
        2: (truths, truths, 1),  # as good, with more objects
        3: (truths, [item(2, 0)], 0),
        4: ([], [item(2, 0)], 0),  # as bad, with fewer errors
        5: (truths[:2], [item(1, 0)], 2 / 3),
        6: (truths[:2], [item(1, 0), item(2, 50)], 2 / 4),
        7: ([], [], None),
    }
    annotations = [{**t, "image_id": i} for i, (objects, _, _) in cases.items() for t in objects]
    predictions = [
        {**p, "image_id": i, "score": 0.8} for i, (_, found, _) in cases.items() for p in found
    ]
    images = match_images(coco_of(annotations, images=7), predictions, min_score=0.5)
    assert [image.f1 for image in images] == [f1 for _, _, f1 in cases.values()]
    assert [image.image_id for image in rank_images(images)] == [2, 1, 5, 6, 4, 3]
    assert [(i.correct, i.confused, i.missed, i.spurious) for i in images[4:6]] == [
        (1, 0, 1, 0),
        (1, 1, 0, 0),
    ]


@pytest.mark.parametrize(
    ("number", "best", "worst"),
    [
        (30, [0, 1, 2, 3, 4, 5], [29, 28, 27, 26, 25, 24]),
        (9, [0, 1, 2, 3, 4], [8, 7, 6, 5]),
        (1, [0], []),
    ],
)
def test_both_ends_are_shown(number: int, best: list[int], worst: list[int]) -> None:
    images = [ImageMatches(i, [], [], []) for i in range(number)]
    shown = page_module._ends(images)
    assert [[image.image_id for image in end] for end in shown] == [best, worst]


def test_the_most_frequent_confusions_are_named_first() -> None:
    matrix = np.array([[9, 1, 5], [3, 9, 7], [4, 8, 0]])  # the last class is the background
    detections = SimpleNamespace(class_names={1: "a", 2: "b"})
    shown = page_module._show_confusion(matrix, detections)
    assert shown.most_frequent == [("b", "a", 3), ("a", "b", 1)]
    assert shown.shares[0] == [60, 7, 33]  # percentage of the objects of a class


def test_marks_on_a_tile(tmp_path: Path) -> None:
    """Check the positions of marks on a tile of 560 pixels, half the size of the image."""
    Image.new("RGB", (1120, 400), (100, 100, 100)).save(tmp_path / "a.png")
    common = {
        "bbox": [100, 160, 80, 80],
        "image_id": 1,
        "segmentation": [[100.0, 160, 180, 160, 180, 240, 100, 240]],
    }
    thing, found = common | {"category_id": 1}, common | {"category_id": 2, "score": 0.8}
    truth = COCO()
    truth.imgs = {1: {"id": 1, "height": 400, "width": 1120}}
    truth.cats = {1: {"id": 1, "name": "cat"}, 2: {"id": 2, "name": "dog"}}
    detections = Detections(truth, [], {1: str(tmp_path / "a.png")})
    tile = draw_tile(detections, ImageMatches(1, [thing], [found], [(0, 0)]))
    for uri in (tile.truth, tile.predicted):
        pixels = np.array(Image.open(BytesIO(b64decode(uri.partition(",")[2]))))
        assert pixels.shape == (200, 560, 3)
        assert np.abs(pixels[115, 70] - (50 + np.array([240, 228, 66]) / 2)).max() < 6
        assert np.abs(pixels[100, 300] - 100.0).max() < 6
    truth.imgs[1]["width"] = 1000  # the image was replaced
    tile = draw_tile(detections, ImageMatches(1, [thing], [found], [(0, 0)]))
    pixels = np.array(Image.open(BytesIO(b64decode(tile.truth.partition(",")[2]))))
    assert np.abs(pixels[112, 70] - 100.0).max() < 6


def test_labels_of_matches() -> None:
    names = {1: "cat", 2: "dog"}
    cat, dog = {"category_id": 1}, {"category_id": 2, "score": 0.8}
    assert judge(cat, dog, names) == ("confused", "cat: taken for dog")
    assert judge(dog, cat, names) == ("confused", "dog 80%: is cat")
    assert judge(cat, cat | {"score": 0.8}, names) == ("correct", "cat")
    assert judge(cat, None, names) == ("alone", "cat: missed")
    assert judge(dog, None, names) == ("alone", "dog 80%: nothing there")


# The page


def test_page_has_all_parts(run: Path) -> None:
    reader = read_page(run)
    assert [title for title in SECTIONS if title not in reader.sections] == []
    assert "mIoU" in reader.sections["Results"]
    assert "43.2" in reader.sections["Results"]
    assert "python train_net.py" in reader.sections["Run"]
    assert yaml.safe_load(reader.sections["Config"].split("complete")[1].strip()) == {
        **CONFIG,
        "DATASETS": {"TRAIN": [], "TEST": [DATASET]},
    }
    detections = read_detections(read_run(run), DATASET)
    for task in ("bbox", "segm", "keypoints"):
        rows = evaluate(detections, task)
        for value in (rows.metrics()["AP"], rows.metrics(5)["AP50"]):
            assert f"{value:.1f}" in reader.sections["Average precision by class and size"]
    images = [attributes["src"] for tag, attributes in reader.elements if tag == "img"]
    assert len(images) == 2 * 9  # the five best and the four worst
    images = match_images(detections.truth, detections.predictions, min_score=0.5)
    captions = " ".join(f"{reader.sections[f'{end} images']}" for end in ("Best", "Worst"))
    captions = " ".join(captions.split())
    for image in images:
        assert (
            f"{image.correct} correct · {image.confused} of another class · {image.missed} missed "
            f"· {image.spurious} where nothing is"
        ) in captions
    assert any(image.missed != image.spurious for image in images)
    assert not [e for e in reader.elements if e[0] in ("script", "link", "iframe")]


def test_the_matrix_on_the_page(run: Path) -> None:
    reader = read_page(run)
    cells = reader.sections["Confusion matrix"].split("Rows:")[0].split()
    numbers = sorted(int(cell) for cell in cells if cell.isdigit())
    detections = read_detections(read_run(run), DATASET)
    images = match_images(detections.truth, detections.predictions, min_score=0.5)
    matrix = confusion_matrix(images, list(CLASSES))
    assert numbers == sorted(matrix[matrix > 0].tolist())
    shown = page_module._show_confusion(matrix, detections)
    for counts, shares in zip(shown.counts, shown.shares, strict=True):
        total = max(1, sum(counts))  # the annotated objects of a row
        assert shares == [round(100 * count / total) for count in counts]


def test_text_from_outside_is_escaped(catalogs: None, tmp_path: Path) -> None:
    classes = {2: HOSTILE, 5: "{{ 7 * 7 }}", 7: "]]>--><style>"}
    prefix = "<script>alert(3)&amp;<"  # without a slash, which would be a folder
    run = write_run(tmp_path, classes=classes, dataset=f"<i>{HOSTILE}", prefix=prefix)
    facts = {"config": f"{HOSTILE}.yaml", "command": HOSTILE, HOSTILE: "1"}
    content = {"run": facts, "results": {f"<i>{HOSTILE}": {HOSTILE: {"AP": 1, HOSTILE: 2}}}}
    (run / "results.json").write_text(json.dumps(content))
    with (run / "config.yaml").open("a") as file:
        file.write(f"# </pre>{HOSTILE}\n")
    with (run / "metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": 100, f"{HOSTILE}/AP": 5.0, "loss<script>": 1.0}))

    reader = read_page(run)
    tags = {tag for tag, _ in reader.elements}
    assert tags.isdisjoint({"script", "i"})
    # The page has a style element, and each plot has one.
    assert sum(tag == "style" for tag, _ in reader.elements) == 1 + 6
    assert not [a for _, attributes in reader.elements for a in attributes if a.startswith("on")]
    for _, attributes in reader.elements:
        assert (attributes.get("src") or "data:image/jpeg;").startswith("data:image/jpeg;")
    for name in classes.values():
        assert name in reader.sections["Average precision by class and size"]
    for place in ("Run", "Results", "Config"):
        assert HOSTILE in reader.sections[place]
    assert f"{prefix}0.png" in reader.text


def drop(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).write_text(text)

    return change


def evaluated_on(*names: str) -> Callable[[Path], None]:
    return write("config.yaml", yaml.safe_dump({"DATASETS": {"TEST": list(names)}}))


PREDICTIONS = "inference/coco_instances_results.json"


@pytest.mark.parametrize(
    ("change", "sentence", "gone"),
    [
        (drop(PREDICTIONS), f"There is no {PREDICTIONS}", "Confusion matrix"),
        (write(PREDICTIONS, '[{"image_id": 3, "catego'), "may be half written", "Best images"),
        (write(PREDICTIONS, "[]"), "is empty: the network found nothing", "Confusion matrix"),
        (
            write(PREDICTIONS, json.dumps([item(2, 0, score=1)])),
            "is not what was predicted: images or categories",
            "Confusion matrix",
        ),
        (
            write(PREDICTIONS, json.dumps([item(99, 0, score=1) | {"image_id": 3}])),
            "is not what was predicted: images or categories",
            "Confusion matrix",
        ),
        (lambda run: DatasetCatalog.remove(DATASET), "is not known here", "Best images"),
        (drop("../truth.json"), "cannot be read here", "Precision over recall"),
        (drop("config.yaml"), "There is no config.yaml", DATASET),
        (write("config.yaml", "a: [1"), "config.yaml is not a plain YAML", DATASET),
        (write("config.yaml", "A: !!python/tuple [1]"), "config.yaml is not a plain YAML", DATASET),
        (evaluated_on(), "names no data set in DATASETS.TEST", DATASET),
    ],
)
def test_missing_parts_are_named(
    run: Path, change: Callable[[Path], None], sentence: str, gone: str
) -> None:
    change(run)
    reader = read_page(run)
    assert sentence in reader.text
    assert gone not in reader.sections
    assert [title for title in ("Results", "Run", "Config") if title not in reader.sections] == []


def test_missing_records_of_a_run_are_named(run: Path) -> None:
    for change, sentence in (
        (drop("metrics.json"), "There are no curves in metrics.json"),
        (write("metrics.json", '{"iteration": 1, "total_lo'), "There are no curves"),
        (drop("results.json"), "There is no results.json, which a run writes"),
        (write("results.json", '{"run": {'), "results.json cannot be read"),
    ):
        (run / PREDICTIONS).unlink(missing_ok=True)  # evaluation of the file takes long
        change(run)
        reader = read_page(run)
        assert sentence in reader.text
        titles = ("Results", "Run", "Config")
        assert [title for title in titles if title not in reader.sections] == []


def test_a_run_that_is_not_finished(run: Path) -> None:
    drop("results.json")(run)
    rows = [{"iteration": i, "total_loss": math.nan if i < 30 else 1.0} for i in range(19, 80, 20)]
    rows += [{"iteration": 60, "bbox/APl": math.nan, "bbox/AP": 12.34, "bbox/AP-plain": 1.0}]
    write("metrics.json", "\n".join(map(json.dumps, rows)) + '\n{"iterat')(run)
    reader = read_page(run)
    assert "training, not at its end: 80 of 100 iterations" in reader.text
    assert "12.3" in reader.sections["Results"]
    columns = reader.sections["Results"].split("Boxes")[0].split()
    assert columns == ["AP", "APl"]
    assert "Losses" in reader.sections["Training"]
    assert "nan" not in reader.sections["Results"].lower()


def test_recorded_classes_without_the_data(run: Path) -> None:
    metrics = {"AP": 50.0, "AP-cat": 60.0, "AP-a-dog": None}
    content = {"run": {}, "results": {DATASET: {"bbox": metrics, "segm": {"AP-cat": 7.0}}}}
    write("results.json", json.dumps(content))(run)
    DatasetCatalog.remove(DATASET)
    cells = read_page(run).sections["By class, as results.json has it"].split()
    assert cells == ["Boxes:", "AP", "Masks:", "AP", "cat", "60.0", "7.0", "a-dog", "–", "–"]


@pytest.mark.parametrize(("change", "told"), [(0.0, False), (5.0, True)])
def test_predictions_of_another_evaluation_are_noted(run: Path, change: float, told: bool) -> None:
    found = evaluate(read_detections(read_run(run), DATASET), "segm").metrics()["AP"]
    content = {"run": {}, "results": {DATASET: {"segm": {"AP": found + change}}}}
    write("results.json", json.dumps(content))(run)
    assert ("are not those of results.json" in read_page(run).text) is told


def test_several_data_sets_and_augmentation(run: Path) -> None:
    evaluated_on(DATASET, "gone")(run)
    for folder in ("inference", "inference_TTA"):
        (run / folder / DATASET).mkdir(parents=True)
        text = json.dumps(make_shapes(CLASSES)[1])
        (run / folder / DATASET / "coco_instances_results.json").write_text(text)
    reader = read_page(run)
    assert "gone" in reader.sections
    assert f"{DATASET}, with test-time augmentation" in reader.sections
    assert "There is no inference/gone/coco_instances_results.json" in reader.text


def test_averaged_weights_have_their_own_section(run: Path) -> None:
    results = {"bbox": {"AP-cat": 50.0}, "bbox_EMA": {"AP-cat": 70.0}}
    write("results.json", json.dumps({"run": {}, "results": {DATASET: results}}))(run)
    DatasetCatalog.remove(DATASET)
    table = "By class, as results.json has it"
    assert read_page(run).sections[table].split() == ["Boxes:", "AP", "cat", "50.0"]
    (run / "inference_EMA").mkdir()
    (run / "inference_EMA" / "coco_instances_results.json").write_text("[]")
    reader = read_page(run)
    assert f"{DATASET}, with the average of the weights" in reader.sections
    assert "70.0" in reader.text


def test_a_missing_image(run: Path) -> None:
    (run.parent / "images" / "0.png").unlink()
    (run.parent / "images" / "1.png").write_text("no picture")
    reader = read_page(run)
    assert reader.text.count("The image cannot be read here.") == 2
    assert sum(tag == "img" for tag, _ in reader.elements) == 2 * 7


def test_files_in_place_of_a_data_set(run: Path) -> None:
    before = write_page(run).read_text()
    DatasetCatalog.remove(DATASET)
    images = run.parent / "images"
    for _ in range(2):  # the second call replaces the registered data
        register_files(run, run.parent / "truth.json", images)
        assert write_page(run).read_text() == before
    with pytest.raises(ValueError, match="give both"):
        register_files(run, run.parent / "truth.json", None)
    with pytest.raises(FileNotFoundError, match="absent"):
        register_files(run, run.parent / "truth.json", images / "absent")
    evaluated_on("a", "b")(run)
    with pytest.raises(ValueError, match="stand for one data set"):
        register_files(run, run.parent / "truth.json", images)


@pytest.mark.parametrize(
    ("done", "said"),
    [(99, "training, not at its end: 99 of 100 iterations"), (100, "training, 100 iterations")],
)
def test_a_training_ends_with_its_last_iteration(done: int, said: str) -> None:
    run: Any = SimpleNamespace(facts={}, iterations=done, setting=lambda key: 100)
    assert page_module._describe_status(run) == said


def test_numbers_and_small_curves_on_the_page() -> None:
    values = (0, 12.34, math.nan, None, -1)
    assert [page_module._format(value) for value in values] == ["0.0", "12.3", "–", "–", "–"]
    assert sparkline(np.array([0.0, 1.0]), np.array([1.0, 0.25])) == "0,0 100,75"


def test_precision_is_drawn_over_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_to_svg", lambda figure: figure)
    recalls, precision = np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.75, 0.25])
    (axes,) = figures.draw_precision_recall(recalls, {"AP50": precision}, ["a"]).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("recall →", "precision →")
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xydata().T, [recalls, precision])


def test_long_curves_are_drawn_as_medians() -> None:
    series = {"total_loss": [(i, 1.0 if i % 50 else 1000.0) for i in range(20_000)]}
    svg = draw_training(series)["Losses"]
    assert len(svg) < 40_000
    assert ">1000<" not in svg  # the scale ignores peaks
    # Each of the 400 points stands for 50 iterations, and one of them is a peak.
    thinned = _thin(np.array(series["total_loss"]))
    assert thinned.tolist() == [[50 * i + 24.5, 1.0] for i in range(400)]
    assert draw_training({"lr": [(1, math.nan)], "time": [(1, 1.0)]}) == {}


def test_the_old_page_is_kept_if_writing_fails(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_page(run)
    before, files = page.read_text(), sorted(run.iterdir())
    monkeypatch.setattr(page_module, "_render", lambda *_: b"")  # the result is not text
    with pytest.raises(TypeError):
        write_page(run)
    assert page.read_text() == before
    assert sorted(run.iterdir()) == files


# The command line


def call(*words: object) -> None:
    run_or_exit(report.run, report.argument_parser().parse_args(list(map(str, words))))


def test_the_tool(run: Path, capsys: pytest.CaptureFixture[str], fresh_logging: None) -> None:
    output = run.parent / "page.html"
    call(run, "--output", output, "--score-threshold", "0.7")
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    assert "with a score of at least 0.7" in output.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "There is no folder gone."),
        (["runs"], "There is no folder runs. Close to it: 'run'."),
        (["images"], "images is not the folder of a run, which holds one of config.yaml"),
        (["run", "--score-threshold", "50"], "The score threshold is 50.0: it goes from 0 to 1."),
        (["run", "--output", "gone/page.html"], "There is no folder gone to write page.html to."),
        (["run", "--images", "images"], "--annotations and --images go together"),
        (
            ["run", "--annotations", "run/config.yaml", "--images", "images"],
            "--annotations run/config.yaml: The data set",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fresh_logging: None,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit) as caught:
        call(*words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list(run.glob("*.html"))
