# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The stream of training samples equals that of Detectron2, and can begin at any sample."""

import itertools
import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.common import AspectRatioGroupedDataset, DatasetFromList, MapDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from engine_runs import FASTER_RCNN, MASK_RCNN, tiny_config
from PIL import Image
from torch.utils.data import DataLoader

from vovnet_d2.data import stream
from vovnet_d2.data.stream import (
    Place,
    TrainingStream,
    build_detection_stream,
)
from vovnet_d2.data.workers import attend_to_workers, dismiss_workers, stay_until_dismissed
from vovnet_d2.engine import Trainer, load_config
from vovnet_d2.engine.classifier import ClassifierTrainer
from vovnet_d2.engine.interruption import exit_on_signal, handle_signals
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.engine.lazy import LazyTrainer, build_train_stream
from vovnet_d2.engine.lazy_config import load_lazy_config, to_cfg
from vovnet_d2.engine.pretrain import add_pretraining_config
from vovnet_d2.engine.run_log import _is_surprise
from vovnet_d2.signals import ending_signals

pytest_plugins = ["engine_fixtures"]

RNG = np.random.default_rng(0)
SIZES = RNG.integers(40, 60, (23, 2)).tolist()
RECORDS = [{"file_name": f"{i}.jpg", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)]
FACTORS = torch.tensor(RNG.uniform(1, 3, 23))
SAMPLERS: dict[str, Callable[..., Any]] = {
    "shuffled": lambda **seed: TrainingSampler(23, **seed),
    "repeated": lambda **seed: RepeatFactorTrainingSampler(FACTORS, **seed),
}


