# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the files, tables and plots of a study, and of the benchmark tool."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_runs import (
    SteadyMeter,
    measure_energy_of_single_calls,
    run_study,
    sleeper,
)

from vovnet_d2.atomic import FileNotWrittenError
from vovnet_d2.benchmark import command as tool
from vovnet_d2.benchmark import study
from vovnet_d2.benchmark.plots import plot_cell
from vovnet_d2.benchmark.published import PAPER_TABLES, format_paper_table
from vovnet_d2.benchmark.report import CONVENTIONS, _format, format_table, write_study
from vovnet_d2.benchmark.study import Study
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.made import note_made


@pytest.fixture(scope="module")
def measured() -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "find_meter", lambda device: SteadyMeter())
        return run_study(
            networks=[sleeper("slow", 0.006), sleeper("fast", 0.003)],
            treatments=["plain", "fp16"],
            accuracy={"slow": 30.5},
            batches=[1, 2],
            repeats=2,
            energy_seconds=measure_energy_of_single_calls(patch),
        )


def test_only_our_plots_of_an_earlier_benchmark_are_removed(measured, tmp_path):
    for name in ("inference_64x64_batch4.png", "inference_64x64_batch8.png", "photo.png"):
        (tmp_path / name).touch()
    note_made(tmp_path / "inference_64x64_batch4.png")
    paths = {path.name for path in write_study(measured, tmp_path)}
    kept = {"inference_64x64_batch8.png", "photo.png"}
    assert {path.name for path in tmp_path.glob("[!.]*")} == paths | kept


def test_files_parse_back(measured, tmp_path):
    paths = {path.name: path for path in write_study(measured, tmp_path / "new")}
    content = json.loads(paths["benchmark.json"].read_text())
    assert content["conventions"] == CONVENTIONS
    assert len(content["records"]) == len(measured.rows) == 8
    protocol = {"date", "command", "device", "torch", "threads", "warm-up", "repeats", "energy"}
    for record, row in zip(content["records"], measured.rows, strict=True):
        assert record.items() >= row.items()
        assert record.keys() >= protocol | {"dtype", "batch", "image_size", "memory"}
    with paths["benchmark.csv"].open() as file:
        lines = list(csv.DictReader(file))
    for line, record in zip(lines, content["records"], strict=True):
        assert {k: "" if v is None else str(v) for k, v in record.items()} == line
    for cell in ("inference_64x64_batch1.png", "inference_64x64_batch2.png"):
        caption = cell.removesuffix(".png").replace("_", ", ")
        assert f"![{caption}]({cell})" in paths["README.md"].read_text()
        assert paths[cell].read_bytes().startswith(b"\x89PNG")


def test_table_parses_back(measured):
    first, second = format_table(measured.rows).split("\n\n### ")[0:2]
    heading, table = first.split("\n\n")
    assert heading == "### inference, 64 × 64, batch 1"
    assert second.startswith("inference, 64 × 64, batch 2")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    expected = [row for row in measured.rows if row["batch"] == 1]
    assert len(rows) == len(expected)
    for row, one in zip(rows, expected, strict=True):
        assert row["network"] == one["network"]
        assert row["could not run"] == one["error"]
        if not one["error"]:
            assert float(row["ms"]) == pytest.approx(one["latency_ms"], abs=0.005)
            ratio = row["× network"]
            assert float(ratio.split()[0]) == pytest.approx(one["time_of_network"], abs=5e-4)
            assert ratio.endswith("of slow")


@pytest.mark.parametrize("table", PAPER_TABLES.values(), ids=PAPER_TABLES)
def test_figures_of_the_paper_agree_with_each_other(table):
    for name, row in table.detectors.items():
        assert row.gflops_per_second == pytest.approx(row.gflops * row.fps, rel=0.04), name
        watts = row.joules_per_image * row.fps  # watts; a TITAN X takes at most 250 W
        assert 60 < watts < 140, name
        assert 0 < row.accuracy < 100, name


