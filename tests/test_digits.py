# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The digits data set: its files, its annotations, and how it is built."""

import errno
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from fault_runs import wait_for
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from vovnet_d2.data import build_digits, digit_images, digit_split, digits, register_digits

SPLITS = ("train", "val")
SMALL = {"num_train": 12, "num_val": 30}
FOLDER = "vovnet_d2_digits"
SQUARE = np.ones((3, 3))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    build_digits(folder, **SMALL)
    return folder


@pytest.fixture
def registered(monkeypatch, root):
    """Register the digits again, and let builds have the small size of ``root``."""
    names = [f"digits_{split}" for split in SPLITS]
    monkeypatch.setattr(digits, "build_digits", functools.partial(build_digits, **SMALL))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    for name in names:
        # monkeypatch restores the earlier registration after the test.
        monkeypatch.delitem(DatasetCatalog.data, name, raising=False)
        monkeypatch.delitem(MetadataCatalog.data, name, raising=False)
    register_digits()
    yield names
    for name in names:
        DatasetCatalog.data.pop(name, None)
        MetadataCatalog.data.pop(name, None)


def load(root: Path, split: str) -> list[tuple[np.ndarray, list[dict]]]:
    """Return pixels and annotations of every image. Add the mask from pycocotools."""
    coco = COCO(root / FOLDER / "annotations" / f"instances_{split}.json")
    loaded = []
    for image_id, image in coco.imgs.items():
        pixels = np.asarray(Image.open(root / FOLDER / split / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        annotations = [
            {**annotation, "mask": coco.annToMask(annotation).astype(bool)}
            for annotation in coco.imgToAnns[image_id]
        ]
        loaded.append((pixels, annotations))
    return loaded


def fingerprint(root: Path) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for path in sorted((root / FOLDER / split).glob("*.png")):
            digest.update(path.name.encode() + np.asarray(Image.open(path)).tobytes())
        annotations = root / FOLDER / "annotations" / f"instances_{split}.json"
        digest.update(json.dumps(json.loads(annotations.read_text()), sort_keys=True).encode())
    return digest.hexdigest()


# Files


def test_pixels_and_annotations_equal_the_recorded_ones(root):
    assert fingerprint(root) == "1a2ae270b01cb61650c56a3f3311f1ffdfdd46813db8b490158d7e0f58ba4242"


def test_images_do_not_depend_on_each_other(root, tmp_path):
    build_digits(tmp_path, num_train=3, num_val=2)
    for split, count in zip(SPLITS, (3, 2), strict=True):
        few, many = load(tmp_path, split), load(root, split)
        assert len(few) == count
        for (pixels, annotations), (expected, expected_annotations) in zip(few, many, strict=False):
            np.testing.assert_array_equal(pixels, expected)
            for one, other in zip(annotations, expected_annotations, strict=True):
                assert one["segmentation"] == other["segmentation"]


def test_seed_changes_everything(root, tmp_path):
    build_digits(tmp_path, num_train=3, num_val=2, seed=1)
    for split in SPLITS:
        for (pixels, _), (other, _) in zip(load(tmp_path, split), load(root, split), strict=False):
            assert (pixels != other).mean() > 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_counts(root, split):
    images = load(root, split)
    assert len(images) == SMALL[f"num_{split}"]
    assert {len(annotations) for _, annotations in images} == {2, 3, 4, 5}
    ids = [annotation["id"] for _, annotations in images for annotation in annotations]
    assert ids == list(range(1, len(ids) + 1))


def test_digits_and_photographs_are_split():
    train, val = digit_split()
    assert len(train) + len(val) == len(load_digits().target)
    assert set(train) | set(val) == set(range(len(load_digits().target)))
    # The split is random, so it does not depend on the writer, and each part has every class.
    for part in (train, val):
        assert np.abs(np.mean(part) / 898 - 1) < 0.1
        assert min(Counter(load_digits().target[part]).values()) > 0.07 * len(part)


@pytest.mark.parametrize(("split", "grey"), [("train", 60), ("val", 190)])
def test_backgrounds_come_from_the_parts_of_the_photographs(monkeypatch, tmp_path, split, grey):
    """Build from photographs whose parts for training and validation are black and white."""
    photograph = np.zeros((427, 640, 3), dtype=np.uint8)
    photograph[:, round(0.675 * 640) :] = 255
    sources = digits.load_sources()._replace(photographs=[photograph, photograph])
    monkeypatch.setattr(digits, "load_sources", lambda: sources)
    build_digits(tmp_path, **{"num_train": 1, "num_val": 1, f"num_{split}": 10})
    for pixels, annotations in load(tmp_path, split):
        drawn = np.any([annotation["mask"] for annotation in annotations], axis=0)
        assert np.all(pixels[~ndimage.binary_dilation(drawn, SQUARE, iterations=2)] == grey)


def test_images_show_scans_of_their_split_only(monkeypatch, root, tmp_path):
    """Check that images do not change if the scans of the other split are blank."""
    make_image, splits = digits.make_image, digit_split()

    def make_image_without_the_others(sources, chosen, photo_part, rng, **layout):
        other = splits[1] if photo_part == digits._PHOTO_PARTS["train"] else splits[0]
        scans = sources.scans.copy()
        scans[other] = 0.0
        return make_image(sources._replace(scans=scans), chosen, photo_part, rng, **layout)

    monkeypatch.setattr(digits, "make_image", make_image_without_the_others)
    build_digits(tmp_path, **SMALL)
    assert fingerprint(tmp_path) == fingerprint(root)


# Annotations


@pytest.mark.parametrize("split", SPLITS)
def test_box_mask_and_area_agree(root, split):
    for pixels, annotations in load(root, split):
        for annotation in annotations:
            rles = mask_util.frPyObjects(annotation["segmentation"], *pixels.shape[:2])
            assert annotation["bbox"] == mask_util.toBbox(mask_util.merge(rles)).tolist()
            assert annotation["area"] == annotation["bbox"][2] * annotation["bbox"][3]
            np.testing.assert_array_equal(
                annotation["mask"], ndimage.binary_fill_holes(annotation["mask"])
            )
            for polygon in annotation["segmentation"]:
                assert all(isinstance(coordinate, float) for coordinate in polygon)


def test_polygons_of_any_shape_restore_the_mask():
    rng = np.random.default_rng(0)
    for density in np.linspace(0.1, 0.8, 50):
        mask = ndimage.binary_fill_holes(rng.random((30, 30)) < density)
        polygons = digit_images._trace_outlines(mask)
        rle = mask_util.merge(mask_util.frPyObjects(polygons, 30, 30))
        np.testing.assert_array_equal(mask_util.decode(rle), mask)


@pytest.mark.parametrize("split", SPLITS)
def test_mask_covers_the_ink_and_nothing_else(monkeypatch, tmp_path, split):
    """Draw on plain paper, where the ink can be found without annotations."""
    sources = digits.load_sources()
    paper = np.full((427, 640, 3), 128, dtype=np.uint8)
    monkeypatch.setattr(digits, "load_sources", lambda: sources._replace(photographs=[paper]))
    build_digits(tmp_path, **{"num_train": 1, "num_val": 1, f"num_{split}": 10})
    for pixels, annotations in load(tmp_path, split):
        paper_color = np.median(pixels.reshape(-1, 3), axis=0)
        difference = np.abs(pixels - paper_color).max(axis=2)
        ink = difference > 0
        drawn = np.any([annotation["mask"] for annotation in annotations], axis=0)
        assert not (ink & ~ndimage.binary_dilation(drawn, SQUARE)).any()
        for annotation in annotations:
            own = difference * annotation["mask"]
            strokes = ndimage.binary_fill_holes(own > 0.3 * own.max())
            iou = (strokes & annotation["mask"]).sum() / annotation["mask"].sum()
            assert iou > 0.9


@pytest.mark.parametrize("split", SPLITS)
def test_digits_do_not_hide_one_another(root, split):
    for _, annotations in load(root, split):
        for index, annotation in enumerate(annotations):
            surroundings = ndimage.binary_dilation(annotation["mask"], SQUARE, iterations=2)
            for other in annotations[:index]:
                assert not (surroundings & other["mask"]).any()
                iou = mask_util.iou([annotation["bbox"]], [other["bbox"]], [0]).item()
                # If two equal boxes share a quarter of their area, their IoU is 1/7.
                assert iou <= 1 / 7


@pytest.mark.parametrize("split", SPLITS)
def test_digits_stand_out_from_the_background(root, split):
    """Compare the median luma of the edges of strokes with the surroundings, in 255 grey levels."""
    for pixels, annotations in load(root, split):
        luma = np.asarray(Image.fromarray(pixels).convert("L"), dtype=float)
        near = np.any([annotation["mask"] for annotation in annotations], axis=0)
        near = ndimage.binary_dilation(near, SQUARE)
        for annotation in annotations:
            mask = annotation["mask"]
            rim = mask & ~ndimage.binary_erosion(mask, SQUARE, iterations=2)
            ring = ndimage.binary_dilation(mask, SQUARE, iterations=4) & ~near
            assert abs(np.median(luma[rim]) - np.median(luma[ring])) > 50


@pytest.mark.parametrize("split", SPLITS)
def test_heights_have_the_documented_distribution(root, split):
    heights = [
        annotation["bbox"][3] for _, annotations in load(root, split) for annotation in annotations
    ]
    assert min(heights) >= 15
    assert max(heights) <= 113
    # Heights are log-uniform, so half of them are below the geometric mean of the limits.
    assert 0.35 < np.mean(np.array(heights) < np.sqrt(16 * 112)) < 0.65


@pytest.mark.slow
def test_default_data_set_is_readable_and_has_all_sizes(tmp_path):
    """Check the sizes of digits, and that a classifier can read them after shrinking to 8x8."""
    build_digits(tmp_path)
    pictures: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[int]] = {}
    for split, num_images in zip(SPLITS, (1000, 200), strict=True):
        images = load(tmp_path, split)
        annotations = [annotation for _, content in images for annotation in content]
        assert len(images) == num_images
        assert 3.3 < len(annotations) / num_images < 3.7
        sizes = Counter(np.digitize([a["area"] for a in annotations], [32**2, 96**2]).tolist())
        assert sizes[0] > 0.3 * len(annotations)
        assert sizes[1] > 0.3 * len(annotations)
        assert sizes[2] > 0.01 * len(annotations)
        labels[split] = [annotation["category_id"] - 1 for annotation in annotations]
        assert min(Counter(labels[split]).values()) > 0.07 * len(annotations)
        pictures[split] = [
            shrink(pixels, annotation).ravel()
            for pixels, content in images
            for annotation in content
        ]
    reader = SVC(C=10).fit(pictures["train"], labels["train"])
    assert reader.score(pictures["val"], labels["val"]) > 0.9


def shrink(pixels: np.ndarray, annotation: dict) -> np.ndarray:
    """Return the strokes within the box as 8x8 values in [0, 1] without their colour."""
    x, y, width, height = (int(side) for side in annotation["bbox"])
    window = slice(y, y + height), slice(x, x + width)
    mask, colors = annotation["mask"][window], pixels[window].astype(float)
    rim = mask & ~ndimage.binary_erosion(mask, SQUARE, iterations=2)
    difference = np.abs(colors - np.median(colors[rim], axis=0)).max(axis=2)
    strokes = mask * np.clip(1 - difference / 80, 0, 1)
    return np.asarray(Image.fromarray(strokes.astype(np.float32)).resize((8, 8), Image.BOX))


# Through Detectron2


def test_registration(registered):
    for name, split in zip(registered, SPLITS, strict=True):
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type == "coco"
        assert metadata.thing_classes == list("0123456789")
        dicts = DatasetCatalog.get(name)
        assert len(dicts) == SMALL[f"num_{split}"]
        classes = {
            annotation["category_id"] for image in dicts for annotation in image["annotations"]
        }
        assert classes == set(range(10))
        assert Path(dicts[0]["file_name"]).parent == Path(metadata.image_root)
    register_digits()  # a second call is allowed


def test_registration_builds_nothing_before_the_first_use(registered, monkeypatch, tmp_path):
    for name in registered:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    register_digits()
    assert not (tmp_path / "elsewhere").exists()
    DatasetCatalog.get("digits_val")
    assert Path(MetadataCatalog.get("digits_train").json_file).is_file()
    assert Path(MetadataCatalog.get("digits_val").json_file).is_file()


def test_perfect_predictions_score_100(registered, tmp_path):
    evaluator = COCOEvaluator(
        "digits_val",
        ("bbox", "segm"),
        distributed=False,
        output_dir=str(tmp_path),
        use_fast_impl=False,
    )
    dicts = DatasetCatalog.get("digits_val")
    evaluator.reset()
    for image in dicts:
        size = image["height"], image["width"]
        annotations = image["annotations"]
        rles = [
            mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], *size))
            for annotation in annotations
        ]
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations])
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances(
            size,
            pred_boxes=Boxes(boxes),
            pred_classes=torch.tensor([annotation["category_id"] for annotation in annotations]),
            scores=torch.ones(len(annotations)),
            pred_masks=torch.from_numpy(np.stack([mask_util.decode(rle) for rle in rles])).bool(),
        )
        evaluator.process([image], [{"instances": instances}])
    results = evaluator.evaluate()
    for task in ("bbox", "segm"):
        # No value is NaN, because there are digits of all three sizes.
        for metric in ("AP", "APs", "APm", "APl"):
            assert results[task][metric] == pytest.approx(100)


