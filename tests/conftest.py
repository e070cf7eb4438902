# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from detectron2.utils.env import seed_all_rng


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whichever tests run before it."""
    seed_all_rng(0)