def test_the_papers_columns_have_both_figures():
    table = PAPER_TABLES["table2"]
    rows = [
        {
            **dict.fromkeys(study._COLUMNS),
            **{"network": name, "treatment": "plain", "mode": mode, "batch": 1},
            **{"compared_at": size, "fps": fps, "parameters_m": 5.9871, "accuracy": accuracy},
        }
        for name, mode, size, fps, accuracy in (
            ("dsod300_V_27_slim_100k", "inference", "own size", 30.0, 70.25),
            ("dsod300_DenseNet_67_100k", "inference", "own size", 12.0, None),
            ("dsod300_DenseNet_67_100k", "inference", "512x512", 4.0, None),
            ("dsod300_DenseNet_67_100k", "training", "own size", 2.0, None),
            ("another", "inference", "own size", 1.0, None),
        )
    ]
    text = format_paper_table(table, rows)
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    headings, _, ours, peer = [[cell.strip() for cell in line] for line in lines[:4]]
    found = dict(zip(headings, ours, strict=True))
    assert found["detector"] == "dsod300_V_27_slim_100k"
    assert found["FPS"] == "30.0 (71)"
    assert found["× FPS"] == "2.50 (2.03)"  # 71 / 35
    assert found["#Param (M)"] == "5.99 (5.9)"
    assert found["Energy (J/img)"] == "– (0.9)"
    assert found["mAP"] == "70.2 (74.8)"
    assert dict(zip(headings, peer, strict=True))["mAP"] == "– (73.6)"
    assert text.splitlines()[0].startswith("## Table 2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "work", "weights"),
    [
        ("table2", 0.05, 0.03),  # the paper gives two digits, rounded down
        ("table4", 0.003, 0.002),  # the paper also counts the norms
    ],
)
def test_the_papers_tables_are_measured(preset, work, weights, tmp_path, capsys, monkeypatch):
    """Compare the two columns that do not depend on the machine, at full width.

    The networks of Table 2 run once. The networks of Table 4 are only built and counted.
    """
    monkeypatch.setattr(study, "calibrate_norms", lambda *_: None)
    monkeypatch.setattr(study, "peak_memory", lambda *_, **__: 0)
    words = ["--preset", preset, "--warmup", "1", "--repeats", "1", "--output", str(tmp_path)]
    treatments = 2
    if preset == "table4":
        monkeypatch.setattr(study, "inference", lambda *_: lambda: None)
        words += ["--treatments", "plain"]
        treatments = 1
    tool.run(tool.parse_arguments(words))
    records = json.loads((tmp_path / "benchmark.json").read_text())["records"]
    table = PAPER_TABLES[preset]
    assert [r["error"] for r in records] == [""] * treatments * len(table.detectors)
    for record, published in zip(records[::treatments], table.detectors.values(), strict=True):
        assert record["gflops"] == pytest.approx(published.gflops, rel=work)
        assert record["parameters_m"] == pytest.approx(published.parameters_m, rel=weights)
    printed = format_paper_table(table, records)
    assert printed in capsys.readouterr().out
    assert printed in (tmp_path / "README.md").read_text()


def row_of(**values: Any) -> dict[str, Any]:
    defaults = {"network": "a", "kind": "backbone", "treatment": "plain"}
    defaults |= {"fps": 10.0, "gflops": 5.0}
    return (
        defaults | {"gflops_per_second": 50.0, "accuracy": 40.0, "joules_per_image": 1.5} | values
    )


