# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Studies, their reports and the tool."""

import csv
import gc
import json
import re
import statistics
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from vovnet_d2.benchmark import ceilings, energy, study
from vovnet_d2.benchmark import command as tool
from vovnet_d2.benchmark.ceilings import Ceiling
from vovnet_d2.benchmark.networks import Network, backbone, calibrate_norms, detector
from vovnet_d2.benchmark.plots import plot_cell
from vovnet_d2.benchmark.protocol import interleaved_rounds
from vovnet_d2.benchmark.published import PAPER_TABLES, format_paper_table
from vovnet_d2.benchmark.report import CONVENTIONS, format_table, write_study
from vovnet_d2.benchmark.study import Plan, Study
from vovnet_d2.benchmark.treatments import TREATMENTS
from vovnet_d2.benchmark.workload import (
    detector_inputs,
    random_images,
)
from vovnet_d2.engine.config import load_config
from vovnet_d2.engine.launch import run_or_exit

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------- study


class Sleeper(nn.Module):
    """Takes a time that is known."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if x.device.type != "meta":
            time.sleep(self.seconds)
        return {"y": self.conv(x)}


def sleeper(name: str, seconds: float) -> Network:
    return Network(name, lambda: Sleeper(seconds))


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Studies collect garbage again and again, which need not look through all of torch."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings._MATRIX_SIZE, "cpu", 128)
    monkeypatch.setitem(ceilings._COPIED_BYTES, "cpu", 2**20)
    monkeypatch.setattr(ceilings, "_CONVOLUTIONS", [(8, 16)])


class SteadyMeter(energy.EnergyMeter):
    """Ten joules for every measurement, whatever it is of."""

    source = "a test"

    def start(self) -> None:
        pass

    def stop(self) -> float:
        return 10.0


def make_plan(**options: Any) -> Plan:
    defaults: dict[str, Any] = {
        "networks": [sleeper("slow", 0.06), sleeper("fast", 0.03)],
        "sizes": [(64, 64)],
        "batches": [2],
        "warmup": 1,
        "repeats": 3,
        "energy_seconds": 0.0,
    }
    return Plan(**defaults | options)


def run_study(**options: Any) -> Study:
    result = Study(make_plan(**options))
    result.run()
    if isinstance(result.interruption, Exception):
        raise result.interruption
    return result


def test_rows_of_known_sleepers(monkeypatch):
    monkeypatch.setattr(study, "find_meter", lambda device: SteadyMeter())
    monkeypatch.setattr(study, "_LEAST_ENERGY_SECONDS", 0)
    result = run_study(treatments=["plain", "fp16"], energy_seconds=1e-9)  # for a call each
    rows = {(row["network"], row["treatment"]): row for row in result.rows}
    slow, fast = rows["slow", "plain"], rows["fast", "plain"]
    assert 60 <= slow["latency_ms"] < 90
    assert slow["fps"] == pytest.approx(2 / (slow["latency_ms"] / 1e3))
    assert fast["time_of_network"] == pytest.approx(0.5, abs=0.15)
    assert fast["time_of_network_q1"] <= fast["time_of_network"] <= fast["time_of_network_q3"]
    assert fast["reference_network"] == "slow"
    assert slow["time_of_treatment"] == 1
    assert slow["gflops"] == 64 * 64 * 4 * 27 / 1e9
    assert slow["parameters_m"] == (4 * 27 + 4) / 1e6
    assert slow["gflops_per_second"] == pytest.approx(slow["gflops"] * slow["fps"])
    assert slow["joules_per_image"] == 5
    assert slow["rounds"] == 3
    assert rows["slow", "fp16"]["error"] == "float16 needs a GPU: on a CPU use bf16."
    assert rows["slow", "fp16"]["latency_ms"] is None
    assert slow["not_counted"] == ""
    assert "a test; idle power included" in result.protocol["energy"]


MULTIPLY_ADDS = 64 * 64 * 4 * 27  # of a sleeper, for one image
BYTES = 4 * (2 * 64 * 64 * (3 + 4) + 4 * 27)  # of its maps and its weight in float32, for two


@pytest.mark.parametrize(
    ("rate", "bandwidth", "floor"),
    [
        (MULTIPLY_ADDS, BYTES, 2),  # work of one second and of two; bytes of one second
        (MULTIPLY_ADDS * 8, BYTES / 3, 3),
    ],
)
def test_shares_of_known_ceilings(monkeypatch, rate, bandwidth, floor):
    def ceiling(work):
        return lambda *args: Ceiling(lambda: None, work, "known")

    def rounds(calls, *, device, repeats):
        # Twice the pace, for ceilings that take half a second.
        yield {name: 10.0 if name.startswith("slow") else 0.5 for name in calls}

    monkeypatch.setattr(study, "matrix_ceiling", ceiling(rate / 2))
    monkeypatch.setattr(study, "copy_ceiling", ceiling(bandwidth / 2))
    monkeypatch.setattr(study, "interleaved_rounds", rounds)
    row = run_study(networks=[sleeper("slow", 0)], treatments=["plain"]).rows[0]
    assert row["matrix_ceiling_gflops_per_second"] == pytest.approx(rate / 1e9)
    assert row["copy_gb_per_second"] == pytest.approx(bandwidth / 1e9)
    assert row["share_of_matrix_ceiling"] == pytest.approx(2 * MULTIPLY_ADDS / rate / 10)
    assert row["share_of_floor"] == pytest.approx(floor / 10)


def test_median_and_p95(monkeypatch):
    series = [0.1 * i for i in range(1, 22)]

    def rounds(calls, *, device, repeats):
        for seconds in series:
            yield dict.fromkeys(calls, seconds)

    monkeypatch.setattr(study, "interleaved_rounds", rounds)
    row = run_study(repeats=21).rows[0]
    assert row["latency_ms"] == pytest.approx(1e3 * statistics.median(series))
    percentiles = statistics.quantiles(series, n=20, method="inclusive")
    assert row["latency_p95_ms"] == pytest.approx(1e3 * percentiles[18])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory"),
        (RuntimeError("no kernel for that\nand more"), "no kernel for that"),
        (AssertionError(), "AssertionError"),
        (TypeError("forward() takes 1"), "forward() takes 1"),
        (KeyError("res2"), "KeyError: 'res2'"),
    ],
)
def test_what_cannot_run_is_a_row(error, reason):
    class Broken(Sleeper):
        def forward(self, x):
            if x.device.type != "meta" and x.shape[-1] == 64:
                raise error
            return super().forward(x)

    rows = run_study(networks=[Network("broken", lambda: Broken(0)), sleeper("well", 0)]).rows
    errors = {(row["network"], row["error"]) for row in rows}
    assert errors == {("broken", reason), ("well", "")}
    # The reference is broken, so that there is nothing to compare with.
    assert all(row["time_of_network"] is None for row in rows)
    assert "could not run" in format_table(rows)


class Failing(Sleeper):
    """In its fifth call: after one to warm up, two for its memory and one round."""

    def __init__(self):
        super().__init__(0)
        self.calls = 0

    def forward(self, x):
        self.calls += x.device.type != "meta"
        if self.calls == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")
        return super().forward(x)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("meter", [SteadyMeter(), energy.NoEnergyMeter("none")])
def test_what_fails_while_timed_is_a_row(monkeypatch, mode, meter):
    monkeypatch.setattr(Study, "meter", meter)
    networks = [sleeper("first", 0), Network("failing", Failing), sleeper("last", 0)]
    for repeats in (3, 1):  # in a round, and while its energy is measured
        rows = run_study(
            networks=networks,
            treatments=["plain"],
            modes=[mode],
            repeats=repeats,
            energy_seconds=0.3,
        )
        first, failing, last = rows.rows
        assert (first["error"], last["error"]) == ("", "")
        assert first["rounds"] == last["rounds"] == repeats
        if repeats == 1 and isinstance(meter, energy.NoEnergyMeter):
            assert failing["error"] == ""
        else:
            assert failing["error"] == "out of memory (while timed beside the others)"
            assert failing["latency_ms"] is None


@pytest.mark.parametrize("warmup", [1, 9])
def test_memory_is_given_back_once_no_error_holds_it(monkeypatch, warmup):
    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    class Holding(Failing):
        def forward(self, x):
            mine = Held()
            held.append(weakref.ref(mine))
            return super().forward(x)

    freed = []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: freed.append([ref() is None for ref in held])
    )
    (row,) = run_study(
        networks=[Network("holding", Holding)], treatments=["plain"], warmup=warmup
    ).rows
    assert "out of memory" in row["error"]
    before, after = freed
    assert before == []
    assert len(after) > 3
    assert all(after)


def test_more_networks_are_compiled_than_torch_allows_for(monkeypatch):
    counter = CompileCounter()
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend=counter, **options),
    )

    class Convolution(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 1)

        def forward(self, x):
            return {"y": self.conv(x)}

    class Recompiled(Convolution):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return {"y": self.conv(x) * self.calls}

    networks = [Network(str(n), lambda n=n: Convolution(n)) for n in range(1, 6)]
    options = {"treatments": ["compiled"], "sizes": [(8, 8)], "repeats": 1}
    with torch._dynamo.config.patch(recompile_limit=2, suppress_errors=True):
        rows = run_study(networks=networks, **options).rows
        assert [row["error"] for row in rows] == [""] * 5
        assert counter.frame_count == 5
        again = Network("recompiled", lambda: Recompiled(3))
        (row,) = run_study(networks=[again], warmup=9, **options).rows
        assert "recompile_limit" in row["error"]


def test_what_a_treatment_and_the_process_set(monkeypatch):
    kept = []
    monkeypatch.setattr(study, "keep_freed_memory", lambda: kept.append(0) or True)
    monkeypatch.setattr(
        study, "describe_environment", lambda device: {"float32 convolutions": "TF32"}
    )

    def rounds(calls, *, device, repeats):
        assert kept
        yield dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(study, "interleaved_rounds", rounds)
    result = run_study(treatments=["plain", "plain-tf32", "bf16"])
    operands = {(row["treatment"], row["float32_operands"]) for row in result.rows}
    assert operands == {("plain", "float32"), ("plain-tf32", "TF32"), ("bf16", "float32")}
    assert "float32 convolutions" not in result.protocol
    assert result.protocol["freed memory"] == "up to 2 GiB kept by the process"


def test_images_that_are_too_small_are_a_row():
    """Nor can its work be counted then."""

    class Unpadded(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"map": super().forward(input)}

    network = Network("wide", lambda: Unpadded(3, 4, 32))
    first, second = run_study(
        networks=[network], treatments=["plain"], sizes=[(16, 16), (40, 40)]
    ).rows
    assert "Kernel size can't be greater than actual input size" in first["error"]
    assert second["error"] == ""
    assert second["fps"] > 0


@pytest.mark.parametrize("where", [2, 9])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_study_keeps_what_it_has(monkeypatch, tmp_path, where, error):
    seen = []

    def rounds(*args, **options):
        for times in interleaved_rounds(*args, **options):
            seen.append(times)
            if len(seen) == where:
                raise error
            yield times

    monkeypatch.setattr(study, "interleaved_rounds", rounds)
    result = Study(make_plan(repeats=4, modes=["inference", "training"], batches=[1, 2]))
    result.run()
    assert isinstance(result.interruption, error)
    cases = 4  # two networks, two treatments
    assert [row["rounds"] for row in result.rows] == {
        2: [1] * cases,
        9: [4] * 2 * cases,
    }[where]
    markdown = next(p for p in write_study(result, tmp_path) if p.name == "README.md")
    rounds = {2: 1, 9: 4}[where]
    expected = f"- interrupted: these are the results up to then, of {rounds} rounds or fewer"
    assert expected in markdown.read_text()


def test_references():
    result = run_study(
        # Long, as what is to be seen is more than what a busy machine adds.
        networks=[sleeper("slow", 0.2), sleeper("fast", 0.1)],
        references={"slow": "fast", "fast": "fast"},
        treatments=["plain", "optimized"],
        reference_treatment="optimized",
    )
    for row in result.rows:
        assert row["reference_network"] == "fast"
        assert row["reference_treatment"] == "optimized"
    (row,) = (r for r in result.rows if (r["network"], r["treatment"]) == ("slow", "plain"))
    assert row["time_of_network"] == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": [sleeper("a", 0), sleeper("a", 0)]}, "named twice"),
        ({"treatments": ["best"]}, r"No treatment 'best': there are plain, .*compiled-fp16"),
        ({"modes": ["sleep"]}, r"No mode 'sleep': there are inference, training"),
        ({"references": {"slow": "x"}}, r"No reference network 'x': there are slow, fast"),
        ({"accuracy": {"x": 1.0}}, r"No network with an accuracy 'x'"),
        ({"reference_treatment": "bf16"}, r"No reference treatment 'bf16': there are plain"),
        ({"batches": [0]}, "Batches: 0 is not a whole number from 1 up"),
        ({"sizes": [(64, 0)]}, "Sizes: 0 is not"),
        ({"repeats": 0}, "Repeats: 0 is not"),
        ({"warmup": -1}, "Warm-up: -1 is not"),
        ({"energy_seconds": -1.0}, "seconds for energy are -1: give 0.3 or more"),
        ({"energy_seconds": 0.01}, "seconds for energy are 0.01: .* or 0 for none"),
        ({"treatments": ["plain", "plain"]}, "Treatments: plain, plain has one twice"),
        ({"sizes": [(64, 64), (64, 64)]}, "Sizes: .* has one twice"),
    ],
)
def test_plans_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**options)


# ------------------------------------------------------------------------- real networks, thin


TINY = [
    *["MODEL.VOVNET.STAGE_MID_CHANNELS", "(8, 8, 8, 8)", "MODEL.FPN.OUT_CHANNELS", "64"],
    *["MODEL.VOVNET.STAGE_OUT_CHANNELS", "(8, 8, 8, 8)", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"],
    *["MODEL.VOVNET.STEM_CHANNELS", "(8, 8, 8)", "MODEL.VOVNET.LAYERS_PER_BLOCK", "1"],
    *["MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"],
    *["MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "TEST.DETECTIONS_PER_IMAGE", "5"],
    *["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"],
]


@pytest.mark.parametrize(
    "config",
    [
        "COCO-InstanceSegmentation/mask_rcnn_V_19_slim_eSE_FPN_3x.yaml",
        "COCO-Detection/retinanet_V_19_slim_eSE_FPN_3x.yaml",
        "COCO-Keypoints/keypoint_rcnn_V_39_eSE_FPN_1x.yaml",  # which trains in NCHW
        "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml",
    ],
)
def test_detectors(config):
    network = detector(config, TINY)
    rows = run_study(
        networks=[network],
        treatments=["plain", "optimized", "bf16"],
        modes=["inference", "training"],
        repeats=1,
        batches=[1],
    ).rows
    assert [row["error"] for row in rows] == [""] * 6
    assert {row["network"] for row in rows} == {Path(config).stem}
    inference, training = rows[0], rows[3]
    assert training["gflops"] > 2 * inference["gflops"]
    assert len({row["parameters_m"] for row in rows}) == 1
    for row in rows:  # heads stay in float32
        shares = row["share_of_matrix_ceiling"], row["share_of_floor"]
        in_float32 = row["dtype"] == "float32"
        assert [share is not None for share in shares] == [
            in_float32,
            in_float32 and row["mode"] == "inference",
        ]


@pytest.mark.parametrize(
    "config",
    [
        "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml",
        "COCO-Detection/retinanet_V_19_slim_eSE_FPN_3x.yaml",
        "COCO-PanopticSegmentation/panoptic_fpn_V_39_eSE_1x.yaml",
    ],
)
def test_without_weights_nothing_is_dropped(config):
    model = detector(config, TINY).build()
    calibrate_norms(model.eval(), random_images(2, (64, 64), CPU))
    with torch.no_grad():
        (found,) = model(detector_inputs(model, random_images(1, (128, 128), CPU)))
    assert 0 < len(found["instances"]) <= 5  # without those whose box is outside the image
    if "panoptic_seg" in found:
        assert sum(segment["isthing"] for segment in found["panoptic_seg"][1]) > 0


def test_weights_that_leave_heads_random_are_told(tmp_path):
    config = "COCO-Detection/retinanet_V_19_slim_eSE_FPN_3x.yaml"
    file = tmp_path / "backbone.pth"
    model = detector(config, TINY).build()
    torch.save({"model": model.backbone.bottom_up.state_dict()}, file)
    options = [*TINY, "MODEL.WEIGHTS", str(file)]
    (row,) = run_study(
        networks=[detector(config, options, weights=True)], treatments=["plain"], batches=[1]
    ).rows
    expected = rf"{file} has no weights for backbone.fpn\S+: without --weights, heads"
    assert re.match(expected, row["error"])
    torch.save({"model": model.state_dict()}, file)
    (row,) = run_study(
        networks=[detector(config, options, weights=True)], treatments=["plain"], batches=[1]
    ).rows
    assert row["error"] == ""


def test_a_runs_config_is_called_by_its_run(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "config.yaml"
        file.write_text(load_config(RETINANET, []).dump())
        assert detector(str(file)).name == name


def test_training_at_a_size_where_one_image_leaves_a_norm_one_value():
    networks = [backbone("V-19-slim-eSE", norm="BN")]
    (row,) = run_study(
        networks=networks, treatments=["plain"], modes=["training"], sizes=[(32, 32)]
    ).rows
    assert row["error"] == ""
    assert row["gflops"] > 0


def test_heads_without_weights_get_all_the_regions_that_they_may():
    model = detector("COCO-InstanceSegmentation/mask_rcnn_V_19_slim_eSE_FPN_3x.yaml", TINY).build()
    calibrate_norms(model.eval(), random_images(2, (64, 64), CPU))
    regions = {}
    for name in ("box_head", "mask_head"):
        getattr(model.roi_heads, name).register_forward_pre_hook(
            lambda head, args, name=name: regions.update({name: len(args[0])})
        )
    with torch.no_grad():
        (found,) = model(detector_inputs(model, random_images(1, (128, 128), CPU)))
    assert regions == {"box_head": 20, "mask_head": 5}
    assert len(found["instances"]) == 5


# ---------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def measured() -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings._MATRIX_SIZE, "cpu", 64)
        patch.setitem(ceilings._COPIED_BYTES, "cpu", 1000)
        patch.setattr(ceilings, "_CONVOLUTIONS", [(8, 16)])
        patch.setattr(study, "find_meter", lambda device: SteadyMeter())
        return run_study(
            treatments=["plain", "fp16"],
            accuracy={"slow": 30.5},
            batches=[1, 2],
            repeats=2,
            energy_seconds=0.3,
        )


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
        ("table2", 0.05, 0.03),  # the paper's with two digits, and cut off
        ("table4", 0.003, 0.002),  # the paper's with norms counted
    ],
)
def test_the_papers_tables_are_measured(preset, work, weights, tmp_path, capsys):
    """The paper's two columns that no machine changes."""
    words = ["--preset", preset, "--warmup", "1", "--repeats", "1", "--output", str(tmp_path)]
    tool.run(tool.parse_arguments(words))
    records = json.loads((tmp_path / "benchmark.json").read_text())["records"]
    table = PAPER_TABLES[preset]
    assert [r["error"] for r in records] == [""] * 2 * len(table.detectors)
    for record, published in zip(records[::2], table.detectors.values(), strict=True):
        assert record["gflops"] == pytest.approx(published.gflops, rel=work)
        assert record["parameters_m"] == pytest.approx(published.parameters_m, rel=weights)
    printed = format_paper_table(table, records)
    assert printed in capsys.readouterr().out
    assert printed in (tmp_path / "README.md").read_text()


