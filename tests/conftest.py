# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import gc
import os

# Several tests run at a time (pytest-xdist), each in one thread, and so do the processes that they
# start. A thread that waits leaves the processor to the others. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import setuptools  # noqa: F401 (fails if it is imported after something has looked for pip)
import torch
from detectron2.utils.env import seed_all_rng


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Exclude the objects that the imports have made from garbage collection.

    Otherwise torch's and Detectron2's many objects add a third of a second to each full collection.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is kept in, or taken from, the cache of whoever runs the tests."""
    os.environ["VOVNET_D2_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whichever tests run before it."""
    seed_all_rng(0)
