# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures for runs of the launcher; test modules name this file in ``pytest_plugins``."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from coco_tree import write_coco_tree
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_coco
from detectron2.utils.logger import setup_logger
from fault_runs import free_port


@pytest.fixture
def catalogs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty catalogs of data sets; afterwards they are as before."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", {})


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco_tree(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def coco(catalogs: None, fresh_logging: None, coco_root: Path) -> Path:
    """The miniature, registered under Detectron2's names; returns the folder of data sets."""
    register_all_coco(str(coco_root))
    return coco_root


@pytest.fixture
def fresh_logging() -> Iterator[None]:
    """Each run writes to its own log, and none is left with handlers of an earlier one."""
    yield
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "vovnet_d2"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