def row_of(**values: Any) -> dict[str, Any]:
    defaults = {"network": "a", "treatment": "plain", "fps": 10.0, "gflops": 5.0}
    return (
        defaults | {"gflops_per_second": 50.0, "accuracy": 40.0, "joules_per_image": 1.5} | values
    )


def test_four_plots():
    rows = [row_of(), row_of(network="b", fps=20.0, accuracy=None)]
    figure, left_out = plot_cell(rows, "title")
    axes = [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes]
    efficiency, joules = "computation efficiency (GFLOP/s)", "energy per image (J)"
    assert axes == [
        ("images per second", "accuracy"),
        (efficiency, "accuracy"),
        (joules, "accuracy"),
        (efficiency, joules),
    ]
    assert left_out == ["No accuracy was given (--accuracy) of b, which some plots lack."]
    points = [tuple(c.get_offsets()[0]) for c in figure.axes[3].collections]
    assert points == [(50, 1.5), (50, 1.5)]
    assert len(figure.axes[0].collections) == 1  # b's accuracy is not known
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a, plain", "b, plain"]


def test_plots_without_accuracy_and_energy():
    figure, left_out = plot_cell([row_of(accuracy=None, joules_per_image=None)], "title")
    assert [axis.get_ylabel() for axis in figure.axes] == ["GFLOPs (multiply-adds)"]
    assert len(left_out) == 4
    assert left_out[0] == (
        "images per second are plotted against GFLOPs (multiply-adds), as the accuracy of no "
        "network was given (--accuracy)."
    )
    assert "energy could not be measured" in left_out[3]


