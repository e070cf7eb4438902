# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Benchmark studies of networks whose figures are known, and of real networks."""

import re
import statistics
import weakref
from pathlib import Path

import pytest
import torch
from benchmark_runs import (
    Sleeper,
    SteadyMeter,
    make_plan,
    measure_energy_of_single_calls,
    run_study,
    sleeper,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

from vovnet_d2.benchmark import energy, study
from vovnet_d2.benchmark.networks import Network, backbone, calibrate_norms, detector
from vovnet_d2.benchmark.report import format_table, write_study
from vovnet_d2.benchmark.study import Study
from vovnet_d2.benchmark.treatments import TREATMENTS
from vovnet_d2.benchmark.workload import (
    detector_inputs,
    random_images,
)
from vovnet_d2.engine.config import load_config
from vovnet_d2.timing import interleaved_rounds

CPU = torch.device("cpu")


def test_rows_of_known_sleepers(monkeypatch):
    monkeypatch.setattr(study, "find_meter", lambda device: SteadyMeter())
    seconds = measure_energy_of_single_calls(monkeypatch)

    def rounds(calls, *, device, repeats):
        for pace in (1, 2, 1)[:repeats]:  # the machine slows down for a while
            yield {name: pace * (0.06 if name.startswith("slow") else 0.03) for name in calls}

    monkeypatch.setattr(study, "interleaved_rounds", rounds)
    networks = [sleeper("slow", 0), sleeper("fast", 0)]
    result = run_study(networks=networks, treatments=["plain", "fp16"], energy_seconds=seconds)
    rows = {(row["network"], row["treatment"]): row for row in result.rows}
    slow, fast = rows["slow", "plain"], rows["fast", "plain"]
    assert slow["latency_ms"] == 60
    assert slow["fps"] == pytest.approx(2 / (slow["latency_ms"] / 1e3))
    assert fast["time_of_network"] == 0.5
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


def test_cases_are_compared_round_by_round():
    times = {"reference": [1.0, 2.0, 4.0]}
    row = study._compare("network", "a", [3.0, 2.0, 8.0], times, "reference")
    quartiles = (row["time_of_network_q1"], row["time_of_network"], row["time_of_network_q3"])
    assert quartiles == (1.5, 2, 2.5)  # quartiles of the ratios 3, 1 and 2


def test_median_and_p95(monkeypatch):
    series = [0.01 * i**2 for i in range(1, 22)]  # its mean differs from its median

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
def test_a_network_that_fails_has_a_row_with_its_error(error, reason):
    class Broken(Sleeper):
        def forward(self, x):
            if x.device.type != "meta" and x.shape[-1] == 64:
                raise error
            return super().forward(x)

    rows = run_study(networks=[Network("broken", lambda: Broken(0)), sleeper("well", 0)]).rows
    errors = {(row["network"], row["error"]) for row in rows}
    assert errors == {("broken", reason), ("well", "")}
    # The reference network fails, so there is no time to compare with.
    assert all(row["time_of_network"] is None for row in rows)
    assert "could not run" in format_table(rows)


class Failing(Sleeper):
    """Network that fails in its fifth call.

    The calls before are one for warm-up, two for the measurement of memory, and one round.
    """

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
def test_a_network_that_fails_while_timed_has_a_row(monkeypatch, mode, meter):
    monkeypatch.setattr(Study, "meter", meter)
    seconds = measure_energy_of_single_calls(monkeypatch)
    networks = [sleeper("first", 0), Network("failing", Failing), sleeper("last", 0)]
    for repeats in (3, 1):  # with 3 it fails in a round; with 1, while its energy is measured
        rows = run_study(
            networks=networks,
            treatments=["plain"],
            modes=[mode],
            repeats=repeats,
            energy_seconds=seconds,
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
def test_memory_is_freed_after_an_error(monkeypatch, warmup):
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


def test_many_networks_can_be_compiled_in_one_study(monkeypatch):
    counter = CompileCounter()
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda forward, **_: compile_function(forward, backend=counter)
    )

    class Convolution(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 1)

        def forward(self, x):
            return {"y": self.conv(x)}

    class Recompiled(Convolution):
        calls = ()  # torch compiles again for each length of a tuple; for numbers it may not

        def forward(self, x):
            self.calls = (*self.calls, None)
            return {"y": self.conv(x) * len(self.calls)}

    networks = [Network(str(n), lambda n=n: Convolution(n)) for n in range(1, 6)]
    options = {"treatments": ["compiled"], "sizes": [(8, 8)], "repeats": 1}
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({limit: 2, "suppress_errors": True}):
        rows = run_study(networks=networks, **options).rows
        assert [row["error"] for row in rows] == [""] * 5
        assert counter.frame_count == 5
        again = Network("recompiled", lambda: Recompiled(3))
        (row,) = run_study(networks=[again], warmup=9, **options).rows
        assert limit in row["error"]


def test_settings_of_treatments_and_of_the_process(monkeypatch):
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
    assert result.protocol["freed memory"] == "kept by the process"


def test_images_that_are_too_small_have_a_row():
    """Measure a network at an image size that is too small for it, which also prevents counting."""

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


@pytest.mark.parametrize(("error", "where"), [(KeyboardInterrupt, 2), (RuntimeError, 9)])
def test_an_interrupted_study_keeps_what_it_has(monkeypatch, tmp_path, where, error):
    seen = []

    def rounds(*args, **options):
        for times in interleaved_rounds(*args, **options):
            seen.append(times)
            if len(seen) == where:
                raise error
            yield times

    monkeypatch.setattr(study, "interleaved_rounds", rounds)
    networks = [sleeper("first", 0), sleeper("second", 0)]
    result = Study(
        make_plan(networks=networks, repeats=4, modes=["inference", "training"], batches=[1, 2])
    )
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


def test_references(monkeypatch):
    """Check that times are compared with the time of the reference in the same round."""
    pace = {"slow plain": 6.0, "slow optimized": 4.0, "fast plain": 3.0, "fast optimized": 1.0}

    def rounds(calls, *, device, repeats):
        for speed in (1, 2, 5):
            yield {name: pace.get(name, 1.0) / speed for name in calls}

    monkeypatch.setattr(study, "interleaved_rounds", rounds)
    result = run_study(
        networks=[sleeper("slow", 0), sleeper("fast", 0)],
        references={"slow": "fast", "fast": "fast"},
        treatments=["plain", "optimized"],
        reference_treatment="optimized",
    )
    found = {(row["network"], row["treatment"]): row for row in result.rows}
    for row in found.values():
        assert row["reference_network"] == "fast"
        assert row["reference_treatment"] == "optimized"
    for treatment, of_network in (("plain", 2), ("optimized", 4)):
        assert found["slow", treatment]["time_of_network"] == pytest.approx(of_network)
        assert found["fast", treatment]["time_of_network"] == 1
    for network, of_treatment in (("slow", 1.5), ("fast", 3)):
        assert found[network, "plain"]["time_of_treatment"] == pytest.approx(of_treatment)
        assert found[network, "optimized"]["time_of_treatment"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": [sleeper("a", 0), sleeper("a", 0)]}, "named twice"),
        ({"references": {"slow": "x"}}, r"No reference network 'x': there are slow, fast"),
        ({"accuracy": {"x": 1.0}}, r"No network with an accuracy 'x'"),
        ({"reference_treatment": "bf16"}, r"No reference treatment 'bf16': there are plain"),
        ({"energy_seconds": -1.0}, "seconds for energy are -1: give 0.3 or more"),
        ({"energy_seconds": 0.01}, "seconds for energy are 0.01: .* or 0 for none"),
    ],
)
def test_invalid_plans(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**options)


