# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The training samples are an endless stream that can start at any position.

Samples have positions 0, 1, 2, ... over all processes. The image at a position and its augmentation
depend on the seed and the position alone. So an interrupted training continues with exactly the
samples that it would have had, with any number of workers, and without saving their state.
"""

from __future__ import annotations

import itertools
import logging
import random
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
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..errors import UserValueError
from .image_file import read_header
from .workers import attend_to_workers

_NUM_REPLACEMENTS = 100

Sample = tuple[int, int]  # position, index in the data set


def sample_seed(seed: int, position: int) -> int:
    """Return the seed of the augmentation of the sample at a position."""
    return _derive_seed(seed, 1, position)


def step_seed(seed: int, iteration: int, rank: int) -> int:
    """Return the seed of the model's randomness in an iteration, in the process of this rank."""
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
    """Seed all generators in the context. Afterwards the generators of the CPU continue as
    before."""
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
    """The position of a process in the stream.

    If images are grouped by their shape, a batch depends on the batches before it. So a place holds
    the position where this division into batches began, and the number of batches since.

    Attributes:
        seed: the seed of the stream.
        origin: the position where this division into batches began.
        batches: the number of batches that were used since.
        batch_size: the number of samples in a batch of all processes.
        num_processes: the number of processes that share a batch.
    """

    seed: int
    origin: int
    batches: int
    batch_size: int
    num_processes: int

    @property
    def num_samples(self) -> int:
        """Return the number of samples that all processes have used since the training began."""
        return self.origin + self.batches * self.batch_size

    def shared_by(self, num_processes: int, *, batch_size: int) -> Place:
        """Return the place from which another number of processes, or another batch size,
        continues. No earlier sample is used again. Images that still waited for others of their
        shape are skipped."""
        if (num_processes, batch_size) == (self.num_processes, self.batch_size):
            return self
        return Place(self.seed, self.num_samples, 0, batch_size, num_processes)


class TrainingStream:
    """Iterates over the batches of this process from :attr:`place` on."""

    def __init__(
        self,
        dataset: Dataset[Any],
        build_sampler: Callable[[], Sampler[int]],
        batch_size: int,
        *,
        mapper: Callable[[Any], Any] | None = None,
        group_by_shape: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        **loader_options: Any,
    ):
        """
        Args:
            dataset: the data set to which the indices of the sampler refer.
            build_sampler: makes one of Detectron2's training samplers. All its random numbers must
                come from NumPy's global generator. It is called in all processes.
            batch_size: the batch size over all processes, a multiple of their number.
            mapper: the function that is applied to a selected item. It may return None for an item
                that cannot be used; then another item takes its place.
            group_by_shape: True to put images that are wider than high into batches of their own.
                Items of the data set must be dicts with "width" and "height", or "file_name".
            num_workers, loader_options: see :class:`torch.utils.data.DataLoader`.
            pin_memory: True if the batches go to a GPU, which copies them faster from pinned
                memory. The attribute of this name may be changed before an iteration.
            seed: the seed of the stream.
        """
        self.dataset = dataset
        self.place = Place(seed, 0, 0, batch_size, comm.get_world_size())
        self._build_sampler = build_sampler
        self.mapper = mapper
        self._is_wide = _ShapeLookup(dataset) if group_by_shape else None
        self._num_workers = num_workers
        self.pin_memory = pin_memory
        self._loader_options = loader_options

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            _Samples(self.dataset, self.mapper, self.place.seed),
            batch_sampler=_Batches(lambda: self.batches(self.place)),
            num_workers=self._num_workers,
            pin_memory=self.pin_memory,
            # Otherwise each new iterator would advance the global generator.
            generator=torch.Generator().manual_seed(0),
            **self._loader_options,
        )
        return iter(attend_to_workers(loader))

    def batches(self, place: Place) -> Iterator[list[Sample]]:
        """Return the samples of the batches of this process from ``place`` on. No image is read."""
        with seeded(place.seed):
            sampler = self._build_sampler()
        # Detectron2's samplers give process i of n the indices at positions i, i + n, i + 2n, ...
        positions = itertools.count(comm.get_rank(), place.num_processes)
        samples: Iterator[Sample] = zip(positions, iter(sampler), strict=False)
        samples = itertools.dropwhile(lambda sample: sample[0] < place.origin, samples)
        batches = self._divide(samples, place.batch_size // place.num_processes)
        return itertools.islice(batches, place.batches, None)

    def name(self, index: int) -> str:
        """Return the file name of an item of the data set, or "image" and its index if the file is
        not known."""
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
    """Looks up by index whether an image is wider than high. Each image is looked up once."""

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
        width, height = read_header(record["file_name"]).size
        return width > height


class _Samples(Dataset[Any]):
    """Returns items by position and index, augmented with a seed that follows from the position."""

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
        raise UserValueError(
            f"Image {index} of the training data cannot be used, and neither can "
            f"{_NUM_REPLACEMENTS} other images that were tried: tools/check_dataset.py lists what "
            "is wrong with images."
        )


def goes_to_gpu(cfg: CfgNode) -> bool:
    """Return True if the network of a config is on a GPU."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"


def build_detection_stream(
    cfg: CfgNode,
    *,
    mapper: Callable[[dict[str, Any]], Any] | None = None,
    dataset: list[dict[str, Any]] | Dataset[Any] | None = None,
) -> Any:
    """Build a training loader as Detectron2's :func:`build_detection_train_loader` does, for all
    its samplers.

    Args:
        cfg: a config with ``DATASETS``, ``DATALOADER`` and ``SOLVER.IMS_PER_BATCH``.
        mapper: the mapper, by default Detectron2's. Its random numbers must come from the global
            generators of Python, NumPy and PyTorch.
        dataset: the data set, by default that of ``DATASETS.TRAIN``.

    Returns:
        a :class:`TrainingStream`. For an :class:`IterableDataset`, which has an order of its own,
            it is Detectron2's loader.
    """
    parts = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)
    records, mapper = parts["dataset"], parts["mapper"]
    if isinstance(records, IterableDataset):
        return build_detection_train_loader(cfg, mapper=mapper, dataset=records)
    if isinstance(records, list):
        records = DatasetFromList(records, copy=False)  # in memory that the workers share

    # Newer versions of Detectron2 seed some samplers by SEED, which is -1 in every training that
    # draws its seed. Without SEED these samplers take their seed from NumPy's generator, as all
    # others do.
    unseeded = cfg.clone()
    unseeded.defrost()
    unseeded.SEED = None

    def build_sampler() -> Sampler[int]:
        options = {"mapper": mapper, "dataset": records}
        # Detectron2 has logged the name of the sampler already.
        with _silenced(logging.getLogger("detectron2.data.build")):
            return build_detection_train_loader.from_config(unseeded, **options)["sampler"]

    return TrainingStream(
        records,
        build_sampler,
        parts["total_batch_size"],
        mapper=mapper,
        group_by_shape=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
        pin_memory=goes_to_gpu(cfg),
        seed=max(cfg.SEED, 0),
        collate_fn=_as_list,
    )


def _as_list(batch: list[Any]) -> list[Any]:
    return batch