# ------------------------------------------------------------------------------------------ tool


def test_presets_are_plans():
    for name, preset in tool.PRESETS.items():
        args = tool.parse_arguments(["--preset", name, "--repeats", "7", "--device", "cpu"])
        assert args.repeats == 7
        assert args.models == preset.get("models", [])
        assert len(tool.make_plan(args).networks) == len(args.models) + len(args.config_file)


def test_the_preset_of_a_gpu_needs_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tool.parse_arguments(["--preset", "gpu"]).device == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        tool.parse_arguments(["--preset", "gpu"])
    assert "'cuda' is no device that torch finds here: choose from cpu\n" in capsys.readouterr().err


def test_tool(tmp_path, capsys):
    words = ["--models", "V-19-slim-dw-eSE", "ResNet-50", "--sizes", "64x64", "--repeats", "2"]
    words += ["--warmup", "1", "--accuracy", "ResNet-50=37.5", "--output", str(tmp_path)]
    tool.run(tool.parse_arguments(words))
    printed = capsys.readouterr().out
    assert "warm-up: 1 calls" in printed
    assert "| ResNet-50        | optimized" in printed
    records = json.loads((tmp_path / "benchmark.json").read_text())["records"]
    assert [r["network"] for r in records if r["accuracy"] == 37.5] == ["ResNet-50"] * 2
    assert "not available, because" in records[0]["energy"] or records[0]["joules_per_image"] > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_tool_writes_first(tmp_path, monkeypatch, error):
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
    """What kills the tool in the second cell leaves the first."""
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
    assert written == [2, 2]  # after the cell, and at the end
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["records"]) == 2


