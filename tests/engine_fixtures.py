# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures for runs of the launcher. Test modules name this file in ``pytest_plugins``."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from coco_tree import write_coco_tree
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_coco
from detectron2.utils.logger import setup_logger
from engine_runs import quick_set_up
from fault_runs import free_port


@pytest.fixture
def catalogs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test empty catalogs of data sets, and restore the catalogs afterwards."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", {})


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco_tree(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def coco(catalogs: None, fresh_logging: None, coco_root: Path) -> Path:
    """Register the miniature COCO under Detectron2's names; return the folder of data sets."""
    register_all_coco(str(coco_root))
    return coco_root


@pytest.fixture
def fresh_logging() -> Iterator[None]:
    """Remove the log handlers of a run after the test, so that each run writes to its own log."""
    with quick_set_up():
        yield
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "vovnet_d2"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


@pytest.fixture
def alone() -> Iterator[None]:
    """Run the test in a distributed group of one process."""
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
