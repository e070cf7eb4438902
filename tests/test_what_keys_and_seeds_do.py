# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Effects of config keys, seeds, limits and selections that no other test would notice."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, hooks
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from engine_runs import FASTER_RCNN, tiny_config
from PIL import Image
from torch import nn

from vovnet_d2.data import record_files
from vovnet_d2.data.check import frames, leakage
from vovnet_d2.data.check.conventions import COCO, Convention, Sample
from vovnet_d2.data.check.files import ImageFile
from vovnet_d2.data.check.label_maps import LabelCounts
from vovnet_d2.data.check.leakage import compare_files
from vovnet_d2.data.check.problems import Findings
from vovnet_d2.data.mapper import build_mapper
from vovnet_d2.data.stream import Place, sample_seed, step_seed
from vovnet_d2.demo.selection import Selection
from vovnet_d2.drawing.artist import Artist
from vovnet_d2.engine import (
    Trainer,
    agreed_steps,
    classifier,
    load_config,
    nonfinite,
    pictures,
    rehearsal,
    semantic_data,
    trainer,
)
from vovnet_d2.engine.classifier import AccuracyEvaluator, ClassifierTrainer
from vovnet_d2.engine.data_pictures import draw_annotations
from vovnet_d2.engine.dense import write_loss_normalizers
from vovnet_d2.engine.hooks import BestCheckpointer, EvalHook, PreciseBN
from vovnet_d2.engine.interruption import StopRequest
from vovnet_d2.engine.pretrain import add_pretraining_config

pytest_plugins = ["engine_fixtures"]


def bare_trainer(**attributes: Any) -> Trainer:
    """Return a trainer without model and data."""
    made = object.__new__(Trainer)
    made.__dict__.update(attributes)
    return made


# Keys