@pytest.mark.parametrize("scale", [0.75, 1.3])
def test_masks_follow_a_resized_image(registered, scale):
    """Use Detectron2's default mapper with masks as polygons."""
    size = round(192 * scale)
    assert get_cfg().INPUT.MASK_FORMAT == "polygon"
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.Resize((size, size))],
        image_format="BGR",
        use_instance_mask=True,
    )
    for image in DatasetCatalog.get("digits_val")[:5]:
        instances = mapper(image)["instances"]
        np.testing.assert_allclose(
            instances.gt_masks.get_bounding_boxes().tensor.numpy(),
            instances.gt_boxes.tensor.numpy(),
            atol=1e-3,
        )
        expected = [annotation["bbox"] for annotation in image["annotations"]]
        areas = [width * height * (size / 192) ** 2 for _, _, width, height in expected]
        np.testing.assert_allclose(instances.gt_boxes.area().numpy(), areas, rtol=1e-4)


# Building


def count_builds(monkeypatch) -> list[Path]:
    write, builds = digits._write, []

    def counted(folder, recipe):
        builds.append(folder)
        write(folder, recipe)

    monkeypatch.setattr(digits, "_write", counted)
    return builds


def test_the_set_is_built_once_and_again_for_other_options(monkeypatch, tmp_path):
    builds = count_builds(monkeypatch)
    for count in (2, 2, 3, 3):
        assert build_digits(tmp_path, num_train=count, num_val=1) == tmp_path / FOLDER
        assert len(list((tmp_path / FOLDER / "train").iterdir())) == count
    assert len(builds) == 2
    monkeypatch.setattr(digits, "_VERSION", digits._VERSION + 1)
    build_digits(tmp_path, num_train=3, num_val=1)
    assert len(builds) == 3
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER, f"{FOLDER}.lock"}


