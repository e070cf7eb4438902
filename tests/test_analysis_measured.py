# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the measurement protocol and of the convolution study."""

import csv
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import measure_convolutions
import pytest
import torch
from fvcore.nn import FlopCountAnalysis

import vovnet_d2
from vovnet_d2 import timing
from vovnet_d2.analysis import convolution_study
from vovnet_d2.analysis.convolution_study import Case, make_cases, measure


def test_cases_take_turns() -> None:
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.time_interleaved(cases, device="cpu", warmup=2, repeats=8, calls=2)
    assert calls[:6] == [*"abcabc"]
    rounds = ["".join(calls[i : i + 6]) for i in range(6, len(calls), 6)]
    assert {"".join(sorted(r)) for r in rounds} == {"aabbcc"}
    assert all(r[0] == r[1] and r[2] == r[3] for r in rounds)
    assert len(set(rounds)) > 2
    assert [len(t) for t in times.values()] == [8, 8, 8]


def test_times_are_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a clock that moves only while a case runs."""
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    cases = {"short": lambda: work(0.25), "long": lambda: work(1.0)}
    times = timing.time_interleaved(cases, device="cpu", warmup=1, repeats=2, calls=4)
    assert times == {"short": [0.25, 0.25], "long": [1.0, 1.0]}
    assert timing.ratios(times["long"], times["short"]) == [4.0, 4.0]


@pytest.mark.gpu
def test_gpu_work_is_waited_for() -> None:
    x = torch.rand(8192, 8192, device="cuda")
    cases = {"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}
    times = timing.time_interleaved(cases, device="cuda", warmup=2, repeats=5)
    assert sorted(timing.ratios(times["four"], times["one"]))[2] == pytest.approx(4, rel=0.25)


def test_environment_names_what_a_time_depends_on() -> None:
    described = timing.describe_environment("cpu")
    assert described["torch"] == torch.__version__
    assert described["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert described.keys() >= {"date", "command", "device", "system"}


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["tools/demo.py", "--input", "a b.jpg"], "python tools/demo.py --input 'a b.jpg'"),
        ([str(Path("tools/demo.py").absolute()), "-h"], "python tools/demo.py -h"),
        (["/usr/local/bin/vovnet-demo", "-h"], "vovnet-demo -h"),
    ],
)
def test_a_command_can_be_typed_again(
    argv: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing.sys, "argv", argv)
    assert timing.command_line() == command


def test_environment_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *author, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    file = tmp_path / "vovnet_d2" / "timing.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    monkeypatch.setattr(timing, "__file__", str(file))
    assert timing.describe_environment("cpu")["vovnet_d2"] == vovnet_d2.__version__
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "v1")
    expected = f"{vovnet_d2.__version__} at {git('rev-parse', '--short', 'HEAD')}"
    assert timing.describe_environment("cpu")["vovnet_d2"] == expected
    file.write_text("2")
    assert timing.describe_environment("cpu")["vovnet_d2"] == f"{expected}-dirty"


def test_csv_has_the_protocol_above_the_table(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows = [{"a": 1, "b": "x, y"}, {"a": None, "b": "z"}]
    timing.write_csv(path, rows, {"device": "some, with a comma", "repeats": 3})
    lines = path.read_text().splitlines()
    assert lines[:2] == ["# device: some, with a comma", "# repeats: 3"]
    assert list(csv.DictReader(lines[2:])) == [{"a": "1", "b": "x, y"}, {"a": "", "b": "z"}]


@pytest.mark.parametrize(("channels", "tolerance"), [(448, 0.021), (256, 0.2)])
def test_work_of_a_comparison_is_equal(channels: int, tolerance: float) -> None:
    for case in make_cases(channels):
        work = case.cost(56).multiply_adds / (case.kernel_size**2 * 56**2)
        assert work == pytest.approx(channels**2, rel=tolerance), case
        assert case.in_channels % 32 == case.out_channels % 32 == 0


def test_the_default_cases() -> None:
    cases = make_cases(448)
    assert len({case.name for case in cases}) == len(cases) == 2 * (6 + 4)
    for kernel_size in (1, 3):
        shapes = [c for c in cases if (c.comparison, c.kernel_size) == ("shape", kernel_size)]
        assert [case.label for case in shapes] == ["1:1", "1:2", "1:4", "1:5.5", "1:7.8", "1:12.2"]
        access = [case.cost(56).memory_access for case in shapes]
        assert access == sorted(access)
        splits = [c for c in cases if (c.comparison, c.kernel_size) == ("split", kernel_size)]
        assert [case.count for case in splits] == [1, 2, 4, 8]


@pytest.mark.parametrize("case", [Case("shape", "", 3, 16, 24), Case("split", "", 1, 8, 8, 4)])
def test_the_cost_of_a_case_covers_the_timed_work(case: Case) -> None:
    flops = FlopCountAnalysis(case.build(), torch.rand(1, case.in_channels, 10, 10))
    assert case.cost(10).multiply_adds == flops.total()


def test_times_are_relative_to_the_first_at_equal_work(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        Case("shape", "1:1", 1, 16, 16),
        Case("shape", "1:4", 1, 8, 40),  # this case has 1.25 times the work
        Case("split", "1", 1, 16, 16),
    ]
    measured = ([2.0, 4.0], [5.0, 10.0], [1.0, 1.0])
    seconds = {case.name: times for case, times in zip(cases, measured, strict=True)}
    monkeypatch.setattr(convolution_study, "time_interleaved", lambda *a, **k: seconds)
    arguments = {"size": 4, "batch": 1, "device": torch.device("cpu"), "dtype": torch.float32}
    first, second, third = measure(cases, **arguments, warmup=0, repeats=2)
    assert (first["relative_time"], third["relative_time"]) == (1, 1)
    assert second["relative_time"] == 2
    assert second["time_ms"] == 7500
    relative = (16 * (8 + 40) + 320) / (16 * 32 + 256) / 1.25
    assert second["relative_memory_access"] == pytest.approx(relative, abs=0.001)


def test_the_figure_has_the_medians_and_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        Case(kind, label, kernel_size, 16, 16)
        for kind in ("shape", "split")
        for kernel_size in (1, 3)
        for label in "12"
    ]
    measured = 4 * [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]
    seconds = {case.name: times for case, times in zip(cases, measured, strict=True)}
    monkeypatch.setattr(convolution_study, "time_interleaved", lambda *a, **k: seconds)
    arguments = {"size": 4, "batch": 1, "device": torch.device("cpu"), "dtype": torch.float32}
    rows = measure(cases, **arguments, warmup=0, repeats=3)
    for row in rows[1::2]:
        assert [row[name] for name in ("quartile1", "relative_time", "quartile3")] == [1, 2, 3]
    figure = convolution_study.plot(rows, "title")
    labels = [panel.get_xlabel() for panel in figure.axes]
    assert labels == ["input channels : output channels", "convolutions in sequence"]
    for panel in figure.axes:
        assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "2"]
        assert len(panel.containers) == 2  # one for 1x1 and one for 3x3
        for line, _, (bars,) in panel.containers:
            assert line.get_ydata().tolist() == [1, 2]
            assert bars.get_segments()[1].tolist() == [[1, 1], [1, 3]]
    plt.close(figure)


def test_options_of_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def record(cases: list[Case], **options: object) -> list[dict]:
        given.update(options)
        return measure(cases, **options)

    monkeypatch.setattr(measure_convolutions, "measure", record)
    words = "--channels 32 --size 4 --batch 2 --dtype bfloat16 --warmup 3 --repeats 2 --output"
    arguments = [*words.split(), str(tmp_path)]
    measure_convolutions.run(measure_convolutions.argument_parser().parse_args(arguments))
    assert given == {
        "size": 4,
        "batch": 2,
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "warmup": 3,
        "repeats": 2,
    }


def test_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--channels", "128", "--size", "8", "--repeats", "2", "--output", str(tmp_path)]
    measure_convolutions.run(measure_convolutions.argument_parser().parse_args(arguments))
    assert "dtype: float32" in capsys.readouterr().out
    lines = (tmp_path / "convolutions_cpu.csv").read_text().splitlines()
    header = {line.split(": ")[0].removeprefix("# ") for line in lines if line.startswith("#")}
    needed = {"command", "device", "torch", "dtype", "batch", "maps", "warm-up", "repeats"}
    assert header >= needed
    assert len(lines) - len(header) == 1 + len(make_cases(128))
    assert (tmp_path / "convolutions_cpu.png").stat().st_size > 10_000


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        measure_convolutions.argument_parser().parse_args(["--device", "cuda", "--output", "no"])
    assert "--device: 'cuda' is no device that torch finds here" in capsys.readouterr().err