@pytest.mark.parametrize("enabled", [False, True])
def test_test_amp(enabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that only TEST.AMP, and not SOLVER.AMP, sets the precision outside of training."""
    seen: list[bool] = []
    monkeypatch.setattr(
        DefaultTrainer,
        "test",
        classmethod(lambda *args: seen.append(torch.is_autocast_enabled("cpu"))),
    )
    options = ["TEST.AMP.ENABLED", str(enabled), "SOLVER.AMP.ENABLED", str(not enabled)]
    cfg = tiny_config(FASTER_RCNN, tmp_path, *options)
    Trainer.test(cfg, nn.Identity())

    class Probe(nn.Module):
        def forward(self, inputs: list[dict]) -> list[dict]:
            seen.append(torch.is_autocast_enabled("cpu"))
            return [{}]

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "height": 64, "width": 64, "annotations": []}
    mapper = build_mapper(cfg, is_train=False)
    pictures._draw_pair(cfg, Probe(), record, Artist(MetadataCatalog.get("amp")), mapper)
    assert seen == [enabled, enabled]


@pytest.mark.parametrize("fixed", ["0", "64"])
@pytest.mark.parametrize(("kind", "size"), [("relative", "(0.5, 0.25)"), ("absolute", "(32, 48)")])
def test_input_crop(tmp_path: Path, kind: str, size: str, fixed: str) -> None:
    """Check by pixels that training sees a part of an image, and evaluation the whole image."""
    ramp = np.arange(64, dtype=np.uint8)[:, None, None] * np.ones((1, 192, 3), np.uint8) * 4
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    record = {"file_name": str(tmp_path / "ramp.png"), "height": 64, "width": 192}
    record["annotations"] = []
    options = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size]
    cfg = tiny_config(FASTER_RCNN, tmp_path, "INPUT.FIXED_SIZE", fixed, *options)
    before = copy.deepcopy(record)
    shares = [
        float(np.ptp(build_mapper(cfg, is_train=training)(record)["image"].numpy())) / 252
        for training in (True, False)
    ]
    assert shares[0] == pytest.approx(0.5, abs=0.03)
    assert shares[1] > 0.97
    assert record == before


@pytest.mark.parametrize("key", ["MIXUP", "CUTMIX"])
def test_labels_of_mixed_images_are_smoothed_once(key: str, tmp_path: Path) -> None:
    cfg = load_config("Classification/Base-Classification.yaml", add_config=add_pretraining_config)
    cfg.MODEL.DEVICE, cfg.PRETRAIN.NUM_CLASSES, cfg.PRETRAIN.LABEL_SMOOTHING = "cpu", 4, 0.2
    cfg.PRETRAIN.NETWORK, cfg.PRETRAIN.RE_PROB = "OSA-5x43", 0.0
    smoothing = {}
    for alpha in (0.0, 1.0):
        cfg.PRETRAIN.MIXUP = cfg.PRETRAIN.CUTMIX = 0.0
        cfg.PRETRAIN[key] = alpha
        model = ClassifierTrainer.build_model(cfg)
        images, targets = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
        for augment in model.augmentations:
            images, targets = augment(images, targets)
        smoothed = float(1 - targets[0, 0]) * 4 / 3 if targets.dim() == 2 else 0.0
        smoothing[alpha] = model.label_smoothing, pytest.approx(smoothed)
    assert smoothing == {0.0: (0.2, 0.0), 1.0: (0.0, 0.2)}


# Seeds


def test_seeds_of_steps_and_samples_all_differ() -> None:
    steps = {step_seed(s, i, rank) for s in range(3) for i in range(3) for rank in range(3)}
    samples = {sample_seed(s, position) for s in range(3) for position in range(3)}
    assert (len(steps), len(samples), len(steps | samples)) == (27, 9, 36)


def test_the_seed_of_a_step_depends_on_seed_iteration_and_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds = []
    monkeypatch.setattr(trainer, "seed_all", seeds.append)
    monkeypatch.setattr(DefaultTrainer, "run_step", lambda self: None)
    cases = [(7, 0, 0), (7, 0, 1), (7, 1, 0), (8, 0, 0)]
    for seed, iteration, rank in cases:
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        place, statistics = Place(seed, 0, 0, 2, 2), nonfinite.KeptStatistics(nn.Identity())
        parts = {"_place": place, "_statistics": statistics, "cfg": None}
        bare_trainer(**parts, iter=iteration).run_step()
    assert seeds == [step_seed(*case) for case in cases]


def test_precise_bn_has_batches_by_the_seed_of_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks.PreciseBN, "update_stats", lambda self: None)
    monkeypatch.setattr("vovnet_d2.engine.hooks.TrainingStream", SimpleNamespace)
    for seed in (3, 4):
        hook = object.__new__(PreciseBN)
        hook._data_loader = SimpleNamespace(place=Place(0, 0, 0, 2, 1))
        hook.trainer = SimpleNamespace(seed=seed, cfg=load_config("Digits/Base-Mask-RCNN-FPN.yaml"))
        hook.update_stats()
        assert hook._data_loader.place.seed == seed


# Several processes, and resuming


def test_buffers_are_shared_before_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that processes evaluate the norms of the first one, also in averaged weights."""
    model, averaged = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    model.running_mean.fill_(5.0)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)

    def broadcast(tensor: torch.Tensor, source: int) -> None:
        assert source == 0
        tensor.fill_(1)  # the value of the first process

    monkeypatch.setattr(trainer.dist, "broadcast", broadcast)
    inner = SimpleNamespace(model=model)
    made = bare_trainer(
        cfg=load_config("Digits/Base-Mask-RCNN-FPN.yaml"),
        _trainer=inner,
        _request=StopRequest(),
        _average=SimpleNamespace(model=averaged),
        gather_rank_states=lambda: None,
    )
    found = made._interruptible(lambda: [*model.buffers(), *averaged.buffers()])()
    assert len(found) == 6
    assert all((buffer == 1).all() for buffer in found)