def test_two_processes_build_once(monkeypatch, tmp_path):
    builds = count_builds(monkeypatch)
    threads = [
        threading.Thread(target=build_digits, args=(tmp_path,), kwargs=SMALL) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert (tmp_path / FOLDER / "recipe.json").is_file()


def test_workers_draw_the_same_images(monkeypatch, root, tmp_path):
    """Compare with a build without workers, and check that no global random number is drawn."""
    monkeypatch.setattr(digits, "_FEW_IMAGES", 0)
    before = torch.get_rng_state()
    build_digits(tmp_path, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    made, expected = (
        json.loads((folder / FOLDER / "recipe.json").read_text()) for folder in (tmp_path, root)
    )
    assert made == expected


def test_number_of_workers(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "fork")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)), raising=False)
    assert [digits._count_workers(count) for count in (100, 101)] == [0, 3]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert digits._count_workers(1000) == 4
    with monkeypatch.context() as patch:
        patch.setitem(multiprocessing.current_process()._config, "daemon", True)
        assert digits._count_workers(1000) == 0
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert digits._count_workers(1000) == 0


def test_interrupted_build_leaves_nothing(monkeypatch, tmp_path):
    make_image, calls = digits.make_image, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make_image(*args, **kwargs)

    monkeypatch.setattr(digits, "make_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_digits(tmp_path, num_train=3, num_val=2)
    assert [path.name for path in tmp_path.iterdir()] == [f"{FOLDER}.lock"]
    build_digits(tmp_path, num_train=3, num_val=2)
    assert len(load(tmp_path, "val")) == 2


BUILD = """
import sys
from vovnet_d2.data import build_digits
from vovnet_d2.engine.interruption import exit_on_signal
from vovnet_d2.engine.launch import run_or_exit

def build(root):
    with exit_on_signal():
        build_digits(root, num_train=100_000)

run_or_exit(build, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_a_build_with_workers(tmp_path, name):
    """Send the signals of Ctrl-C and of the end of a job, which must also stop the workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert wait_for(lambda: len(list(tmp_path.glob(".*/new/train/*"))) > 10)
        os.killpg(process.pid, getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    lines = [line for line in re.split("[\r\n]", errors) if line and "Building" not in line]
    assert lines == [f"error: interrupted by {name}."]
    assert [path.name for path in tmp_path.iterdir()] == [f"{FOLDER}.lock"]


def test_interrupted_rebuild_keeps_the_old(monkeypatch, tmp_path):
    build_digits(tmp_path, num_train=1, num_val=1)
    before = fingerprint(tmp_path)
    monkeypatch.setattr(digits, "make_image", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_digits(tmp_path, num_train=2, num_val=1)
    assert fingerprint(tmp_path) == before


def test_files_of_a_killed_build_are_removed(tmp_path):
    for part in ("new", "old"):
        left = tmp_path / f".{FOLDER}.build-killed" / part / "train"
        left.mkdir(parents=True)
        (left / "000007.png").touch()
    backup = tmp_path / f".{FOLDER}.backup"
    backup.mkdir()
    build_digits(tmp_path, num_train=1, num_val=1)
    assert [path.name for path in (tmp_path / FOLDER / "train").iterdir()] == ["000000.png"]
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER, f"{FOLDER}.lock", backup.name}


@pytest.mark.parametrize("change", ["another", "added", "changed"])
def test_a_folder_of_the_user_is_kept(tmp_path, change):
    """Keep another folder of the same name, and a folder of ours with added or changed files."""
    mine = tmp_path / FOLDER / "annotations" / "instances_mine.json"
    if change == "another":
        mine.parent.mkdir(parents=True)
    else:
        build_digits(tmp_path, num_train=1, num_val=1)
    if change == "changed":
        mine = mine.with_name("instances_train.json")
    mine.write_text("mine")
    (tmp_path / "digits").mkdir()  # this package does not use the plain name
    (tmp_path / "digits" / "recipe.json").write_text("soup")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"{FOLDER} was changed after .*DETECTRON2"):
        build_digits(tmp_path, num_train=2, num_val=1)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before
    assert not list(tmp_path.glob(f".{FOLDER}.*"))


def test_root_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"Cannot write.*file/vovnet_d2_digits.*DETECTRON2_DATASETS"
    ):
        build_digits(tmp_path / "file", num_train=1, num_val=1)

    def read_only(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(digits, "_write", read_only)
    with pytest.raises(ValueError, match=r"Read-only file system.*DETECTRON2_DATASETS"):
        build_digits(tmp_path, num_train=1, num_val=1)


def test_finished_data_set_is_only_read(monkeypatch, root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    (root / f"{FOLDER}.lock").unlink()
    build_digits(root, **SMALL)
    del before[root / f"{FOLDER}.lock"]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "num_train must be at least 1, not 0"),
        ({"num_val": -1}, "num_val must be at least 1, not -1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"digits_per_image": (0, 3)}, r"digits_per_image .* not \(0, 3\)"),
        ({"digits_per_image": (4, 3)}, r"digits_per_image .* not \(4, 3\)"),
        ({"digit_size": (7, 50)}, r"digit_size .* from 8 to 188 .* not \(7, 50\)"),
        ({"digit_size": (16, 200)}, r"digit_size .* from 8 to 188 .* not \(16, 200\)"),
        ({"image_size": 100}, r"digit_size .* from 8 to 96 .* not \(16, 112\)"),
        (
            {"image_size": 64, "digit_size": (56, 60), "digits_per_image": (3, 3)},
            "3 digits of 56 to 60 pixels do not fit on an image of 64 pixels: lower",
        ),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_digits(tmp_path, **(SMALL | arguments))
    assert not (tmp_path / FOLDER).exists()
