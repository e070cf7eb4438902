# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the tool that draws a data set."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_tree import COLORS
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import BoxMode
from engine_runs import FASTER_RCNN, MASK_RCNN, TINY, tiny_config
from PIL import Image

from vovnet_d2.drawing.artist import Artist, Shown
from vovnet_d2.engine import Trainer, data_pictures
from vovnet_d2.engine.data_pictures_command import main

pytest_plugins = ["engine_fixtures"]


SEMANTIC = "COCO-SemanticSegmentation/semantic_V_39_FPN_1x.yaml"


@pytest.fixture
def overlays(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """Record the content that the artist draws on each picture."""
    calls: list[Shown] = []
    original = Artist.draw

    def record(self: Artist, pixels: np.ndarray, shown: Shown, **words: float) -> np.ndarray:
        calls.append(shown)
        return original(self, pixels, shown, **words)

    monkeypatch.setattr(Artist, "draw", record)
    return calls


def draw(*words: object) -> None:
    main([str(word) for word in words])


def write_results(path: Path, *, shift: float = 0.0, **changes: object) -> list[dict]:
    """Write the annotations of the validation set as results, moved to the right."""
    results = []
    for record in DatasetCatalog.get("coco_2017_val"):
        for number, annotation in enumerate(record["annotations"]):
            x, y, w, h = annotation["bbox"]
            result = {"image_id": record["image_id"], "category_id": list(COLORS)[number % 3]}
            result |= {"bbox": [x + shift, y, w, h], "score": 0.9 - 0.5 * (number == 2)}
            results.append(result | changes)
    path.write_text(json.dumps(results))
    return results


def test_annotations(coco: Path, tmp_path: Path, overlays: list[Shown]) -> None:
    """Draw one file for each image. One image has no annotations, and one has a crowd."""
    draw("annotations", tmp_path / "out", "--dataset", "coco_2017_train")
    records = DatasetCatalog.get("coco_2017_train")
    names = [f"{i:03d}_{Path(r['file_name']).stem}.png" for i, r in enumerate(records, 1)]
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == names
    assert sum(not record["annotations"] for record in records) == 1
    for record, shown in zip(records, overlays, strict=True):
        crowds = [annotation["iscrowd"] for annotation in record["annotations"]]
        assert [text.endswith("|crowd") for text in shown.instances.texts] == crowds
        assert [mask is not None for mask in shown.instances.pred_masks] == [True] * len(crowds)
    picture = np.asarray(Image.open(tmp_path / "out" / names[1]).resize((80, 64)))
    plain = np.asarray(Image.open(records[1]["file_name"]))
    assert np.abs(picture.astype(float) - plain).mean() < 8  # nothing is drawn


def test_training_samples_equal_those_of_the_trainer(
    coco: Path, tmp_path: Path, overlays: list[Shown]
) -> None:
    cfg = tiny_config(MASK_RCNN, tmp_path, "INPUT.MIN_SIZE_TRAIN", "(48, 64)")
    drawn = list(data_pictures.draw_training_samples(cfg, number=5))
    stream = iter(Trainer.build_train_loader(cfg))
    samples = [sample for _ in range(3) for sample in next(stream)][:5]
    assert [name for name, _ in drawn] == [sample["file_name"] for sample in samples]
    assert {sample["image"].shape[1] for sample in samples} == {48, 64}
    for (_, pixels), sample, shown in zip(drawn, samples, overlays, strict=True):
        instances = sample["instances"]
        torch.testing.assert_close(shown.instances.pred_boxes.tensor, instances.gt_boxes.tensor)
        assert shown.instances.pred_classes.tolist() == instances.gt_classes.tolist()
        assert len(shown.instances.pred_masks) == len(instances)
        rgb = convert_image_to_rgb(sample["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
        small = Image.fromarray(pixels).resize(rgb.shape[1::-1], Image.Resampling.BOX)
        difference = np.abs(np.asarray(small, dtype=float) - rgb)
        for box in instances.gt_boxes:
            x0, y0, x1, y1 = box.int().tolist()
            difference[max(y0 - 9, 0) : y1 + 9, max(x0 - 9, 0) : x1 + 9] = 0  # and its label
        assert difference.max() < 120
        assert difference.mean() < 4


@pytest.mark.parametrize("masks", [False, True])
def test_results(coco: Path, tmp_path: Path, overlays: list[Shown], masks: bool) -> None:
    results = write_results(tmp_path / "results.json", shift=5)
    if masks:
        for result in results:
            x, y, w, h = result["bbox"]
            result["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        (tmp_path / "results.json").write_text(json.dumps(results))
    words = ["results", tmp_path / "sheet.png", "--config-file", FASTER_RCNN]
    draw(*words, "--results", tmp_path / "results.json")
    assert Image.open(tmp_path / "sheet.png").size[0] > 400
    truths, found = overlays[::2], overlays[1::2]  # side by side
    records = [r for r in DatasetCatalog.get("coco_2017_val") if r["annotations"]]
    assert len(truths) == len(records)
    for record, (instances, *_) in zip(records, found, strict=True):
        kept = [r for r in results if r["image_id"] == record["image_id"] and r["score"] >= 0.5]
        boxes = [BoxMode.convert(r["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for r in kept]
        assert instances.pred_boxes.tensor.tolist() == pytest.approx(np.array(boxes))
        assert instances.texts == ["person 90%", "stop sign 90%"][: len(kept)]
        assert [mask is not None for mask in instances.pred_masks] == [masks] * len(kept)


def test_a_result_at_the_threshold_is_drawn(
    coco: Path, tmp_path: Path, overlays: list[Shown]
) -> None:
    write_results(tmp_path / "results.json", score=0.75)
    for min_score, drawn in ((0.75, True), (0.7501, False)):
        overlays.clear()
        file = tmp_path / "results.json"
        list(data_pictures.draw_results("coco_2017_val", file, number=3, min_score=min_score))
        assert {len(shown.instances) > 0 for shown in overlays[1::2]} == {drawn}


def test_unreadable_images_are_named_and_skipped(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((coco / "coco" / "annotations" / "instances_train2017.json").read_text())
    images = tmp_path / "images"
    images.mkdir()
    for image in content["images"]:
        source = coco / "coco" / "train2017" / image["file_name"]
        (images / image["file_name"]).write_bytes(source.read_bytes())
    gone, cut, outside = (content["images"][i] for i in (0, 3, 4))
    (images / gone["file_name"]).unlink()
    (images / cut["file_name"]).write_bytes(b"GIF89a")
    outside["file_name"] = "../train.json"
    (tmp_path / "train.json").write_text(json.dumps(content))
    own = ["--train-json", tmp_path / "train.json", "--train-images", images]
    draw("annotations", tmp_path / "out", *own)
    told = capsys.readouterr()
    for name in (gone["file_name"], cut["file_name"]):
        assert name in told.out + told.err
    assert f"to {tmp_path / 'train.json'}: it is not read." in told.out + told.err
    assert "Drew 3 pictures of own_train" in told.out
    assert len(list((tmp_path / "out").glob("[!.]*"))) == 3

    outside["file_name"] = cut["file_name"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    options = ["--opts", *TINY, "MODEL.DEVICE", "cpu"]
    sheet = tmp_path / "sheet.jpg"
    draw("training", sheet, "--config-file", FASTER_RCNN, *own, "--number", "6", *options)
    told = capsys.readouterr()
    assert cut["file_name"] in told.out + told.err
    assert "Drew 6 pictures of own_train" in told.out
    Image.open(sheet).verify()


def thrice(labels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(labels[..., None], 3, axis=2).astype(np.uint8))


def with_palette(labels: np.ndarray) -> Image.Image:
    image = Image.fromarray(labels.astype(np.uint8), mode="P")
    image.putpalette([9, 9, 9, 200, 0, 0])
    return image


def of_16_bits(labels: np.ndarray) -> Image.Image:
    return Image.fromarray(labels.astype(np.uint16) + 256)  # labels above 255


@pytest.mark.parametrize("save", [thrice, with_palette, of_16_bits])
def test_label_maps_are_drawn_as_training_reads_them(
    catalogs: None,
    fresh_logging: None,
    tmp_path: Path,
    overlays: list[Shown],
    save: Callable[[np.ndarray], Image.Image],
) -> None:
    labels = np.zeros((64, 80), int)
    labels[:20] = 1
    Image.new("RGB", (80, 64)).save(tmp_path / "a.jpg")
    save(labels).save(tmp_path / "a.png")
    record = {"file_name": f"{tmp_path}/a.jpg", "sem_seg_file_name": f"{tmp_path}/a.png"}
    record |= {"width": 80, "height": 64}
    wrong = record | {"file_name": f"{tmp_path}/b.jpg"}
    Image.new("RGB", (9, 9)).save(tmp_path / "b.jpg")
    DatasetCatalog.register("maps", lambda: [dict(record), *wrongs])
    MetadataCatalog.get("maps").set(
        stuff_classes=[f"class {n}" for n in range(300)], evaluator_type="sem_seg", ignore_label=255
    )
    options = ["DATASETS.TRAIN", "('maps',)", "DATASETS.TEST", "()", "INPUT.RANDOM_FLIP", "none"]
    options += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "300", "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "255"]
    words = ["--config-file", SEMANTIC, "--number", "2", "--opts", *TINY, "MODEL.DEVICE", "cpu"]
    first = 256 if save is of_16_bits else 0
    expected = np.where(labels == 1, first + 1, first).tolist()
    wrongs = [wrong | {"width": 9, "height": 9}]
    draw("annotations", tmp_path / "drawn", *words, *options)  # the other image is skipped
    assert [shown.labels.tolist() for shown in overlays] == [expected]
    overlays.clear()
    wrongs = []
    draw("training", tmp_path / "drawn", *words, *options)
    assert [shown.labels.tolist() for shown in overlays] == 2 * [expected]


def test_thin_pictures_are_enlarged_a_little(
    catalogs: None, fresh_logging: None, tmp_path: Path
) -> None:
    """Check that the short side is not enlarged to the usual size, which would take gigabytes."""
    for size in ((3000, 2), (1, 1), (80, 60), (2, 300)):
        file = tmp_path / f"{size[0]}.png"
        Image.new("RGB", size).save(file)
        box = {"bbox": [0, 0, *size], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
        record = {"file_name": str(file), "width": size[0], "height": size[1], "image_id": 1}
        name = file.stem
        DatasetCatalog.register(name, lambda r=record, b=box: [r | {"annotations": [dict(b)]}])
        MetadataCatalog.get(name).set(thing_classes=["a"])
        (drawn,) = data_pictures.draw_annotations(name, number=1)
        scale = max(1.0, min(300 / min(size), 1200 / max(size)))
        expected = np.multiply(size[::-1], scale)
        np.testing.assert_allclose(drawn.pixels.shape[:2], expected, atol=1)
    thin = np.zeros((3000, 2, 3), np.uint8)
    for pixels in (thin, thin.transpose(1, 0, 2)):
        drawings = iter([data_pictures.Drawn("a", pixels)] * 5)
        assert data_pictures.write_contact_sheet(tmp_path / "sheet.png", drawings) == 5
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert max(sheet.size) < 5000


def test_objects_with_absurd_numbers_are_not_drawn(
    coco: Path, tmp_path: Path, overlays: list[Shown], capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((coco / "coco/annotations/instances_train2017.json").read_text())
    content["annotations"][0]["segmentation"][0][2] = float("nan")
    (tmp_path / "a.json").write_text(json.dumps(content))
    own = ["--train-json", tmp_path / "a.json", "--train-images", coco / "coco/train2017"]
    draw("annotations", tmp_path / "out", "--number", "1", *own)
    (shown,) = overlays
    assert len(shown.instances) == 2
    told = capsys.readouterr()
    assert "jpg has a polygon with a number that is not finite" in told.out + told.err


def test_nothing_to_draw_is_one_sentence(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    content = json.loads((coco / "coco/annotations/instances_train2017.json").read_text())
    for image in content["images"]:
        (tmp_path / "images" / image["file_name"]).write_text("404")
    (tmp_path / "a.json").write_text(json.dumps(content))
    own = ["--train-json", tmp_path / "a.json", "--train-images", tmp_path / "images"]
    for what, reason in (
        ("annotations", "Nothing is drawn of own_train: none of its images can be read."),
        ("training", "cannot be used, and neither can 100 other"),
    ):
        options = ["--config-file", FASTER_RCNN, *own, "--opts", *TINY, "MODEL.DEVICE", "cpu"]
        with pytest.raises(SystemExit) as caught:
            draw(what, tmp_path / "sheet.png", *options)
        assert caught.value.code == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["annotations"], "DATASETS.TRAIN is empty: give --config-file"),
        (["annotations", "--dataset", "coco_2017_trian"], "not registered. Close to it: 'coco"),
        (["annotations", "--number", "0"], "--number is 0"),
        (["results", "--dataset", "coco_2017_val"], "--results and results go together"),
        (["results", "--results", "gone.json", "--dataset", "coco_2017_val"], "no file gone.json"),
    ],
)
def test_each_mistake_is_one_sentence(
    coco: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        draw(words[0], tmp_path / "out", *words[1:])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "results.json is not JSON"),
        ('{"a": 1}', "not in COCO's results format"),
        ("[{}]", "not in COCO's results format"),
        ({"image_id": 5}, "image_id 5, which coco_2017_val does not have"),
        ({"category_id": 12}, "category_id 12, which coco_2017_val does not have"),
    ],
)
def test_results_that_do_not_fit(
    coco: Path, tmp_path: Path, content: str | dict, message: str
) -> None:
    path = tmp_path / "results.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        write_results(path, **content)
    with pytest.raises(ValueError, match=message):
        list(data_pictures.draw_results("coco_2017_val", path, number=3, min_score=0.5))