# ------------------------------------------------------------------------- thin real networks


TINY = [
    *["MODEL.VOVNET.STAGE_MID_CHANNELS", "(8, 8, 8, 8)", "MODEL.FPN.OUT_CHANNELS", "64"],
    *["MODEL.VOVNET.STAGE_OUT_CHANNELS", "(8, 8, 8, 8)", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"],
    *["MODEL.VOVNET.STEM_CHANNELS", "(8, 8, 8)", "MODEL.VOVNET.LAYERS_PER_BLOCK", "1"],
    *["MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"],
    *["MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "TEST.DETECTIONS_PER_IMAGE", "5"],
    *["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "MODEL.RETINANET.NUM_CONVS", "1"],
]


@pytest.mark.parametrize(
    "config",
    [
        "COCO-InstanceSegmentation/mask_rcnn_V_19_slim_eSE_FPN_3x.yaml",
        "COCO-Detection/retinanet_V_19_slim_eSE_FPN_3x.yaml",
        "COCO-Keypoints/keypoint_rcnn_V_39_eSE_FPN_1x.yaml",  # it trains in NCHW
        pytest.param("COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml", marks=pytest.mark.slow),
    ],
)
def test_detectors(config):
    network = detector(config, TINY)
    rows = run_study(
        networks=[network],
        treatments=["plain", "optimized", "bf16"],
        modes=["inference", "training"],
        warmup=0,
        repeats=1,
        batches=[1],
    ).rows
    assert [row["error"] for row in rows] == [""] * 6
    assert {row["network"] for row in rows} == {Path(config).stem}
    inference, training = rows[0], rows[3]
    assert training["gflops"] > 2 * inference["gflops"]
    assert len({row["parameters_m"] for row in rows}) == 1


@pytest.mark.parametrize(
    "config",
    [
        "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml",
        "COCO-Detection/retinanet_V_19_slim_eSE_FPN_3x.yaml",
        "COCO-PanopticSegmentation/panoptic_fpn_V_39_eSE_1x.yaml",
    ],
)
def test_without_weights_no_detection_is_dropped(config):
    model = detector(config, TINY).build()
    calibrate_norms(model.eval(), random_images(2, (64, 64), CPU))
    with torch.no_grad():
        (found,) = model(detector_inputs(model, random_images(1, (128, 128), CPU)))
    assert 0 < len(found["instances"]) <= 5  # boxes outside the image are dropped
    if hasattr(model, "proposal_generator"):
        assert model.proposal_generator.nms_thresh == 1
    if "panoptic_seg" in found:
        assert sum(segment["isthing"] for segment in found["panoptic_seg"][1]) > 0


def test_weights_without_heads_are_refused(tmp_path):
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


def test_the_config_of_a_run_is_named_after_its_folder(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "config.yaml"
        file.write_text(load_config("COCO-Detection/retinanet_V_39_eSE_FPN_1x.yaml", []).dump())
        assert detector(str(file)).name == name


def test_training_at_a_size_with_one_value_per_image_and_norm():
    networks = [backbone("V-19-slim-eSE", norm="BN")]
    (row,) = run_study(
        networks=networks, treatments=["plain"], modes=["training"], sizes=[(32, 32)]
    ).rows
    assert row["error"] == ""
    assert row["gflops"] > 0


def test_heads_without_weights_get_the_largest_number_of_regions():
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


@pytest.mark.gpu
@pytest.mark.slow
def test_every_treatment_on_a_gpu():
    result = run_study(
        networks=[backbone("V-19-slim-eSE")],
        treatments=[t.name for t in TREATMENTS.values() if not t.backend],
        modes=["inference", "training"],
        device=torch.device("cuda"),
    )
    refused = {(row["mode"], row["treatment"]) for row in result.rows if row["error"]}
    assert refused == {("inference", "checkpointed")}
    for row in result.rows:
        if row["error"]:
            continue
        assert row["peak_memory_mb"] > row["parameters_m"]