def test_earlier_results_outlive_a_run_without_any(tmp_path):
    (tmp_path / "benchmark.json").write_text("{}")
    words = ["--models", "V-19-slim-eSE", "--warmup", "1", "--repeats", "1", "--sizes", "8x8"]
    with pytest.raises(ValueError, match="Nothing could run"):
        tool.run(tool.parse_arguments([*words, "--output", str(tmp_path)]))
    assert (tmp_path / "benchmark.json").read_text() == "{}"


def test_part_of_a_preset():
    words = ["--preset", "resnet", "--models", "V-39", "ResNet-50"]
    plan = tool.make_plan(tool.parse_arguments(words))
    assert plan.reference_of("V-39") == "ResNet-50"
    assert "V-57" not in plan.references


def test_what_could_not_run_is_told(capsys):
    words = ["--models", "V-19-slim-eSE", "--warmup", "1", "--repeats", "1", "--sizes", "8x8"]
    with pytest.raises(ValueError, match="Nothing could run"):
        tool.run(tool.parse_arguments(words))
    tool.run(tool.parse_arguments([*words, "64x64"]))
    assert "2 of 4 cases could not run" in capsys.readouterr().err


REPOSITORY = Path(__file__).parents[1]
RETINANET = "COCO-Detection/retinanet_V_39_eSE_FPN_1x.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to measure: give --models, --config-file or --preset"),
        (["--models", "V-40"], "No network 'V-40'. Did you mean"),
        (["--models", "V-39", "--treatments", "best"], "No treatment 'best'"),
        (["--models", "V-39", "--reference", "a", "b"], "--reference names 2 networks for all"),
        (["--models", "V-39", "--reference", "V-57"], "No reference network 'V-57'"),
        (["--models", "V-39", "--accuracy", "V-39=good"], "--accuracy takes numbers"),
        (["--models", "V-39", "--accuracy", "V-39"], "'V-39' is neither NAME=AP nor a CSV file"),
        (["--models", "V-39", "--accuracy", str(Path(__file__).parent)], "be read: Is a directory"),
        (["--config-file", "nothing.yaml"], "No config file 'nothing.yaml'"),
        (["--models", "V-39", "--batches", "0"], "Batches: 0 is not a whole number"),
        (["--models", "V-39", "--output", str(REPOSITORY)], "README.md that is not of a benchmark"),
        (["--models", "V-39", "--options", "MODEL.VOVNET.NORM", "GN"], "go with --config-file"),
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
            (["--config-file", RETINANET, "--options", key, "X"], f"{key} 'X' is not registered")
            for key in ("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME")
        ),
        *(
            (["--models", "V-39", "--device", name], f"'{name}' is no device that torch finds")
            for name in ("gpu", "meta", "cuda:99")
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_or_exit(tool.run, tool.parse_arguments(words))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    if not error.startswith("usage: "):  # argparse's
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_accuracy_from_a_file(tmp_path):
    file = tmp_path / "ap.csv"
    file.write_text("network,accuracy\nV-39,33.5\n")
    assert tool.read_accuracy([str(file), "b=1"]) == {"V-39": 33.5, "b": 1.0}
    file.write_text("name,ap\nV-39,33.5\n")
    with pytest.raises(ValueError, match="no CSV file with the columns network and accuracy"):
        tool.read_accuracy([str(file)])
    file.write_text("network,accuracy\nV-39\n")
    with pytest.raises(ValueError, match=r"--accuracy takes numbers, .*ap.csv"):
        tool.read_accuracy([str(file)])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"nor a CSV file that can be read: 'utf-8' codec"):
        tool.read_accuracy([str(file)])


@pytest.mark.gpu
@pytest.mark.slow
def test_every_treatment_on_a_gpu():
    result = run_study(
        networks=[backbone("V-19-slim-eSE")],
        treatments=list(TREATMENTS),
        modes=["inference", "training"],
        device=torch.device("cuda"),
    )
    refused = {(row["mode"], row["treatment"]) for row in result.rows if row["error"]}
    assert refused == {("inference", "checkpointed")}
    for row in result.rows:
        if row["error"]:
            continue
        assert 0 < row["share_of_matrix_ceiling"] < 1
        assert row["peak_memory_mb"] > row["parameters_m"]
