# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes exchange their losses. In these tests, two threads stand for two processes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from vovnet_d2.engine.agreed_steps import _share
from vovnet_d2.errors import UserError


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start two threads that exchange tensors and objects like two processes."""
    ranks = iter(range(2))
    here = threading.local()
    barrier = threading.Barrier(2, timeout=30)
    sent: dict[int, Any] = {}

    def all_gather(value: Any) -> list[Any]:
        sent[here.rank] = value
        barrier.wait()
        found = [sent[rank] for rank in range(2)]
        barrier.wait()
        return found

    def all_gather_tensors(rows: list[torch.Tensor], row: torch.Tensor, group: Any) -> None:
        for target, source in zip(rows, all_gather(row), strict=True):
            target.copy_(source)

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "_get_global_gloo_group", lambda: None)
    monkeypatch.setattr(comm, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_gather", all_gather_tensors)
    with ThreadPoolExecutor(2, initializer=lambda: setattr(here, "rank", next(ranks))) as threads:
        yield threads


def share(pool: ThreadPoolExecutor, *losses: dict[str, float], stop: bool = False) -> list[Any]:
    """Return the shared losses in each process, or its error."""
    seconds = [0.5, 0.25]
    tasks = [
        pool.submit(_share, values, wait, stop=stop)
        for values, wait in zip(losses, seconds, strict=True)
    ]
    return [task.exception() or task.result() for task in tasks]


def test_losses_are_averaged_by_name_in_any_order(pool: ThreadPoolExecutor) -> None:
    found = share(pool, {"box": 1.0, "class": 3.0}, {"class": 5.0, "box": 2.0})
    for shared in found:
        assert shared == (False, 0.5, {"box": 1.5, "class": 4.0})
    assert [list(shared.losses) for shared in found] == [["box", "class"], ["class", "box"]]


@pytest.mark.parametrize("other", [{"box": 1.0, "mask": 2.0}, {"box": 1.0, "class": 1, "mask": 2}])
def test_different_names_of_losses_are_refused(
    pool: ThreadPoolExecutor, other: dict[str, float]
) -> None:
    for error in share(pool, {"box": 1.0, "class": 3.0}, other):
        assert isinstance(error, UserError)
        lacking = "mask" if "class" in other else "class, mask"
        assert str(error).startswith(f"Some processes have no loss {lacking} in this step: ")


def test_a_process_that_stops_may_have_no_losses(pool: ThreadPoolExecutor) -> None:
    assert [shared.stop for shared in share(pool, {"box": 1.0}, {}, stop=True)] == [True, True]


def test_largest_number_of_losses(pool: ThreadPoolExecutor) -> None:
    most = {f"loss_{n}": float(n) for n in range(256)}
    assert [shared.losses for shared in share(pool, most, most)] == [most, most]
    for error in share(pool, *[most | {"another": 0.0}] * 2):
        assert isinstance(error, UserError)
        assert str(error).startswith("A step has 257 losses, but several processes can share at")
