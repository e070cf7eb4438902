# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""All tools end with status 2 and a sentence after a mistake, and with a traceback after a bug."""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from vovnet_d2.engine.interruption import CTRL_C
from vovnet_d2.engine.launch import run_or_exit

pytest_plugins = ["engine_fixtures"]

TOOLS = Path(__file__).parents[1] / "tools"
# These tools need neither PyTorch nor this package.
APART = {"doctor", "install_detectron2"}

# A mistake in the arguments of each tool, and a part of the message about it.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "analyze_model": (["--backbone", "V-39", "A.B", "1"], "Config options, A.B here, go with"),
    "benchmark": ([], "Nothing to measure"),
    "check_dataset": ([], "Nothing to check"),
    "convert_dataset": (["missing.json", "out"], "There is no annotation file"),
    "convert_weights": (["missing.pth", "out.pth"], "No file of weights missing.pth"),
    "demo": (["--config-file", "x.yaml", "--input", "x.jpg"], "Nothing would be kept"),
    "export_model": (["--config-file", "missing.yaml"], "No config file 'missing.yaml'"),
    "lazyconfig_train_net": (["--config-file", "missing.py"], "No config file 'missing.py'"),
    "measure_convolutions": (["--output", "x", "--device", "abacus"], "'abacus' is no device"),
    "plot_connectivity": (["missing.pth", "--output", "x"], "No file of weights missing.pth"),
    "pretrain_net": (["--config-file", "missing.yaml"], "No config file 'missing.yaml'"),
    "report": (["missing"], "There is no folder missing"),
    "train_net": (["--config-file", "missing.yaml"], "No config file 'missing.yaml'"),
    "visualize_data": (["annotations", "x", "--config-file", "missing.yaml"], "No config file"),
}


class Surprise(argparse.Namespace):
    """Arguments whose first use raises an unexpected error in a deeper function."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError("a bug")


def run(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")


def test_every_tool_has_a_mistake() -> None:
    assert MISTAKES.keys() == {path.stem for path in TOOLS.glob("*.py")} - APART


@pytest.mark.parametrize("tool", sorted(MISTAKES))
def test_a_mistake_is_a_sentence_and_status_2(
    tool: str,
    fresh_logging: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    words, sentence = MISTAKES[tool]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *words])
    with pytest.raises(SystemExit) as caught:
        run(tool, monkeypatch)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert sentence in error
    assert "Traceback" not in error


@pytest.mark.parametrize("tool", sorted(MISTAKES))
def test_config_options_come_last(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that options of the config are the last words, or follow --opts, in all tools."""
    parsers = []

    def parse_known_args(self: argparse.ArgumentParser, *words: Any) -> NoReturn:
        parsers.append(self)
        sys.exit()

    monkeypatch.setattr(sys, "argv", [f"{tool}.py"])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    with pytest.raises(SystemExit):
        run(tool, monkeypatch)
    actions = parsers[0]._actions
    reads_config = any(action.dest == "config_file" for action in actions)
    taken = [action for action in actions if action.dest in ("opts", "options")]
    assert [action.dest for action in taken] == ["opts"] * reads_config
    assert all(action.nargs in ("*", argparse.REMAINDER) for action in taken)


@pytest.mark.parametrize("tool", sorted(MISTAKES))
def test_a_bug_keeps_its_traceback(
    tool: str, fresh_logging: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse_known_args(self: argparse.ArgumentParser, *words: Any) -> tuple[Surprise, list]:
        # The benchmark reads its preset before its arguments are complete.
        return Surprise(preset=None), []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py"])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    with pytest.raises(ValueError, match="a bug"):
        run(tool, monkeypatch)


def test_ctrl_c_ends_a_tool_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_or_exit(run, None)
    assert caught.value.code == CTRL_C
    assert capsys.readouterr().err == "error: interrupted by Ctrl-C.\n"