@pytest.mark.parametrize("others", [1.0, float("nan")])
def test_a_nonfinite_loss_of_another_process_counts(
    others: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let another process report a loss, which is NaN in one case."""

    def all_gather(rows: list[torch.Tensor], own: torch.Tensor, group: Any) -> None:
        rows[0].copy_(own)
        rows[1].copy_(own)
        rows[1][0] = others != others

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "_get_global_gloo_group", lambda: None)
    monkeypatch.setattr(comm, "all_gather", lambda own: [own, ({"loss": others}, "", None)])
    monkeypatch.setattr(agreed_steps.dist, "all_gather", all_gather)
    layer = nn.Linear(1, 1)
    made = agreed_steps.AgreedSteps(layer, [], torch.optim.SGD(layer.parameters(), lr=1.0))
    if others == others:
        made._agree({"loss": 1.0}, 0.0, "")
        return
    with pytest.raises(nonfinite.NonFiniteLossError, match="loss is nan"):
        made._agree({"loss": 1.0}, 0.0, "")


def test_each_process_resumes_with_its_own_loss_normalizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Load normalizers of as many processes, and of more processes, which gives the mean."""
    detector = object.__new__(DenseDetector)
    nn.Module.__init__(detector)
    model = nn.ModuleDict({"a": detector})
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    write_loss_normalizers(model, [{"a": 1.0}, {"a": 3.0}])
    assert detector.loss_normalizer == 3.0
    write_loss_normalizers(model, [{"a": 1.0}, {"a": 3.0}, {"a": 8.0}])
    assert detector.loss_normalizer == 4.0


def test_accuracy_counts_the_images_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    others = torch.tensor([30, 9, 24])  # images, top-1 hits, top-5 hits
    monkeypatch.setattr(classifier.comm, "gather", lambda own: [own, others])
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    evaluator.process((torch.empty(0), torch.arange(10)), torch.eye(10))
    assert evaluator.evaluate() == {
        "classification": {"top1": 100 * (10 + 9) / 40, "top5": 100 * (10 + 24) / 40}
    }


def test_a_process_evaluates_its_share_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config("Classification/Base-Classification.yaml", add_config=add_pretraining_config)
    cfg.PRETRAIN.DATA, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = "digits", 12, 0
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    assert ClassifierTrainer.build_test_loader(cfg, "val").batch_size == 4


def test_processes_share_the_label_maps(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = [{"file_name": f"{i}.jpg", "sem_seg_file_name": f"{i}.png"} for i in range(7)]
    DatasetCatalog.register("maps", lambda: maps)
    seen: list[str] = []

    def count(part: list[dict], title: str) -> LabelCounts:
        seen.extend(record["sem_seg_file_name"] for record in part)
        counts = LabelCounts()
        counts.add("a.png", {0: 1}, "")
        return counts

    monkeypatch.setattr(semantic_data, "count_labels", count)
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    monkeypatch.setattr(comm, "all_gather", lambda own: [own])
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        cfg = load_config("COCO-SemanticSegmentation/semantic_V_39_FPN_1x.yaml")
        semantic_data.check_label_maps(cfg, "maps")
    assert sorted(seen) == [f"{i}.png" for i in range(7)]


def test_a_resumed_training_keeps_its_time_and_skipped_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DefaultTrainer, "load_state_dict", lambda self, state: None)
    place = Place(7, 0, 0, 2, 1)
    made = bare_trainer(
        scheduler=SimpleNamespace(base_lrs=[]),
        cfg=SimpleNamespace(SEED=-1),
        checkpointer=SimpleNamespace(model=nn.Identity()),
        earlier_seconds=0.0,
        _place=place,
        _skipped_steps=0,
    )
    stream = {"seed": 9, "origin": 4, "batches": 3, "batch_size": 2, "num_processes": 1}
    made.load_state_dict({"seconds": 5.5, "skipped_steps": 2, "stream": stream, "ranks": []})
    assert (made.earlier_seconds, made._skipped_steps) == (5.5, 2)
    assert made.seed == 9
    made.cfg.SEED = 3  # a seed in the config replaces the drawn seed
    made._place = place
    made.load_state_dict({"seconds": 5.5, "skipped_steps": 2, "stream": stream, "ranks": []})
    assert made.seed == 3


@pytest.mark.parametrize(("metric", "best"), [("bbox/AP", 40.0), ("segm/AP", None)])
def test_the_best_value_of_another_metric_is_ignored(
    metric: str, best: float | None, tmp_path: Path
) -> None:
    path = tmp_path / "model_best.pth"
    content = {"model": {"w": torch.ones(1)}, "metric": "bbox/AP", "value": 40.0, "iteration": 9}
    torch.save(content, path)
    hook = BestCheckpointer(10, nn.Linear(1, 1), str(tmp_path), metric)
    hook.trainer = SimpleNamespace(start_iter=10)
    hook._read_best()
    assert hook.best_metric == best


def test_an_evaluation_to_nan_is_not_the_best(tmp_path: Path) -> None:
    """Evaluate to NaN first. No number is greater than NaN, so it must not become the best."""
    hook = BestCheckpointer(1, nn.Linear(1, 1), str(tmp_path), "bbox/AP")
    for iteration, value in enumerate((math.nan, 20.0)):
        with EventStorage(iteration) as storage:
            storage.put_scalar("bbox/AP", value)
            hook.trainer = SimpleNamespace(start_iter=0, iter=iteration, storage=storage)
            hook._check_what_is_new()
        assert (tmp_path / "model_best.pth").exists() == math.isfinite(value)
    assert (hook.best_metric, hook.best_iter) == (20.0, 1)


# Limits and selections


def detections(scores: list[float]) -> Instances:
    boxes = Boxes(torch.tensor([[1.0, 1.0, 9.0, 9.0]] * len(scores)))
    classes = torch.zeros(len(scores), dtype=torch.long)
    return Instances((64, 64), pred_boxes=boxes, scores=torch.tensor(scores), pred_classes=classes)


def test_a_score_at_the_threshold_is_shown() -> None:
    metadata = MetadataCatalog.get("threshold")
    shown = Selection(metadata, min_score=0.5)({"instances": detections([0.49, 0.5, 0.51])})
    assert shown.instances.scores.tolist() == pytest.approx([0.5, 0.51])
    segments = [{"isthing": False, "category_id": 0, "score": s, "id": 1} for s in (0.49, 0.5)]
    segments.append({"isthing": False, "category_id": 0, "id": 2})  # without a score
    shown = Selection(metadata, min_score=0.5)({"panoptic_seg": (torch.zeros(1), segments)})
    assert [segment.get("score") for segment in shown.panoptic[1]] == [0.5, None]


@pytest.mark.parametrize(("start", "made_up"), [(4, False), (6, False), (8, True)])
def test_an_evaluation_of_another_iteration_is_no_substitute(
    tmp_path: Path, start: int, made_up: bool
) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": 3, "bbox/AP": 1.0}\n')
    evaluated: list[int] = []
    storage = SimpleNamespace(iter=start)
    hook = EvalHook(
        4, lambda: evaluated.append(storage.iter), metric="bbox/AP", folder=str(tmp_path)
    )
    hook.trainer = SimpleNamespace(start_iter=start, max_iter=20, storage=storage)
    hook.before_train()
    assert evaluated == [start - 1] * made_up
    assert storage.iter == start


@pytest.fixture
def twenty(catalogs: None, tmp_path: Path) -> Iterator[CfgNode]:
    """Register a data set of twenty images, and return a config that evaluates on it."""
    for number in range(20):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number:02d}.png")
    annotation = {"bbox": [1, 1, 9, 9], "bbox_mode": 1, "category_id": 0}
    records = [
        {"file_name": str(path), "height": 64, "width": 64, "annotations": [annotation]}
        for path in sorted(tmp_path.glob("*.png"))
    ]
    DatasetCatalog.register("twenty", lambda: records)
    MetadataCatalog.get("twenty").set(thing_classes=["a"])
    return tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TEST", "('twenty',)")