class Records(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(RECORDS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return RECORDS[index]


def augment(record: dict[str, Any]) -> dict[str, Any]:
    """Draw from every global random generator."""
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    return record | {"drawn": drawn}


def build(sampler: str = "shuffled", batch_size: int = 4, **options: Any) -> TrainingStream:
    options = {"collate_fn": list, "seed": 7, "mapper": augment} | options
    return TrainingStream(Records(), SAMPLERS[sampler], batch_size, **options)


def take(stream: TrainingStream, number: int) -> list[Any]:
    return list(itertools.islice(iter(stream), number))


@pytest.fixture
def rank_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def become(rank: int, world: int) -> None:
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world)
        monkeypatch.setattr(comm, "all_gather", lambda value: [value] * world)

    return become


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_equal_those_of_detectron2(
    rank_of: Callable[[int, int], None], sampler: str, grouped: bool, world: int
) -> None:
    positions = []
    for rank in range(world):
        rank_of(rank, world)
        stream = build(sampler, 4 * world, group_by_shape=grouped)
        batches = list(itertools.islice(stream.batches(stream.place), 30))
        np.random.seed(7)  # noqa: NPY002
        seed = comm.shared_random_seed()
        indices = iter(SAMPLERS[sampler](seed=seed))
        if grouped:
            records = ({"index": i, **RECORDS[i]} for i in indices)
            expected = iter(AspectRatioGroupedDataset(records, 4))
            expected = [[record["index"] for record in next(expected)] for _ in batches]
        else:
            expected = [list(itertools.islice(indices, 4)) for _ in batches]
        assert [[index for _, index in batch] for batch in batches] == expected
        positions += [position for batch in batches for position, _ in batch]
    assert len(set(positions)) == len(positions) == 30 * 4 * world
    if not grouped:
        assert sorted(positions) == list(range(len(positions)))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_stream_can_begin_at_any_place(grouped: bool) -> None:
    whole = take(build(group_by_shape=grouped), 20)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    for batches in (0, 1, 7, 19):
        stream = build(group_by_shape=grouped, num_workers=2 if batches == 7 else 0)
        stream.place = Place(7, 0, batches, 4, 1)
        assert take(stream, 20 - batches) == whole[batches:]
    # The global generators have not changed.
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert now == states
    drawn = [record["drawn"] for batch in whole for record in batch]
    assert len({tuple(values) for values in drawn}) == len(drawn)
    assert take(build(seed=8, group_by_shape=grouped), 20) != whole


def test_another_division_uses_no_sample_twice(rank_of: Callable[[int, int], None]) -> None:
    before = build(batch_size=4)
    used = [
        sample for batch in itertools.islice(before.batches(before.place), 5) for sample in batch
    ]
    place = Place(7, 0, 5, 4, 1).shared_by(2, batch_size=6)
    assert place == Place(7, 20, 0, 6, 2)
    assert Place(7, 20, 3, 6, 2).num_samples == 38
    for rank in range(2):
        rank_of(rank, 2)
        used += itertools.chain(*itertools.islice(build(batch_size=6).batches(place), 4))
    rank_of(0, 1)
    indices = itertools.islice(build().batches(Place(7, 0, 0, 1, 1)), len(used))
    assert sorted(used) == list(itertools.chain(*indices))


@pytest.mark.parametrize("trainer", ["yaml", "lazy", "classifier"])
def test_batches_are_pinned_if_the_network_is_on_a_gpu(
    trainer: str, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check both devices, because a machine with a GPU may train on its CPU."""
    made: list[dict[str, Any]] = []
    kind: type[Trainer] = Trainer
    cfg = tiny_config(FASTER_RCNN, tmp_path)
    if trainer == "classifier":
        file = "Classification/V_19_slim_eSE_digits.yaml"
        kind, cfg = ClassifierTrainer, load_config(file, add_config=add_pretraining_config)
    elif trainer == "lazy":
        config = load_lazy_config("lazy/COCO-Detection/retinanet_V_39_eSE_FPN_1x.py")
        kind, cfg = LazyTrainer.of(config), to_cfg(config)
    monkeypatch.setattr(
        stream, "DataLoader", lambda *_, **options: made.append(options) or MagicMock()
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cuda", "cpu", "cuda:1"):
        cfg.MODEL.DEVICE = device
        iter(kind.build_train_loader(cfg))
    assert [options["pin_memory"] for options in made] == [True, False, True]


def test_unusable_items_are_replaced() -> None:
    def mapper(record: dict[str, Any]) -> dict[str, Any] | None:
        return None if int(record["file_name"][:-4]) % 2 else augment(record)

    batches = take(build(mapper=mapper), 12)
    assert take(build(mapper=mapper, num_workers=2), 12) == batches
    assert {int(record["file_name"][:-4]) % 2 for batch in batches for record in batch} == {0}
    untouched = take(build(), 12)
    for found, plain in zip(itertools.chain(*batches), itertools.chain(*untouched), strict=True):
        assert (found == plain) == (mapper(plain) is not None)
    with pytest.raises(ValueError, match="cannot be used, and neither can 100 other"):
        take(build(mapper=lambda record: None), 1)


def test_missing_shapes_are_read_from_the_files(tmp_path: Path) -> None:
    records = []
    for turned in (False, True):
        exif = Image.Exif()
        exif[0x0112] = 6 if turned else 1
        path = tmp_path / f"{turned}.jpg"
        Image.new("RGB", (30, 20)).save(path, exif=exif)
        records.append({"file_name": str(path)})
    stream = build_detection_stream(
        tiny_config(MASK_RCNN, tmp_path), dataset=records, mapper=lambda record: record
    )
    batches = itertools.islice(stream.batches(stream.place), 8)
    assert {tuple(index for _, index in batch) for batch in batches} == {(0, 0), (1, 1)}


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_have_one_shape_if_the_config_says_so(tmp_path: Path, grouped: bool) -> None:
    options = ["SEED", "3", "DATALOADER.ASPECT_RATIO_GROUPING", str(grouped)]
    cfg = tiny_config(MASK_RCNN, tmp_path, *options)
    wide, high = {"height": 4, "width": 8}, {"height": 8, "width": 4}
    records = [{"file_name": f"{i}.jpg"} | (wide if i % 2 else high) for i in range(16)]
    stream = build_detection_stream(cfg, mapper=augment, dataset=records)
    batches = itertools.islice(stream.batches(replace(stream.place, seed=3)), 16)
    assert all(len({index % 2 for _, index in batch}) == 1 for batch in batches) == grouped


def test_the_loader_of_detectron2_reads_the_same_images(coco: Path, tmp_path: Path) -> None:
    cfg = tiny_config(MASK_RCNN, tmp_path, "SEED", "3")
    np.random.seed(3)  # noqa: NPY002
    # A given sampler has the same seed in all versions of Detectron2.
    number = len(get_detection_dataset_dicts(cfg.DATASETS.TRAIN))
    sampler = TrainingSampler(number, seed=comm.shared_random_seed())
    theirs = itertools.islice(iter(build_detection_train_loader(cfg, sampler=sampler)), 6)
    ours = take(build_detection_stream(cfg), 6)
    for found, expected in zip(ours, theirs, strict=True):
        assert [r["file_name"] for r in found] == [r["file_name"] for r in expected]
        for record, other in zip(found, expected, strict=True):
            assert record["image"].shape == other["image"].shape
            assert len(record["instances"]) == len(other["instances"])


@pytest.mark.parametrize("seeded_by_config", [False, True], ids=["older", "newer"])
def test_yaml_and_lazy_trainings_of_one_seed_have_one_order(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeded_by_config: bool
) -> None:
    """Check older and newer versions of Detectron2. Newer ones pass ``SEED`` on, even -1."""
    cfg = tiny_config(MASK_RCNN, tmp_path, "SEED", "-1")
    records = [{"file_name": f"{i}.jpg", "height": 4, "width": 4} for i in range(50)]
    from_config = build_detection_train_loader.from_config

    def newer(cfg: Any, **options: Any) -> dict[str, Any]:
        sampler = TrainingSampler(50, seed=cfg.SEED)
        return from_config(cfg, **options) | {"sampler": sampler}

    if seeded_by_config:
        monkeypatch.setattr(build_detection_train_loader, "from_config", newer)

    def order(stream: TrainingStream, seed: int) -> list[int]:
        batches = itertools.islice(stream.batches(replace(stream.place, seed=seed)), 20)
        return [index for batch in batches for _, index in batch]

    yaml = build_detection_stream(cfg, mapper=augment, dataset=records)
    lazy = build_train_stream(records, mapper=augment, total_batch_size=cfg.SOLVER.IMS_PER_BATCH)
    assert order(yaml, 3) == order(yaml, 3) == order(lazy, 3)
    assert order(yaml, 4) == order(lazy, 4) != order(yaml, 3)


@pytest.mark.parametrize("loader", ["training", "evaluation"])
def test_a_worker_that_does_not_answer_ends_the_run(
    loader: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Let a worker sleep longer than the timeout. The run must end, and not wait for it."""
    monkeypatch.setenv("VOVNET_D2_TIMEOUT", "1")
    images = DatasetFromList([0])
    batches: Any = TrainingStream(
        images, lambda: itertools.repeat(0), 1, mapper=_sleep, num_workers=1
    )
    if loader == "evaluation":
        batches = attend_to_workers(DataLoader(MapDataset(images, _sleep), num_workers=1))
    iterator = iter(batches)
    with pytest.raises(SystemExit) as ended:
        run_or_exit(lambda _: next(iterator), None)
    # Wait until the worker ends. If it was killed, torch would raise an error in a later test.
    iterator._shutdown_workers()
    assert ended.value.code == 1
    error = ended.value.__context__
    facts = {"exc_info": (type(error), error, None)}
    assert not _is_surprise(logging.makeLogRecord(facts))  # so there is no traceback in the log
    told = capfd.readouterr().err
    assert told.startswith("error: DataLoader timed out after 1.0 seconds: a process that loads")


def _sleep(item: int) -> int:
    time.sleep(2)
    return item


def _stay(ready: Any) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    stay_until_dismissed(0)
    ready.set()
    for _ in range(100):  # on some systems a signal ends a sleep
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_worker_outlives_the_signals_of_a_job(name: str) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_stay, args=(ready,))
    worker.start()
    try:
        assert worker.pid is not None
        assert ready.wait(30)
        os.kill(worker.pid, getattr(signal, name))
        worker.join(0.5)
        assert worker.exitcode is None
    finally:
        worker.kill()
        worker.join()


def test_remaining_workers_are_ended() -> None:
    """End workers that ignore the signal from Python, which would wait for them."""
    context = multiprocessing.get_context("fork")
    before = signal.getsignal(signal.SIGCHLD)
    processes = []
    try:
        for daemon in (True, False):
            ready = context.Event()
            processes.append(context.Process(target=_stay, args=(ready,), daemon=daemon))
            processes[-1].start()
            assert ready.wait(30)
        worker, other = processes
        dismiss_workers()
        worker.join(5)
        assert worker.exitcode == -signal.SIGKILL
        other.join(0.2)
        assert other.exitcode is None  # another process is not ended, and Python waits for it
    finally:
        signal.signal(signal.SIGCHLD, before)
        for process in processes:
            process.kill()
            process.join(5)


@contextmanager
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulate the signals of Windows, and restore names and handlers after the test."""
    handlers = {number: signal.getsignal(number) for number in ending_signals()}
    try:
        with monkeypatch.context() as patch:
            for name in ("SIGUSR1", "SIGHUP", "SIGALRM", "alarm"):
                patch.delattr(signal, name)
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_signals_that_the_system_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    with windows(monkeypatch):
        assert ending_signals() == [signal.SIGTERM, signal.SIGINT]
        with handle_signals(lambda number, frame: None), exit_on_signal():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        stay_until_dismissed(0)
        assert {signal.getsignal(n) for n in ending_signals()} == {signal.SIG_IGN}


def test_an_ignored_hang_up_ends_nothing() -> None:
    """Ignore SIGHUP, as nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert signal.SIGHUP in ending_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in ending_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_square_images_are_grouped_with_high_ones() -> None:
    """Compare with Detectron2's loader, whose groups are images wider than high, and all others."""
    sizes = [(64, 64), (64, 65), (65, 64)]  # width, height
    records = DatasetFromList([{"width": w, "height": h} for w, h in sizes])
    stream = TrainingStream(records, lambda: iter(range(3)), 1, group_by_shape=True)
    assert [stream._is_wide[i] for i in range(3)] == [False, False, True]  # type: ignore[index]


def test_square_images_are_recognised_by_their_files(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{w}x{h}.png") for w, h in ((9, 9), (9, 10), (10, 9))]
    for name in names:
        width, height = map(int, Path(name).stem.split("x"))
        Image.new("L", (width, height)).save(name)
    records = DatasetFromList([{"file_name": name} for name in names])
    stream = TrainingStream(records, lambda: iter(range(3)), 1, group_by_shape=True)
    assert [stream._is_wide[i] for i in range(3)] == [False, False, True]  # type: ignore[index]
