# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The endless stream of training samples, which can be entered at any place.

Samples have positions: 0, 1, 2, ... over all processes. Which image stands at a position and how it
is augmented are functions of the seed and the position alone. So a training that was interrupted
goes on with the samples, to the bit, that it would have had, however many workers load them, and
none of their state is saved.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.common import DatasetFromList
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..signals import ending_signals

__all__ = [
    "Place",
    "TrainingStream",
    "build_detection_stream",
    "sample_seed",
    "seed_all",
    "seeded",
    "stay_until_dismissed",
    "step_seed",
]

_ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height are exchanged
_NUM_REPLACEMENTS = 100
_FAREWELL = 300  # seconds, in which the step at hand ends
_LAST_FAREWELL = 1  # seconds, where the main process ends

Sample = tuple[int, int]  # position, index in the data set


def sample_seed(seed: int, position: int) -> int:
    """What the augmentation of the sample at a position of the stream is seeded with."""
    return _derive_seed(seed, 1, position)


def step_seed(seed: int, iteration: int, rank: int) -> int:
    """What the model's randomness in an iteration is seeded with, in the process of this rank."""
    return _derive_seed(seed, 2, iteration, rank)


def _derive_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, those of GPUs included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (augmentations draw from it)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """:func:`seed_all` for a while; then the CPU's generators go on as if nothing had been."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@dataclass(frozen=True)
class Place:
    """Where a process is in the stream.

    Batches of images grouped by their shape depend on those before, so a place is told by where
    this division into batches began and how many there have been.

    Attributes:
        seed: of the stream.
        origin: position from which on samples were divided into batches like this.
        batches: how many of these have been used.
        batch_size: samples in a batch of all processes.
        num_processes: that these are shared by.
    """

    seed: int
    origin: int
    batches: int
    batch_size: int
    num_processes: int

    @property
    def num_samples(self) -> int:
        """Samples used since the beginning of the training, over all processes."""
        return self.origin + self.batches * self.batch_size

    def shared_by(self, num_processes: int, *, batch_size: int) -> Place:
        """The place from which as many processes with such batches go on: the same, if that is
        what there was. Otherwise no sample before it is used again; of images grouped by their
        shape, the few that waited for others are left out."""
        if (num_processes, batch_size) == (self.num_processes, self.batch_size):
            return self
        return Place(self.seed, self.num_samples, 0, batch_size, num_processes)


class TrainingStream:
    """An iterable over the batches of this process, from :attr:`place` on."""

    def __init__(
        self,
        dataset: Dataset[Any],
        build_sampler: Callable[[], Sampler[int]],
        batch_size: int,
        *,
        mapper: Callable[[Any], Any] | None = None,
        group_by_shape: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        **loader_options: Any,
    ):
        """
        Args:
            dataset: what the indices of the sampler select from.
            build_sampler: makes one of Detectron2's training samplers, all of whose randomness
                must follow from NumPy's global generator. Called in all processes.
            batch_size: over all processes, whose number divides it.
            mapper: what is done to a selected item. It may return None, for one that cannot be
                used: another takes its place.
            group_by_shape: have images that are wider than high in batches of their own; items of
                the data set are then dicts with "width" and "height", or "file_name".
            num_workers: see :class:`torch.utils.data.DataLoader`; as are ``loader_options``.
            seed: the one to start with.
        """
        self.dataset = dataset
        self.place = Place(seed, 0, 0, batch_size, comm.get_world_size())
        self._build_sampler = build_sampler
        self.mapper = mapper
        self._is_wide = _ShapeLookup(dataset) if group_by_shape else None
        self._num_workers = num_workers
        self._loader_options = loader_options

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            _Samples(self.dataset, self.mapper, self.place.seed),
            batch_sampler=_Batches(lambda: self.batches(self.place)),
            num_workers=self._num_workers,
            worker_init_fn=stay_until_dismissed,
            # The global one would be advanced by each start of an iterator.
            generator=torch.Generator().manual_seed(0),
            **self._loader_options,
        )
        return iter(loader)

    def batches(self, place: Place) -> Iterator[list[Sample]]:
        """What this process's batches from ``place`` on are made of; no image is read for it."""
        with seeded(place.seed):
            sampler = self._build_sampler()
        # Detectron2's samplers give process i of n the indices at positions i, i + n, i + 2n, ...
        positions = itertools.count(comm.get_rank(), place.num_processes)
        samples: Iterator[Sample] = zip(positions, iter(sampler), strict=False)
        samples = itertools.dropwhile(lambda sample: sample[0] < place.origin, samples)
        batches = self._divide(samples, place.batch_size // place.num_processes)
        return itertools.islice(batches, place.batches, None)

    def name(self, index: int) -> str:
        """Where the item of the data set is from, as far as can be told."""
        if hasattr(self.dataset, "samples"):  # torchvision's folders of images
            return str(self.dataset.samples[index][0])
        if isinstance(self.dataset, DatasetFromList):
            return str(self.dataset[index].get("file_name", f"image {index}"))
        return f"image {index}"

    def _divide(self, samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
        groups: tuple[list[Sample], list[Sample]] = ([], [])
        for sample in samples:
            group = groups[self._is_wide is not None and self._is_wide[sample[1]]]
            group.append(sample)
            if len(group) == size:
                yield group.copy()
                group.clear()


class _Batches(Sampler[list[Sample]]):
    def __init__(self, start: Callable[[], Iterator[list[Sample]]]):
        self._start = start

    def __iter__(self) -> Iterator[list[Sample]]:
        return self._start()


class _ShapeLookup:
    """Whether images are wider than high, by their index; each is looked up once."""

    def __init__(self, dataset: Dataset[Any]):
        self._dataset = dataset
        self._known = bytearray(len(dataset))  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> bool:
        if not self._known[index]:
            self._known[index] = 1 + self._look_up(self._dataset[index])
        return self._known[index] == 2

    @staticmethod
    def _look_up(record: dict[str, Any]) -> bool:
        if "width" in record:
            return record["width"] > record["height"]
        with Image.open(record["file_name"]) as image:  # its header only
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return height > width if turned else width > height


class _Samples(Dataset[Any]):
    """Items by position and index, augmented by what follows from the seed and the position."""

    def __init__(self, dataset: Dataset[Any], mapper: Callable[[Any], Any] | None, seed: int):
        self._dataset = dataset
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, sample: Sample) -> Any:
        position, index = sample
        seed = sample_seed(self._seed, position)
        with seeded(seed):
            if (item := self._get(index)) is not None:
                return item
        return self._replace(index, seed)

    def _get(self, index: int) -> Any:
        item = self._dataset[index]
        return self._mapper(item) if self._mapper else item

    def _replace(self, index: int, seed: int) -> Any:
        rng = random.Random(seed)
        for _ in range(_NUM_REPLACEMENTS):
            other = rng.randrange(len(self._dataset))  # type: ignore[arg-type]
            with seeded(seed):
                if (item := self._get(other)) is not None:
                    return item
        raise ValueError(
            f"Image {index} of the training data cannot be used, nor can any of "
            f"{_NUM_REPLACEMENTS} others that were tried in its place: tools/check_dataset.py "
            "lists what is wrong with images."
        )


def stay_until_dismissed(worker: int) -> None:
    """Signals that go to all processes of a job are for the main one to act upon: a worker that
    ended at once would make it fail before it has saved anything. Called in the worker."""
    if not hasattr(signal, "SIGALRM"):  # Windows, where a worker ends with the main process
        for number in ending_signals():
            signal.signal(number, signal.SIG_IGN)
        return
    for number in ending_signals():
        signal.signal(number, lambda *_: signal.alarm(_FAREWELL))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # if not dismissed before


@atexit.register
def dismiss_workers() -> None:
    """End the workers that are left when Python ends, as after an error in an evaluation. Otherwise
    multiprocessing would wait for them, and they would stay (:func:`stay_until_dismissed`)."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for an accident
    for worker in workers:
        worker.terminate()
    end = time.monotonic() + _LAST_FAREWELL
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
        worker.kill()


def build_detection_stream(
    cfg: CfgNode,
    *,
    mapper: Callable[[dict[str, Any]], Any] | None = None,
    dataset: list[dict[str, Any]] | Dataset[Any] | None = None,
) -> Any:
    """As :func:`detectron2.data.build_detection_train_loader`, for all its samplers.

    Args:
        cfg: its ``DATASETS``, ``DATALOADER`` and ``SOLVER.IMS_PER_BATCH`` tell all else.
        mapper: by default Detectron2's; its randomness must come from Python's, NumPy's and
            PyTorch's global generators.
        dataset: by default that of ``DATASETS.TRAIN``.

    Returns:
        a :class:`TrainingStream`; or where the data are an :class:`IterableDataset`, whose order
        is its own, Detectron2's loader.
    """
    parts = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)
    records, mapper = parts["dataset"], parts["mapper"]
    if isinstance(records, IterableDataset):
        return build_detection_train_loader(cfg, mapper=mapper, dataset=records)
    if isinstance(records, list):
        records = DatasetFromList(records, copy=False)  # in memory that the workers share

    # Newer versions of Detectron2 seed some samplers by SEED itself, which is -1 in every training
    # that draws its seed. Without a SEED they draw one from NumPy's generator, as all others do.
    unseeded = cfg.clone()
    unseeded.defrost()
    unseeded.SEED = None

    def build_sampler() -> Sampler[int]:
        options = {"mapper": mapper, "dataset": records}
        with _silenced(logging.getLogger("detectron2.data.build")):  # it has named the sampler
            return build_detection_train_loader.from_config(unseeded, **options)["sampler"]

    return TrainingStream(
        records,
        build_sampler,
        parts["total_batch_size"],
        mapper=mapper,
        group_by_shape=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
        seed=max(cfg.SEED, 0),
        collate_fn=_as_list,
    )


def _as_list(batch: list[Any]) -> list[Any]:
    return batch
