# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Every kind of data set that users have is given to every tool.

A tool gives the same result as with the good data, or one sentence with status 2, or a list of
problems with status 1. Trainings on a CPU are deterministic, so data with the same meaning give the
same weights.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from input_kinds import ANNOTATIONS, IMAGES, PICTURES, REFUSED, SAME, WORKS, Data, Kind
from tool_runs import TOOLS, WEIGHTS_TOOLS, Outcome, Setting, attempt, last_sentence

pytestmark = pytest.mark.slow
pytest_plugins = ["engine_fixtures"]

Good = dict[bool, tuple[Path, dict[str, Outcome]]]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """Return the output of the tools for the good data, without and with masks."""
    found: Good = {}
    catalogs = [(catalog, catalog.data) for catalog in (DatasetCatalog, MetadataCatalog)]
    for masks in (False, True):
        for catalog, _ in catalogs:
            catalog.data = {}
        folder = tmp_path_factory.mktemp(f"masks_{masks}")
        (data := Data(folder / "data")).write()
        setting = Setting(folder, masks, folder / "train")
        found[masks] = setting.trained, run_all(data, setting, list(TOOLS))
    for catalog, content in catalogs:
        catalog.data = content
    return found


def run_all(data: Data, setting: Setting, tools: list[str]) -> dict[str, Outcome]:
    outcomes = {}
    for tool in tools:
        seed_all_rng(0)
        outcomes[tool] = attempt(TOOLS[tool], data, setting)
    return outcomes


def test_the_good_data(good: Good) -> None:
    for _, outcomes in good.values():
        assert {tool: outcome.kind for tool, outcome in outcomes.items()} == dict.fromkeys(
            TOOLS, WORKS
        )


@pytest.mark.parametrize("name", [*PICTURES, *ANNOTATIONS])
def test_a_kind(catalogs: None, fresh_logging: None, good: Good, tmp_path: Path, name: str) -> None:
    kind: Kind = (PICTURES | ANNOTATIONS)[name]
    tools = [tool for tool in TOOLS if name in PICTURES or tool not in IMAGES]
    data = Data(tmp_path / "data")
    kind.change(data)
    data.write()
    trained, expected = good[kind.masks]
    setting = Setting(tmp_path, kind.masks, trained, kind.options, pictures=name in PICTURES)
    outcomes = run_all(data, setting, tools)
    found = {
        tool: SAME if o.kind == WORKS and o.result == expected[tool].result else o.kind
        for tool, o in outcomes.items()
    }
    sentences = {t: last_sentence(o) for t, o in outcomes.items() if o.kind == REFUSED}
    assert found == {tool: kind.expected.get(tool, SAME) for tool in tools}, sentences
    for tool, sentence in sentences.items():
        assert tool in ("fix", "draw") or re.search(kind.says, sentence), (tool, sentence)


# Weights ------------------------------------------------------------------------------------------


def add_averaged_weights(path: Path) -> None:
    """Save averaged weights in the same file as the other weights."""
    content = torch.load(path, weights_only=False)
    averaged = {name: 2 * value for name, value in content["model"].items()}
    torch.save({"model": content["model"], "model_ema": averaged}, path)


WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "half of a file": (lambda path: path.write_bytes(path.read_bytes()[: -(2**14)]), REFUSED),
    "a page of a server": (lambda path: path.write_text("<!DOCTYPE html><html>"), REFUSED),
    "a pointer of Git LFS": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        REFUSED,
    ),
    "nothing": (lambda path: path.write_bytes(b""), REFUSED),
    "no file": (Path.unlink, REFUSED),
    "a number": (lambda path: torch.save({"model": 3}, path), REFUSED),
    "averaged weights beside the others": (add_averaged_weights, SAME),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(
    catalogs: None, fresh_logging: None, good: Good, tmp_path: Path, name: str
) -> None:
    change, expected = WEIGHTS[name]
    trained, outcomes = good[False]
    shutil.copy(trained / "model_final.pth", file := tmp_path / "model.pth")
    change(file)
    (data := Data(tmp_path / "data")).write()
    setting = Setting(tmp_path, False, trained, file=str(file))
    for tool, call in WEIGHTS_TOOLS.items():
        seed_all_rng(0)
        outcome = attempt(call, data, setting)
        if expected == SAME and tool in outcomes:
            assert (outcome.kind, outcome.result) == (WORKS, outcomes[tool].result)
        elif expected == SAME:
            assert outcome.kind == WORKS, outcome.text
        else:
            assert (tool, outcome.kind) == (tool, REFUSED), outcome.text
            assert str(file) in last_sentence(outcome)
