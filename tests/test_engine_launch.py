# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes of the launcher, and errors that become one sentence."""

import argparse
import io
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from huggingface_hub.utils import http_backoff
from test_pretrain import SHORT, THIN

from vovnet_d2.engine import argument_parser, launch, load_config, quiet
from vovnet_d2.engine.run import _Arguments
from vovnet_d2.modeling.specs import get_spec
from vovnet_d2.tiles import cut_tiles
from vovnet_d2.waits import longest_wait

TOOLS = Path(__file__).parents[1] / "tools"
ARGS = argument_parser().parse_args([])


def fails_with_a_sentence(args: argparse.Namespace) -> None:
    get_spec("V-40")  # raises an error of this package in a deeper function


def has_a_bug(args: argparse.Namespace) -> None:
    get_spec(None)  # type: ignore[arg-type]


def test_errors_of_ours_are_a_sentence_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        launch.launch_or_exit(fails_with_a_sentence, ARGS)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: Unknown VoVNet variant 'V-40'. ")


def test_bugs_keep_their_tracebacks() -> None:
    with pytest.raises(TypeError):
        launch.launch_or_exit(has_a_bug, ARGS)


def test_an_unexpected_error_keeps_its_traceback() -> None:
    """Raise a ValueError in a line of the package that does not raise it on purpose."""
    with pytest.raises(ValueError, match=r"zip\(\)"):
        launch.launch_or_exit(lambda args: cut_tiles(8, 8, (4,), 0.5), ARGS)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_deprecation_warnings_of_other_packages_are_hidden() -> None:
    def say(_: None) -> None:
        warnings.warn("torch.meshgrid: in an upcoming release, it will be", stacklevel=1)
        warnings.warn("the data are odd", stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        launch.run_or_exit(say, None)
    assert [str(warning.message) for warning in caught] == ["the data are odd"]


@contextmanager
def listen(name: str) -> Iterator[io.StringIO]:
    """Return the stream that the lines of a logger are written to."""
    lines, logger = io.StringIO(), logging.getLogger(name)
    logger.addHandler(handler := logging.StreamHandler(lines))
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def test_a_config_without_a_version_is_no_warning(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("SEED: 1")
    with listen("detectron2.config") as lines:
        load_config(str(tmp_path / "a.yaml"))
        launch.run_or_exit(load_config, str(tmp_path / "a.yaml"))
    assert lines.getvalue().count("has no VERSION") <= 1  # the call outside of a command


def test_the_command_is_logged_as_it_was_given() -> None:
    words = _Arguments(command="python tools/train_net.py --resume", resume=True)
    assert str(words) == "python tools/train_net.py --resume"
    assert str(_Arguments(resume=True)) == "_Arguments(resume=True)"


def test_the_attempts_of_a_download_from_the_hub_are_hidden() -> None:
    """Ask a port that nobody listens to, with the hub's own function. Another warning is shown."""

    def ask(_: None) -> None:
        with suppress(Exception):  # of the HTTP client of the hub
            http_backoff("HEAD", "http://127.0.0.1:9/file", max_retries=1, base_wait_time=0)
        logging.getLogger("huggingface_hub.utils._http").warning("Rate limited.")

    with listen("huggingface_hub") as lines:
        launch.run_or_exit(ask, None)
    assert lines.getvalue() == "Rate limited.\n"


def test_long_messages_during_set_up_become_one_line() -> None:
    formatter = quiet._FirstLine(logging.Formatter("%(message)s"), "log.txt")

    def show(name: str, number: int) -> str:
        text = "Model:" + "\nline" * number
        return formatter.format(logging.LogRecord(name, logging.INFO, "", 0, text, None, None))

    assert show("detectron2.engine.defaults", 10) == "Model: (10 lines in log.txt)"
    assert show("detectron2.engine.defaults", 9) == "Model:" + "\nline" * 9
    assert show("detectron2.evaluation", 10) == "Model:" + "\nline" * 10


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_gets_colours(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log a config in the terminal and in a file, as Detectron2 colours it with pygments."""
    stream, file = io.StringIO(), io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    logger = logging.getLogger("a run with colours")
    for each in (stream, file):
        logger.addHandler(logging.StreamHandler(each))
    quiet.colour_terminals_only(logger.name)
    coloured = "\x1b[38;5;197mSEED\x1b[39m: 1"
    logger.warning(coloured)
    assert stream.getvalue() == (coloured if terminal else "SEED: 1") + "\n"
    assert file.getvalue() == "SEED: 1\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_many_runs_in_a_process_leave_one_log(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start more logs than Python has levels of recursion. The last run names its own file."""
    stream, file = io.StringIO(), io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    logger = logging.getLogger("detectron2.engine.defaults")
    handlers = [logging.StreamHandler(each) for each in (stream, file)]
    monkeypatch.setattr(logger, "handlers", handlers)
    for number in range(sys.getrecursionlimit()):
        quiet.colour_terminals_only(logger.name)
        quiet.shorten_long_messages(logger.name, f"{number}/log.txt")
    text = "\x1b[31mModel:\x1b[0m" + "\nline" * 10
    logger.warning(text)
    first = text.splitlines()[0] if terminal else "Model:"
    assert stream.getvalue() == f"{first} (10 lines in {number}/log.txt)\n"
    assert file.getvalue() == "Model:" + "\nline" * 10 + "\n"


def test_characters_that_an_encoding_lacks_are_escaped() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    quiet.escape_unwritable(stream, None)
    stream.write("Bär")
    stream.flush()
    assert stream.buffer.getvalue() == b"B\\xe4r"


def test_a_ctrl_c_is_passed_on_as_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass signals on to processes, of which the first has just ended.

    Ctrl-C becomes SIGTERM, because the terminal sends a Ctrl-C to the processes, too. All other
    signals do not change.
    """
    sent = []

    def kill(pid: int, number: int) -> None:
        sent.append((pid, number))
        if pid == 7:
            raise ProcessLookupError

    children = [SimpleNamespace(pid=7), SimpleNamespace(pid=8)]
    monkeypatch.setattr(launch.multiprocessing, "active_children", lambda: children)
    monkeypatch.setattr(os, "kill", kill)
    noted: list[int] = []
    for number in (signal.SIGINT, signal.SIGUSR1):
        launch._pass_on(noted, number, None)
    assert sent == [
        *((7, signal.SIGTERM), (8, signal.SIGTERM)),
        *((7, signal.SIGUSR1), (8, signal.SIGUSR1)),
    ]
    assert noted == [signal.SIGINT, signal.SIGUSR1]


@pytest.mark.slow
def test_processes_of_torchrun_share_one_run(tmp_path: Path) -> None:
    finished = torchrun(
        str(TOOLS / "pretrain_net.py"),
        *["--config-file", "Classification/V_19_slim_eSE_digits.yaml", *THIN, *SHORT],
        *["MODEL.VOVNET.NORM", "GN", "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", str(tmp_path)],
    )
    assert finished.returncode == 0, finished.stderr
    log = (tmp_path / "log.txt").read_text()
    assert "World size: 2" in log
    assert "Namespace(" not in log  # Detectron2 logs the command line
    assert "\x1b" not in log  # Detectron2 colours the config with pygments, which pytest needs
    assert "Rank of current process: 1" in (tmp_path / "log.txt.rank1").read_text()
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3
    # Each validation image was counted once, by one of the two processes.
    accuracy = json.loads((tmp_path / "results.json").read_text())["results"]["val"]
    hits = accuracy["classification"]["top1"] / 100 * 360
    assert hits == pytest.approx(round(hits))


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_one_sentence() -> None:
    finished = torchrun(str(TOOLS / "train_net.py"), "--config-file", "no_such.yaml")
    assert finished.returncode != 0
    assert "[rank 0] error: No config file 'no_such.yaml'" in finished.stderr
    assert "vovnet_d2/engine/run.py" not in finished.stderr


def test_torchrun_gives_each_process_its_gpu_and_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "VOVNET_D2_TIMEOUT")
    for name, value in zip(names, ("1", "2", "90"), strict=True):
        monkeypatch.setenv(name, value)
    chosen, joined, options = [], [], {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 3, 4)]))

    def join(*words: str, **more: Any) -> None:
        joined.append(words)
        options.update(more)

    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(comm, "create_local_process_group", joined.append)
    monkeypatch.setattr(comm, "synchronize", lambda: None)
    launch._join_torchrun()
    assert chosen == [1]
    assert joined == [("nccl",), 2]
    assert (options["rank"], options["world_size"]) == (3, 4)
    assert options["timeout"] == timedelta(seconds=90)


def test_the_timeout_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VOVNET_D2_TIMEOUT", raising=False)
    assert longest_wait() == timedelta(minutes=30)
    monkeypatch.setenv("VOVNET_D2_TIMEOUT", "90")
    assert longest_wait() == timedelta(minutes=1.5)
    for value in ("0", "-1", "1.5", "soon"):
        monkeypatch.setenv("VOVNET_D2_TIMEOUT", value)
        with pytest.raises(ValueError, match=f"VOVNET_D2_TIMEOUT is '{value}': set it to a numb"):
            longest_wait()


def test_the_timeout_also_holds_for_objects_under_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setenv("VOVNET_D2_TIMEOUT", "7")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(options) or "group")
    monkeypatch.setattr(comm, "_get_global_gloo_group", comm._get_global_gloo_group)
    launch._limit_waits()
    assert made == [{"backend": "gloo", "timeout": timedelta(seconds=7)}]
    assert comm._get_global_gloo_group() == "group"