def test_four_plots():
    rows = [row_of(), row_of(network="b", fps=20.0, accuracy=None)]
    figure, left_out = plot_cell(rows, "title")
    axes = [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes]
    efficiency, joules = "computation efficiency (GFLOP/s) →", "← energy per image (J)"
    assert axes == [
        ("images per second →", "accuracy →"),
        (efficiency, "accuracy →"),
        (joules, "accuracy →"),
        (efficiency, joules),
    ]
    assert left_out == ["No accuracy was given (--accuracy) of b."]
    points = [tuple(c.get_offsets()[0]) for c in figure.axes[3].collections]
    assert points == [(50, 1.5), (50, 1.5)]
    assert len(figure.axes[0].collections) == 1  # the accuracy of b is not known
    assert [text.get_text() for text in figure.axes[3].texts] == ["a", "b"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain"]


def test_backbones_and_detectors_have_separate_plots():
    rows = [row_of(), row_of(network="b", kind="detector", fps=0.5, accuracy=None)]
    rows.append(row_of(network="c", fps=12.0))
    figure, _ = plot_cell([row | {"joules_per_image": None} for row in rows], "title")
    names = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert [axis.get_title() for axis in figure.axes] == ["backbones"] * 2 + ["detectors"] * 2
    assert names == [["a", "c"], ["a", "c"], [], []]  # the accuracy of b is not known


def test_plots_without_accuracy_and_energy():
    figure, left_out = plot_cell([row_of(accuracy=None, joules_per_image=None)], "title")
    assert [axis.get_ylabel() for axis in figure.axes] == ["← GFLOPs (multiply-adds)"]
    assert left_out == [
        "Some plots are left out, as the accuracy of no network was given (--accuracy).",
        "Some plots are left out, as energy could not be measured.",
    ]


# ------------------------------------------------------------------------------------------ tool


def test_a_ratio_has_its_quartiles_in_their_order():
    row = {"time_of_network": 1.5, "time_of_network_q1": 1.25, "time_of_network_q3": 2.0}
    text = _format(row | {"reference_network": "b"}, "time_of_network")
    assert text == "1.500 [1.250, 2.000] of b"


def test_pairs_and_a_reference_of_all_others():
    assert tool.read_references(["a", "b=c"], ["a", "b", "c"]) == {"a": "a", "b": "c", "c": "a"}
    assert tool.read_accuracy(["a=1=37.5", "b=40"]) == {"a=1": 37.5, "b": 40}
    assert tool.image_size("480x640") == (480, 640)


def test_presets_are_plans():
    for name, preset in tool.PRESETS.items():
        args = tool.parse_arguments(["--preset", name, "--repeats", "7", "--device", "cpu"])
        assert args.repeats == 7
        assert args.models == preset.get("models", [])
        assert len(tool.make_plan(args).networks) == len(args.models) + len(args.config_file)


def test_backbones_or_detectors_of_a_preset_can_be_left_out():
    words = ["--preset", "deploy", "--models", "--config-file", RETINANET]
    args = tool.parse_arguments(words)
    assert (args.models, args.config_file) == ([], [RETINANET])
    plan = tool.make_plan(args)
    assert plan.deployment
    assert "openvino-int8" in plan.treatments
    assert plan.references == {}


def test_commands_of_the_gpu_report(monkeypatch):
    """Check that the commands name known networks, run on a GPU and write to different folders."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    recipe = (Path(__file__).parents[1] / "Makefile").read_text().replace("\\\n", " ")
    target = recipe.partition("\ngpu-report:")[2].partition("\n\n")[0]
    commands = re.findall(r"tools/benchmark\.py (.*)", target)
    assert len(commands) == 5
    folders = set()
    for command in commands:
        args = tool.parse_arguments(shlex.split(command))
        plan = tool.make_plan(args)
        assert plan.device.type == "cuda"
        assert plan.networks
        folders.add(args.output)
    assert len(folders) == 5
    assert "-m pytest -m gpu" in target


def test_the_preset_of_a_gpu_needs_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tool.parse_arguments(["--preset", "gpu"]).device == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        tool.parse_arguments(["--preset", "gpu"])
    assert "'cuda' is no device that torch finds here: choose from cpu\n" in capsys.readouterr().err


def test_tool(tmp_path, capsys):
    words = ["--models", "V-19-slim-dw-eSE", "V-19-slim-eSE", "--sizes", "64x64", "--repeats", "2"]
    words += ["--warmup", "1", "--accuracy", "V-19-slim-eSE=37.5", "--output", str(tmp_path)]
    words += ["--energy-seconds", "0.3"]
    tool.run(tool.parse_arguments(words))
    printed = capsys.readouterr().out
    assert "warm-up: 1 calls" in printed
    assert "| V-19-slim-eSE    | optimized" in printed
    records = json.loads((tmp_path / "benchmark.json").read_text())["records"]
    assert [r["network"] for r in records if r["accuracy"] == 37.5] == ["V-19-slim-eSE"] * 2
    assert "not available, because" in records[0]["energy"] or records[0]["joules_per_image"] > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_tool_writes_its_results(tmp_path, monkeypatch, error):
    def interrupt(self: Study, save: object) -> None:
        self.interruption = error()
        self.rows = [{"error": "", **dict.fromkeys(study._COLUMNS)}]

    written = []
    monkeypatch.setattr(Study, "run", interrupt)
    monkeypatch.setattr(tool, "write_study", lambda *args: written.append(args) or [])
    monkeypatch.setattr(tool, "format_table", lambda rows: "")
    with pytest.raises(error):
        tool.run(tool.parse_arguments(["--models", "V-39", "--output", str(tmp_path)]))
    assert len(written) == 1


def test_each_cell_is_written_at_once(tmp_path, monkeypatch):
    """Check that the first cell is on disk if the process ends in the second cell."""
    measure = Study._measure
    sizes = []

    def die(self: Study, cell: object, bar: object) -> None:
        if sizes:
            raise SystemExit(137)
        sizes.append(1)
        measure(self, cell, bar)

    monkeypatch.setattr(Study, "_measure", die)
    written = []
    write = tool.write_study
    monkeypatch.setattr(tool, "write_study", lambda *a: written.append(len(a[0].rows)) or write(*a))
    words = ["--models", "V-19-slim-dw-eSE", "--sizes", "64x64", "64x96", "--repeats", "1"]
    words += ["--warmup", "1", "--energy-seconds", "0", "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        tool.run(tool.parse_arguments(words))
    assert written == [2, 2]  # after each cell, and at the end
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["records"]) == 2


def test_results_that_cannot_be_saved_are_printed(tmp_path, monkeypatch, capsys):
    def fail(*args: object) -> None:
        raise FileNotWrittenError("the disk is full")

    monkeypatch.setattr(tool, "write_study", fail)
    words = ["--models", "V-19-slim-dw-eSE", "--sizes", "64x64", "64x96", "--repeats", "1"]
    words += ["--warmup", "1", "--energy-seconds", "0", "--output", str(tmp_path)]
    with pytest.raises(FileNotWrittenError):
        tool.run(tool.parse_arguments(words))
    printed = capsys.readouterr()
    for size in ("64 × 64", "64 × 96"):
        assert f"### inference, {size}, batch 1" in printed.out
    assert printed.err.count("Not saved yet: the disk is full") == 2


def test_earlier_results_outlive_a_run_without_any(tmp_path):
    (tmp_path / "benchmark.json").write_text("{}")
    note_made(tmp_path / "benchmark.json")
    words = ["--models", "V-19-slim-eSE", "--warmup", "1", "--repeats", "1", "--sizes", "8x8"]
    with pytest.raises(ValueError, match="Nothing could run"):
        tool.run(tool.parse_arguments([*words, "--output", str(tmp_path)]))
    assert (tmp_path / "benchmark.json").read_text() == "{}"


def test_part_of_a_preset():
    words = ["--preset", "resnet", "--models", "V-39", "ResNet-50"]
    plan = tool.make_plan(tool.parse_arguments(words))
    assert plan.reference_of("V-39") == "ResNet-50"
    assert "V-57" not in plan.references


def test_cases_that_could_not_run_are_named(capsys):
    words = ["--models", "V-19-slim-eSE", "--warmup", "1", "--repeats", "1", "--sizes", "8x8"]
    with pytest.raises(ValueError, match="Nothing could run"):
        tool.run(tool.parse_arguments(words))
    tool.run(tool.parse_arguments([*words, "64x64"]))
    assert "2 of 4 cases could not run" in capsys.readouterr().err


REPOSITORY = Path(__file__).parents[1]
RETINANET = "COCO-Detection/retinanet_V_19_slim_eSE_FPN_3x.yaml"
DEPLOYMENT = ["--config-file", RETINANET, "--weights", "--deployment"]
EVALUATED = ["--opts", "MODEL.WEIGHTS", "model_final.pth"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to measure: give --models, --config-file or --preset"),
        (["--models", "V-40"], "No network 'V-40'. Close to it:"),
        (["--models", "V-39", "--treatments", "best"], "invalid choice: 'best'"),
        (["--models", "V-39", "--reference", "a", "b"], "--reference names 2 networks for all"),
        (["--models", "V-39", "--reference", "V-57"], "No reference network 'V-57'"),
        (["--models", "V-39", "--accuracy", "V-39=good"], "--accuracy takes pairs as NAME=AP"),
        (["--models", "V-39", "--accuracy", "V-39"], "--accuracy takes pairs as NAME=AP"),
        (["--config-file", "nothing.yaml"], "No config file 'nothing.yaml'"),
        (["--models", "V-39", "--batches", "0"], "0 is not a whole number from 1 up"),
        (["--models", "V-39", "--repeats", "-1"], "-1 is not a whole number from 1 up"),
        (["--models", "V-39", "--sizes", "64x0"], "'64x0' is neither HEIGHTxWIDTH"),
        (
            ["--models", "V-39", "--output", str(REPOSITORY)],
            "README.md exists, and is not as this package wrote it",
        ),
        (["--models", "V-39", "--opts", "MODEL.VOVNET.NORM", "GN"], "go with --config-file"),
        (["--models", "V-39", "--output", __file__], "cannot be a folder: File exists"),
        (["--models", "V-39", "--sizes", "own"], "V-39 has no size of its own"),
        *(
            (["--models", name, "--norm", "foo"], "No norm 'foo': there are '', 'BN', 'SyncBN',")
            for name in ("V-39", "ResNet-50")
        ),
        (["--models", "DenseNet-161", "--norm", "GN"], "--norm is of VoVNet and ResNet"),
        (["--models", "timm:ese_vovnet39b", "--norm", "GN"], "--norm is of VoVNet and ResNet"),
        (["--config-file", RETINANET, "--norm", "GN"], "--norm is of VoVNet and ResNet"),
        *(
            (
                [*DEPLOYMENT, "--treatments", treatment, *EVALUATED, key, "('nowhere',)"],
                f"'nowhere' {reason}",
            )
            for treatment, key, reason in (
                ("openvino-int8", "DATASETS.TRAIN", "to calibrate on is not registered"),
                ("plain", "DATASETS.TEST", "of DATASETS.TEST is not registered"),
            )
        ),
        *(
            (["--config-file", RETINANET, "--opts", key, "X"], f"{key} 'X' is not registered")
            for key in ("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME")
        ),
        *(
            (["--models", "V-39", "--device", name], f"'{name}' is no device that torch finds")
            for name in ("gpu", "meta", "cuda:99")
        ),
    ],
)
def test_the_message_of_a_mistake_is_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_or_exit(tool.run, tool.parse_arguments(words))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    if not error.startswith("usage: "):  # not a message of argparse
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