def test_pictures_show_images_from_all_over_a_set(
    twenty: CfgNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = []

    def note(cfg: CfgNode, model: nn.Module, record: dict, *_: Any) -> np.ndarray:
        drawn.append(int(Path(record["file_name"]).stem))
        return np.zeros((4, 8, 3), np.uint8)

    monkeypatch.setattr(pictures, "_draw_pair", note)
    with caplog.at_level("INFO"):
        pictures.draw_predictions(twenty, nn.Identity())
    assert caplog.text.count("Augmentations used in inference") == 1
    annotated = [int(Path(d.name).stem) for d in draw_annotations("twenty", number=4)]
    for numbers in (drawn, annotated):
        assert len(set(numbers)) == len(numbers) > 2
        assert np.ptp(np.histogram(numbers, bins=2, range=(0, 20))[0]) <= 1, numbers
        assert max(numbers) >= 15


def test_pictures_show_images_with_objects(
    twenty: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    pair = np.zeros((4, 8, 3), np.uint8)
    monkeypatch.setattr(
        pictures, "_draw_pair", lambda *words: drawn.append(words[2]["file_name"]) or pair
    )
    all_records = DatasetCatalog.get("twenty")
    for without in (all_records[::2], all_records):
        for record in without:
            record["annotations"] = []
        drawn.clear()
        pictures.draw_predictions(twenty, nn.Identity())
        with_objects = {r["file_name"] for r in all_records if r["annotations"]}
        assert drawn
        assert set(drawn) <= (with_objects or set(drawn))


def are_spread(numbers: list[int], total: int) -> bool:
    """Return True if the numbers are different and evenly spread over the quarters of a set."""
    counts = np.histogram(numbers, bins=4, range=(0, total))[0]
    return len(set(numbers)) == len(numbers) >= 4 and np.ptp(counts) <= 1


def test_the_rehearsal_uses_images_from_all_over_a_set(
    twenty: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [{"file_name": f"{number}.png", "annotations": []} for number in range(400)]
    rehearsed: list[list[int]] = []

    def note(evaluator: Any, cfg: CfgNode, chosen: list[dict], *, perfect: bool) -> None:
        rehearsed.append([int(Path(record["file_name"]).stem) for record in chosen])

    monkeypatch.setattr(rehearsal, "_run", note)
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: many)
    monkeypatch.setattr(rehearsal, "check_files", lambda *_, **options: None)
    monkeypatch.setattr(rehearsal, "has_size_of_file", lambda record: True)
    MetadataCatalog.get("twenty").set(evaluator_type="coco")
    maker = SimpleNamespace(build_evaluator=lambda cfg, name: None)
    rehearsal.rehearse_evaluation(twenty, maker)
    assert len(rehearsed) == 2
    assert all(are_spread(numbers, 400) and len(numbers) == 50 for numbers in rehearsed)


def test_headers_are_read_all_over_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def refuse(file: str) -> None:
        seen.append(int(file))
        raise ValueError(file)

    monkeypatch.setattr(record_files, "_is_there", lambda record: True)
    monkeypatch.setattr(record_files, "read_header", refuse)
    monkeypatch.setattr(record_files, "_MAX_HEADERS", 60)
    records = [{"file_name": str(number)} for number in range(1000)]
    record_files.check_files(records, "set", most_unusable=1000)
    assert are_spread(sorted(seen), 1000)
    assert len(seen) == 60


def test_readings_are_compared_on_images_from_all_over_a_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def note(files: list[tuple[str, list]]) -> int:
        seen.extend(int(path) for path, _ in files)
        return 1

    monkeypatch.setattr(frames, "compare_readings", note)
    file = ImageFile(stored_size=(64, 64))
    pairs = [({}, frames.Frame(f"{n}.png", str(n), file, (64, 64))) for n in range(1000)]
    samples = {n: Sample([1, 2, 3, 4], (64, 64), None, None) for n in range(1000)}
    corners = Convention("x1, y1, x2, y2", "pixels")
    assert frames._tell_apart([COCO, corners], samples, pairs) == [corners]
    assert are_spread(seen, 1000)


def test_similar_images_are_searched_all_over_a_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        leakage, "near_pairs", lambda sample, files: seen.extend(map(int, sample)) or []
    )
    assert not leakage._look_alike({str(number): None for number in range(2000)})
    assert are_spread(seen, 2000)
    assert len(seen) == 500


@pytest.mark.parametrize(("bits", "near"), [(0, True), (16, True), (17, False), (128, False)])
def test_the_limit_of_near_duplicates(bits: int, near: bool) -> None:
    """Check that 16 of the 256 bits of a look may differ."""
    look = np.random.default_rng(0).integers(0, 2**64, 4, dtype=np.uint64)
    mask = np.packbits(np.random.default_rng(1).permutation(np.arange(256) < bits)).view(np.uint64)
    mine = {"a.png": SimpleNamespace(digest=b"1", look=look)}
    other = {"b.png": SimpleNamespace(digest=b"2", look=look ^ mask)}
    findings = Findings()
    assert compare_files(mine, other, findings) == set()
    assert ("near_duplicate" in findings.examples) == near
