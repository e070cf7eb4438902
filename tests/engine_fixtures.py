# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures for runs of the launcher. Test modules name this file in ``pytest_plugins``."""

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from coco_tree import write_coco_tree
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_coco
from detectron2.utils.logger import setup_logger
from engine_runs import quick_set_up
from fault_runs import free_port

from vovnet_d2.report import figures, page


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


@pytest.fixture(scope="module")
def equal_curves_are_drawn_once() -> Iterator[None]:
    """Keep drawn curves, because most pages have the same curves, which take most of the time."""
    drawn: dict[bytes, Any] = {}

    def draw_once(draw: Callable) -> Callable:
        def find(*args: Any) -> Any:
            key = pickle.dumps((draw.__name__, args))
            if key not in drawn:
                drawn[key] = draw(*args)
            return drawn[key]

        return find

    with (
        mock.patch.object(figures, "_draw_by_iteration", draw_once(figures._draw_by_iteration)),
        mock.patch.object(page, "draw_precision_recall", draw_once(page.draw_precision_recall)),
    ):
        yield
