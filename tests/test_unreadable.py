# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training with unreadable images, which are an error, or are skipped and counted."""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin import register_all_coco
from detectron2.utils.serialize import PicklableWrapper
from engine_runs import FASTER_RCNN, TINY, launch, read_log, tiny_config
from PIL import Image
from torch.utils.data import DataLoader

from vovnet_d2.data import unreadable
from vovnet_d2.data.mapper import Mapper
from vovnet_d2.data.unreadable import ReadableOnly, UnreadableImageError, image_roots
from vovnet_d2.engine import Trainer, main

pytest_plugins = ["engine_fixtures"]

TOOL = Path(__file__).parents[1] / "tools" / "train_net.py"


@pytest.fixture
def coco_copy(catalogs: None, fresh_logging: None, coco_root: Path, tmp_path: Path) -> Path:
    """Return a copy of the miniature COCO for tests to damage."""
    shutil.copytree(coco_root / "coco", tmp_path / "data" / "coco")
    register_all_coco(str(tmp_path / "data"))
    return tmp_path / "data" / "coco"


def images(coco: Path, split: str = "train2017") -> list[Path]:
    return sorted((coco / split).iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def resave(path: Path, edit: Callable[[bytes], bytes] = lambda data: data) -> None:
    """Save an image as PNG under its old name. Pillow ignores suffixes."""
    Image.open(path).save(path, "PNG")
    path.write_bytes(edit(path.read_bytes()))


def open_image(record: dict) -> tuple[int, int]:
    with Image.open(record["file_name"]) as image:
        image.load()
        return image.size


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "there is no such file"),
    "cut": (cut, "truncated"),
    "empty": (lambda p: p.write_bytes(b""), "of no known format"),
    "text": (lambda p: p.write_text("404"), "of no known format"),
    "cut PNG": (lambda p: resave(p, lambda data: data[: len(data) // 2]), "truncated|broken"),
    "of another size": (
        lambda p: shutil.copy(p.parent.parent / "small.jpg", p),
        r"Mismatched image shape .* got \(8, 8\), expect \(80, 64\)",
    ),
}


@pytest.fixture
def damaged(coco_copy: Path, request: pytest.FixtureRequest) -> Path:
    Image.new("RGB", (8, 8)).save(coco_copy / "small.jpg")
    path = images(coco_copy)[0]
    DAMAGE[getattr(request, "param", "cut")][0](path)
    return path


@pytest.mark.parametrize(
    ("damaged", "reason"), [(k, v[1]) for k, v in DAMAGE.items()], ids=DAMAGE, indirect=["damaged"]
)
def test_an_unreadable_image_is_an_error_or_is_skipped(
    damaged: Path, tmp_path: Path, reason: str
) -> None:
    cfg = tiny_config(FASTER_RCNN, tmp_path)
    record = {"file_name": str(damaged), "height": 64, "width": 80, "annotations": []}
    good = record | {"file_name": str(images(damaged.parents[1])[1])}
    mapper = Mapper(cfg, is_train=True)
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        ReadableOnly(mapper)(record)
    assert caught.value.sentence.startswith(f"{damaged} cannot be used: ")
    lenient = ReadableOnly(mapper, max_skipped=1)
    assert lenient(record) is None
    assert lenient(record) is None
    assert lenient.count == 1
    assert lenient(good)["image"].shape[0] == 3


def test_too_many(coco_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mapper = Mapper(tiny_config(FASTER_RCNN, tmp_path), is_train=True)
    lenient = ReadableOnly(mapper, max_skipped=2)
    records = [{"file_name": f"nowhere/{i}.jpg", "height": 64, "width": 80} for i in range(3)]
    assert [lenient(r) for r in records[:2]] == [None, None]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for number, message in enumerate(warnings, start=1):
        assert f"image {number} of the 2 that" in message
    assert len(warnings) == 2
    with pytest.raises(UnreadableImageError, match=r"2\.jpg .*, and 2 were left out before it"):
        lenient(records[2])
    assert lenient(records[0]) is None


def test_errors_of_the_mapper_are_raised(coco_copy: Path) -> None:
    def fail(record: dict) -> None:
        raise RuntimeError("a bug in the augmentation")

    record = {"file_name": str(images(coco_copy)[0]), "height": 64, "width": 80}
    with pytest.raises(RuntimeError, match="a bug"):
        ReadableOnly(fail, max_skipped=9)(record)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_training_names_the_file(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture, workers: str
) -> None:
    words = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", workers]
    words += ["SOLVER.MAX_ITER", "9"]  # the training reads all images
    before = set(multiprocessing.active_children())
    with pytest.raises(SystemExit) as caught:
        main(["--config-file", FASTER_RCNN, *TINY, *words])
    assert set(multiprocessing.active_children()) <= before  # while the error still exists
    assert caught.value.code == 2
    printed, error = capsys.readouterr()
    assert f"error: {damaged} cannot be used: image file is truncated" in error
    assert "DATALOADER.MAX_UNREADABLE" in error
    assert "Traceback" not in printed + error
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def train(out: Path, workers: str, *words: str) -> dict[str, torch.Tensor]:
    options = ["DATALOADER.MAX_UNREADABLE", "1", "DATALOADER.NUM_WORKERS", workers]
    launch(FASTER_RCNN, out, *words, *options, "SOLVER.MAX_ITER", "6", "DATASETS.TEST", "()")
    return torch.load(out / "model_final.pth")["model"]


@pytest.mark.slow
def test_spawned_workers_share_the_list_of_skipped_images(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check mappers that are pickled by pickle, and by cloudpickle as in Detectron2's loaders."""
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(unreadable, "multiprocessing", context)
    mapper = ReadableOnly(open_image, max_skipped=1)
    files = [damaged, *images(damaged.parents[1])[1:3]]
    loader = DataLoader(
        [{"file_name": str(file)} for file in files],
        batch_size=None,
        collate_fn=PicklableWrapper(mapper),
        num_workers=1,
        multiprocessing_context=context,
    )
    assert [item is None for item in loader] == [True, False, False]
    assert mapper.count == 1


def test_a_mapper_that_skips_nothing_can_always_be_pickled() -> None:
    mapper = pickle.loads(pickle.dumps(PicklableWrapper(ReadableOnly(open_image))))
    assert mapper.count == 0
    with pytest.raises(UnreadableImageError, match=r"nowhere\.jpg cannot be used"):
        mapper({"file_name": "nowhere.jpg"})


@pytest.mark.slow
def test_replacements_of_skipped_images_are_deterministic(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare parameters without workers, with two workers, and after a resume."""
    plain, parallel, resumed = (tmp_path / name for name in ("plain", "parallel", "resumed"))
    expected = train(plain, "0")
    assert f"{damaged} cannot be used" in read_log(plain)
    metrics = [json.loads(line) for line in (plain / "metrics.json").read_text().splitlines()]
    assert metrics[-1]["unreadable_images"] == 1
    others = [train(parallel, "2")]
    train(resumed, "0", "SOLVER.CHECKPOINT_PERIOD", "3")
    (resumed / "last_checkpoint").write_text("model_0000002.pth")
    os.remove(resumed / "model_final.pth")
    others.append(train(resumed, "2", "--resume"))
    for other in others:
        assert all(torch.equal(expected[name], other[name]) for name in expected)


# Paths


def test_paths_cannot_leave_the_folder(
    coco_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = coco_copy / "annotations" / "instances_train2017.json"
    secret = coco_copy / "secret.jpg"
    shutil.copy(images(coco_copy)[0], secret)
    content = json.loads(file.read_text())
    for name in ("../secret.jpg", str(secret)):
        for image in content["images"]:
            image["file_name"] = name
        file.write_text(json.dumps(content))
        words = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as caught:
            main(["--config-file", FASTER_RCNN, *TINY, *words, "DATALOADER.MAX_UNREADABLE", "9"])
        assert caught.value.code == 2
        assert "secret.jpg is not read: it leads out of the folder" in capsys.readouterr().err


def test_links_may_lead_anywhere(coco_copy: Path, tmp_path: Path) -> None:
    """Use links to files and folders, as in DVC and in storage pools of clusters."""
    path = images(coco_copy)[0]
    outside = path.rename(tmp_path / "outside.jpg")
    path.symlink_to(outside)
    pool = (coco_copy / "train2017").rename(tmp_path / "pool")
    (coco_copy / "train2017").symlink_to(pool)
    (pool / "more").symlink_to(coco_copy / "val2017")
    mapper = Mapper(tiny_config(FASTER_RCNN, tmp_path), is_train=True)
    guarded = ReadableOnly(mapper, roots=image_roots(["coco_2017_train"]))
    record = {"height": 64, "width": 80}
    below = path.parent / "more" / images(coco_copy, "val2017")[0].name
    for file in (path, pool / path.name, below):
        assert guarded(record | {"file_name": str(file)}) is not None
    with pytest.raises(UnreadableImageError, match="leads out of the folder"):
        guarded(record | {"file_name": str(outside)})


def test_names_cannot_leave_a_folder(
    coco_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(coco_copy)  # the default folder datasets/ of Detectron2 is relative
    name = images(coco_copy)[0].name
    shutil.copy(f"train2017/{name}", "secret.jpg")
    Path("train2017/link").symlink_to(coco_copy / "val2017")
    mapper = Mapper(tiny_config(FASTER_RCNN, tmp_path), is_train=True)
    record = {"height": 64, "width": 80}
    for root in ("train2017", "val2017/../train2017"):
        guarded = ReadableOnly(mapper, roots=[root])
        for inside in (name, f"../train2017/{name}"):
            assert guarded(record | {"file_name": f"{root}/{inside}"}) is not None
        # A file next to the target folder of a link is outside, too.
        for outside in ("../secret.jpg", "link/../secret.jpg", f"link/../train2017/../{name}"):
            with pytest.raises(UnreadableImageError, match="leads out of the folder"):
                guarded(record | {"file_name": f"{root}/{outside}"})


def test_damaged_semantic_labels_are_named(coco_copy: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.png"
    Image.effect_noise((80, 64), 9).save(labels)
    record = {"file_name": str(images(coco_copy)[0]), "height": 64, "width": 80}
    record["sem_seg_file_name"] = str(labels)
    mapper = Mapper(tiny_config(FASTER_RCNN, tmp_path), is_train=True)
    assert "sem_seg" in ReadableOnly(mapper)(record)
    data = bytearray(labels.read_bytes())
    data[len(data) // 2] ^= 255  # Detectron2 reads wrong labels or none from such a file
    labels.write_bytes(data)
    with pytest.raises(UnreadableImageError, match=r"labels\.png cannot be used"):
        ReadableOnly(mapper)(record)
    assert ReadableOnly(mapper, max_skipped=1)(record) is None


def test_roots(coco_copy: Path) -> None:
    both = ["coco_2017_train", "coco_2017_val"]
    assert image_roots(both) == [str(coco_copy / "train2017"), str(coco_copy / "val2017")]
    MetadataCatalog.get("my own").set(thing_classes=["a"])
    assert image_roots([*both, "my own"]) == []


@pytest.mark.slow
def test_the_tool_ends_after_an_error_in_an_evaluation(coco_copy: Path, tmp_path: Path) -> None:
    """Check the status although workers still wait for more images."""
    cut(images(coco_copy, "val2017")[0])
    words = [*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1"]
    words += ["DATALOADER.NUM_WORKERS", "2"]
    done = subprocess.run(
        [sys.executable, str(TOOL), "--config-file", FASTER_RCNN, *words],
        env={**os.environ, "DETECTRON2_DATASETS": str(coco_copy.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluation_names_the_file(coco_copy: Path, tmp_path: Path) -> None:
    cut(images(coco_copy, "val2017")[0])
    cfg = tiny_config(FASTER_RCNN, tmp_path, "DATALOADER.NUM_WORKERS", "1")
    with pytest.raises(UnreadableImageError, match="truncated") as caught:
        list(Trainer.build_test_loader(cfg, "coco_2017_val"))
    assert caught.value.sentence.startswith(str(images(coco_copy, "val2017")[0]))
    assert "\n" not in caught.value.sentence
