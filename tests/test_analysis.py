# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Complexity by stage, compared with the figures of the papers, fvcore and real allocations."""

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import analyze_model
import matplotlib.pyplot as plt
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from devices import shapes_alone
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import nn

from vovnet_d2 import VoVNet, VoVNetSpec, get_config_file
from vovnet_d2.analysis import Complexity, analyze
from vovnet_d2.analysis.complexity import CONVENTIONS
from vovnet_d2.analysis.memory_access import LayerCost, convolution_cost, layer_cost
from vovnet_d2.analysis.observe import PartTracker, observe
from vovnet_d2.analysis.peak_memory import PeakMemory
from vovnet_d2.analysis.report import _scale, format_table, plot_complexity
from vovnet_d2.modeling.baselines.cifar import CIFAR_SPECS, CifarClassifier

STAGES = ["stage2", "stage3", "stage4", "stage5"]

SMALL = VoVNetSpec(
    stage_mid_channels=(8, 8, 12, 12),
    stage_out_channels=(16, 16, 24, 24),
    blocks_per_stage=(1, 2, 1, 1),
    layers_per_block=2,
    stem_channels=(8, 8, 8),
)
SMALL_VARIANTS = {
    "eSE": replace(SMALL, ese="all"),
    "pooled": replace(SMALL, stem="pooled"),
    "depthwise": replace(SMALL, depthwise=True),
    "bottleneck": replace(SMALL, bottleneck=True),
}


# Memory access -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("c_in", "c_out"), [(64, 64), (16, 256), (300, 12)])
def test_equation_1_and_its_bound(c_in: int, c_out: int, kernel: int) -> None:
    h, w = 28, 36
    cost = convolution_cost(h, w, c_in, c_out, kernel)
    assert cost.memory_access == h * w * (c_in + c_out) + kernel**2 * c_in * c_out
    b = kernel**2 * h * w * c_in * c_out
    assert cost.multiply_adds == b
    assert cost.lower_bound == pytest.approx(2 * math.sqrt(h * w * b / kernel**2) + b / (h * w))
    assert (cost.memory_access == cost.lower_bound) == (c_in == c_out)
    assert cost.memory_access >= cost.lower_bound


class CostRecorder:
    def __init__(self) -> None:
        self.costs: list[LayerCost] = []

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if (cost := layer_cost(func, args, kwargs, out)) is not None:
            self.costs.append(cost)


def costs_of(function: Callable[[], object]) -> list[LayerCost]:
    recorder = CostRecorder()
    with torch.no_grad(), observe(recorder):
        function()
    return recorder.costs


def test_cost_of_other_layers() -> None:
    """Compare strided, grouped, transposed and fully-connected layers with a count by hand."""
    x = torch.empty(2, 8, 10, 10, device="meta")
    layers: dict[nn.Module, LayerCost] = {
        nn.Conv2d(8, 6, 3, 2, 1): LayerCost(1600, 300, 432, 2 * 25 * 432),
        nn.Conv2d(8, 8, 3, padding=1, groups=8): LayerCost(1600, 1600, 72, 2 * 100 * 72),
        nn.ConvTranspose2d(8, 5, 2, 2): LayerCost(1600, 4000, 160, 2 * 100 * 160),
        nn.Linear(10, 7): LayerCost(1600, 1120, 70, 160 * 70),
        nn.Linear(10, 7, bias=False): LayerCost(1600, 1120, 70, 160 * 70),
    }
    for layer, expected in layers.items():
        assert costs_of(lambda layer=layer: layer.to("meta")(x)) == [expected]
    q = torch.empty(1, 4, 6, 8, device="meta")
    (cost,) = costs_of(lambda: torch.bmm(q[0], q[0].transpose(1, 2)))
    assert cost == LayerCost(192, 4 * 36, 192, 4 * 36 * 8)


def network_memory_access(name: str, last_transition: bool = False) -> dict[str, int]:
    with shapes_alone():
        model = CifarClassifier(name, last_transition=last_transition)
    return {p.part: p.memory_access for p in analyze(model, (32, 32)).parts}


@pytest.mark.parametrize(
    ("name", "last_transition", "expected"),
    [
        ("DenseNet-40", False, 3_659_616),
        ("OSA-12x20", False, 2_078_736),
        ("OSA-12x20", True, 2_714_640),
        ("OSA-5x43", False, 2_045_792),
        ("OSA-5x43", True, 2_567_321),
    ],
)
def test_memory_access_of_the_cifar_networks(
    name: str, last_transition: bool, expected: int
) -> None:
    """Compare with values from equation 1 by hand. The paper gives 3.7M for DenseNet-40."""
    parts = network_memory_access(name, last_transition)
    assert sum(parts.values()) - parts["stem"] - parts["linear"] == expected
    if name == "DenseNet-40":
        assert expected + parts["stem"] == 3_679_504


@pytest.mark.parametrize("name", CIFAR_SPECS)
def test_only_layers_of_equal_width_meet_the_bound(name: str) -> None:
    with shapes_alone():
        model = CifarClassifier(name, last_transition=True)
        costs = costs_of(lambda: model.eval()(torch.empty(1, 3, 32, 32)))
    meets = [cost.memory_access == cost.lower_bound for cost in costs]
    spec = CIFAR_SPECS[name]
    if spec.connections == "dense":
        # Only the transitions meet it: the input of a dense layer is wider than its output.
        assert sum(meets) == 3
    else:
        # All layers meet it except the stem, the classifier and the first layer of each block.
        assert sum(meets) == 3 * (spec.layers - 1) + 3
    assert all(cost.read == cost.written for cost, met in zip(costs, meets, strict=True) if met)


# Counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "giga_multiply_adds"),
    [
        ("V-19-slim-dw-eSE", 1_384_752, 0.398),
        ("V-19-dw-eSE", 5_518_080, 1.332),
        ("V-19-slim-eSE", 2_653_136, 1.680),
        ("V-19-eSE", 10_180_416, 4.121),
        ("V-39-eSE", 25_184_128, 7.075),
        ("V-57-eSE", 41_454_912, 8.935),
        ("V-99-eSE", 69_523_520, 16.495),
    ],
)
def test_totals_of_the_variants(name: str, parameters: int, giga_multiply_adds: float) -> None:
    """Compare with independent counts. Frozen norms count like trainable norms."""
    with shapes_alone():
        model = VoVNet(name, norm="FrozenBN", out_features=STAGES)
    total = analyze(model, (224, 224)).total
    assert total.parameters == parameters
    assert round(total.multiply_adds / 1e9, 3) == giga_multiply_adds


def assert_counts_equal_those_of_fvcore(
    complexity: Complexity, model: nn.Module, *inputs: Any
) -> None:
    counted = {"conv", "linear", "matmul", "addmm"}

    def of_module(analysis: Any, part: str) -> int:
        return sum(n for op, n in analysis.by_operator(part).items() if op in counted)

    flops = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False)
    activations = ActivationCountAnalysis(model, inputs).unsupported_ops_warnings(False)
    for part in (*complexity.parts, replace(complexity.total, part="")):
        assert part.multiply_adds == of_module(flops, part.part)
        assert part.activations == of_module(activations, part.part)
    assert complexity.total.multiply_adds > 0


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_counts_equal_those_of_fvcore(variant: str) -> None:
    model = VoVNet(SMALL_VARIANTS[variant], norm="BN", num_classes=9)
    complexity = analyze(model, (64, 96))
    assert [p.part for p in complexity.parts] == ["stem", *STAGES, "linear"]
    assert_counts_equal_those_of_fvcore(complexity, model, torch.rand(1, 3, 64, 96))
    for part in complexity.parts:
        module = getattr(model, part.part)
        assert part.parameters == sum(p.numel() for p in module.parameters())


def resnet(depth: int) -> nn.Module:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def test_another_backbone() -> None:
    model = resnet(18)
    complexity = analyze(model, (32, 64))
    assert [p.part for p in complexity.parts] == ["stem", "res2", "res3", "res4", "res5"]
    assert [p.output_shape for p in complexity.parts][-1] == (512, 1, 2)
    assert_counts_equal_those_of_fvcore(complexity, model, torch.rand(1, 3, 32, 64))


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_meta_tensors_give_the_figures_of_real_tensors(variant: str) -> None:
    with shapes_alone():
        empty = VoVNet(SMALL_VARIANTS[variant], out_features=STAGES)
    real = VoVNet(SMALL_VARIANTS[variant], out_features=STAGES)
    found, expected = analyze(empty, (64, 64)), analyze(real, (64, 64))
    for part, other in zip(found.parts, expected.parts, strict=True):
        # Batch norm on meta tensors returns statistics that batch norm on the CPU does not return.
        assert part.peak_memory == pytest.approx(other.peak_memory, rel=0.01)
        assert part == replace(other, peak_memory=part.peak_memory)


def test_work_outside_the_parts_is_counted_as_other() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)])
            self.scale = nn.Parameter(torch.ones(6, 5, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(self.layers[1](self.layers[0](x)), self.scale)

    found = analyze(Net(), (2, 2))
    parts = {p.part: p for p in found.parts}
    assert list(parts) == ["layers.0", "layers.1", "other"]
    assert (parts["other"].parameters, parts["other"].multiply_adds) == (30, 4 * 30)
    assert found.total.parameters == 12 + 4 + 20 + 5 + 30


def test_networks_are_counted_in_evaluation_mode() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4)).train()
    analyze(net, (8, 8))
    assert not any(module.training for module in net.modules())
    assert not net[2].running_mean.any()


def test_a_part_costs_the_sum_of_its_layers() -> None:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    (part,) = analyze(nn.Sequential(nn.Sequential(*layers)), (20, 30)).parts
    costs = [convolution_cost(20, 30, 3, 8, 3), convolution_cost(20, 30, 8, 16, 3)]
    for quantity in ("multiply_adds", "memory_access", "lower_bound"):
        expected = sum(getattr(cost, quantity) for cost in costs)
        assert getattr(part, quantity) == pytest.approx(expected), quantity


def test_units_follow_the_total() -> None:
    for unit, channels, shown in (
        ("(M)", 40_000, "1.120"),
        ("(k)", 40, "1.120"),
        ("()", 35, "980.000"),
    ):
        net = nn.Sequential(nn.Conv2d(3, channels, 3))  # 28 parameters per channel
        table = format_table(analyze(net, (3, 3)))
        heading, _, first = [row.split("|") for row in table.splitlines()[:3]]
        column = [cell.strip() for cell in heading].index(f"parameters {unit}")
        assert first[column].strip() == shown


@pytest.mark.parametrize(
    ("number", "unit", "divisor"),
    [(999, "", 1), (1000, "k", 1e3), (999_999, "k", 1e3), (10**6, "M", 1e6), (10**9, "G", 1e9)],
)
def test_a_unit_begins_with_one(number: int, unit: str, divisor: float) -> None:
    complexity: Any = SimpleNamespace(total=SimpleNamespace(parameters=number, peak_memory=number))
    assert _scale(complexity, "parameters") == (f"parameters ({unit})", divisor)
    assert _scale(complexity, "peak_memory") == (f"peak memory ({unit}B)", divisor)


# Peak memory -------------------------------------------------------------------------------------


def allocated_at_peak(model: nn.Module, image: torch.Tensor, trace: Path) -> int:
    """Return the peak of the CPU's allocator in bytes, minus its state before the call."""
    with torch.no_grad():
        model(image)
        with torch.profiler.profile(profile_memory=True) as profile:
            model(image)
    profile.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [e["args"]["Total Allocated"] for e in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


def allocate_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    assert dilation == (1, 1)
    height, width = (
        (x.shape[i + 2] + 2 * padding[i] - weight.shape[i + 2]) // stride[i] + 1 for i in (0, 1)
    )
    return x.new_zeros(x.shape[0], weight.shape[0], height, width)


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_peak_memory_equals_the_allocated_memory(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = VoVNet(SMALL_VARIANTS[variant], out_features=STAGES).eval()
    image = torch.rand(1, 3, 128, 160)
    counted = analyze(model, (128, 160)).total.peak_memory - image.nbytes
    # Replace the convolution kernels: they allocate workspace, which is not in the count.
    monkeypatch.setattr(nn.functional, "conv2d", allocate_output)
    expected = allocated_at_peak(model, image, tmp_path / "trace.json")
    # Each allocation is rounded up to 64 bytes.
    assert counted == pytest.approx(expected, rel=0.005)


def test_a_view_counts_with_its_whole_memory() -> None:
    assert PeakMemory(PartTracker(), torch.zeros(10)[:3]).live == 10 * 4


def test_peak_memory_by_hand() -> None:
    """Count input, output and the tensors that later parts still need."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1, bias=False)
            self.second = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.ReLU())
            self.third = nn.Conv2d(8, 1, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = self.first(x)
            return kept + self.third(self.second(kept))

    pixels = 4 * 10 * 10
    peaks = {p.part: p.peak_memory for p in analyze(Net(), (10, 10)).parts}
    assert peaks == {
        "first": (3 + 4) * pixels,
        "second": (3 + 4 + 8 + 8) * pixels,
        "third": (3 + 4 + 8 + 1) * pixels,
    }


# Detectors ---------------------------------------------------------------------------------------

ZOO_KINDS = {
    "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml": ["rpn", "box head"],
    "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml": ["fpn", "box head"],
    "COCO-Detection/rpn_R_50_C4_1x.yaml": ["rpn"],
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml": ["fpn", "head"],
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml": ["rpn", "box and mask head"],
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": [
        *("fpn", "rpn", "box head", "mask head")
    ],
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml": ["fpn", "rpn", "box head", "keypoint head"],
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml": [
        *("fpn", "rpn", "box head", "mask head", "semantic head")
    ],
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml": ["fpn", "rpn", "box head", "mask head"],
    "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml": ["fpn", "rpn", "box head", "mask head"],
}


def build(config_file: str, *options: Any) -> tuple[nn.Module, int, tuple[int, int]]:
    arguments = ["--config-file", config_file, *map(str, options)]
    with shapes_alone():
        return analyze_model.build_from_config(
            analyze_model.argument_parser().parse_args(arguments)
        )


def detector(config_file: str, *options: Any) -> nn.Module:
    return build(config_file, *options)[0]


@pytest.mark.parametrize("config_file", ZOO_KINDS)
def test_every_kind_of_detector_is_counted_as_a_whole(config_file: str) -> None:
    norm = "GN" if config_file.endswith("gn.yaml") else "BN"
    options = ("MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", 0)
    model = detector(config_file, *options)
    found = analyze(model, (128, 160))
    assert [p.part for p in found.parts if not p.part.startswith(("res", "stem"))] == (
        ZOO_KINDS[config_file]
    )
    assert found.total.parameters == sum(p.numel() for p in model.parameters())
    for quantity in ("multiply_adds", "activations", "memory_access", "parameters"):
        total = getattr(found.total, quantity)
        assert sum(getattr(p, quantity) for p in found.parts) == total
    assert found.total.peak_memory >= max(p.peak_memory for p in found.parts)


def test_heads_of_regions_are_counted_as_fvcore_counts_them() -> None:
    model = detector(
        "COCO-InstanceSegmentation/mask_rcnn_V_19_slim_eSE_FPN_3x.yaml",
        *("MODEL.RPN.POST_NMS_TOPK_TEST", 7, "TEST.DETECTIONS_PER_IMAGE", 3),
        *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    )
    found = analyze(model, (64, 64))
    model = model.to_empty(device="cpu")
    parts = {p.part: p for p in found.parts}
    heads = model.roi_heads

    def count(module: nn.Module, *shape: int) -> int:
        flops = FlopCountAnalysis(module, torch.zeros(shape)).unsupported_ops_warnings(False)
        return flops.total()

    boxes = count(heads.box_head, 7, 8, 7, 7) + count(heads.box_predictor, 7, 16)
    assert parts["box head"].multiply_adds == boxes
    mask_layers = nn.Sequential(*heads.mask_head.children())
    assert parts["mask head"].multiply_adds == count(mask_layers, 3, 8, 14, 14)
    rpn = model.proposal_generator.rpn_head
    levels = [16, 8, 4, 2, 1]  # sides of the feature maps from stride 4 on
    by_level = [
        count(nn.Sequential(rpn.conv, layer), 1, 8, side, side) - count(rpn.conv, 1, 8, side, side)
        for layer in (rpn.objectness_logits, rpn.anchor_deltas)
        for side in levels
    ] + [count(rpn.conv, 1, 8, side, side) for side in levels]
    assert parts["rpn"].multiply_adds == sum(by_level)
    assert any("7 proposals per image" in note for note in found.notes)
    assert any("3 detections per image" in note for note in found.notes)


def test_images_are_padded_for_the_fpn() -> None:
    model = detector("COCO-Detection/faster_rcnn_V_19_slim_eSE_FPN_3x.yaml")
    assert analyze(model, (100, 129)).image_size == (128, 160)


def test_parameters_that_are_not_counted_are_noted() -> None:
    model = detector("COCO-Detection/faster_rcnn_V_19_slim_eSE_FPN_3x.yaml")
    model.extra = nn.Linear(10, 10, device="meta")
    assert any("110 parameters of extra" in note for note in analyze(model, (64, 64)).notes)
    assert analyze(VoVNet(SMALL), (64, 64)).notes == []


# The tool ----------------------------------------------------------------------------------------


def run_tool(*arguments: str) -> None:
    analyze_model.run(analyze_model.argument_parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("config", "options", "backbone", "size"),
    [
        ("CIFAR_networks_digits.yaml", ["PRETRAIN.IMAGE_SIZE", "32"], "DenseNet-40", "32 x 32"),
        ("CIFAR_networks_digits.yaml", ["PRETRAIN.NETWORK", "OSA-5x43"], "OSA-5x43", "16 x 16"),
    ],
)
def test_tool_takes_classifiers(
    config: str, options: list[str], backbone: str, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tool("--config-file", f"Classification/{config}", *options)
    title, *table = capsys.readouterr().out.splitlines()
    assert title.endswith(f"image of {size}")
    run_tool("--backbone", backbone, "--image-size", *size.split(" x "))
    assert table == capsys.readouterr().out.splitlines()[1:]


@pytest.mark.parametrize(
    "words",
    [
        ["--backbone", "V-19-slim-dw-eSE"],
        ["--config-file", "COCO-Detection/faster_rcnn_V_19_slim_eSE_FPN_3x.yaml"],
    ],
)
def test_tool_takes_images_that_are_wider_than_high(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_tool(*words)
    assert capsys.readouterr().out.splitlines()[0].endswith("image of 800 x 1344")


def test_tool_takes_images_of_one_channel(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config-file", "COCO-Detection/faster_rcnn_V_19_slim_eSE_FPN_3x.yaml"]
    words += ["--image-size", "64", "64", "MODEL.WEIGHTS", ""]
    stems = []
    for options in ([], ["MODEL.PIXEL_MEAN", "[100.0]", "MODEL.PIXEL_STD", "[50.0]"]):
        run_tool(*words, *options)
        lines = capsys.readouterr().out.splitlines()
        (stem,) = [line.split("|") for line in lines if line.startswith("| stem ")]
        stems.append(float(stem[3]))
    weights = 2 * 64 * 9  # two more input channels; the table has three decimals
    assert stems[0] - stems[1] == pytest.approx(weights / 1e6, abs=0.001)


def test_tool_takes_1000_classes_where_there_are_no_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_tool("--config-file", "Classification/Base-Classification.yaml")
    printed = capsys.readouterr().out
    network = VoVNet("V-39-eSE", norm="BN", num_classes=1000)
    learned = sum(parameter.numel() for parameter in network.parameters())
    assert f"{learned / 1e6:.3f}" in printed
    assert "1000 classes" in printed


def test_tool_writes_the_same_numbers_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tool("--backbone", "V-99-eSE", "--image-size", "800", "1344", "--output", str(tmp_path))
    printed = capsys.readouterr().out
    assert "69.524" in printed  # million parameters
    content = json.loads((tmp_path / "complexity.json").read_text())
    assert content["total"]["parameters"] == 69_523_520
    assert content["network"] == "V-99-eSE"
    assert content["image_size"] == "800x1344"
    assert content["conventions"].keys() <= content["total"].keys()
    lines = (tmp_path / "complexity.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    for row, part in zip(rows, [*content["parts"], content["total"]], strict=True):
        assert row == {k: "" if v is None else str(v) for k, v in part.items()}
    assert (tmp_path / "complexity.png").stat().st_size > 10_000


def test_panels_of_the_figure() -> None:
    found = analyze(VoVNet(SMALL), (64, 64))
    figure = plot_complexity(found, "name of the network")
    panels = {panel.get_title(): panel for panel in figure.axes}
    names = ["parameters (k)", "multiply-adds (M)", "activations (k)", "memory access (k)"]
    assert list(panels) == [*(f"← {name}" for name in names), "intensity →", "← peak memory (kB)"]
    access, intensity = panels["← memory access (k)"], panels["intensity →"]
    bars = [bar.get_width() for bar in access.containers[0]]
    assert bars == pytest.approx([part.memory_access / 1e3 for part in found.parts])
    bounds, positions = access.collections[0].get_offsets().T
    assert bounds.tolist() == pytest.approx([part.lower_bound / 1e3 for part in found.parts])
    assert positions.tolist() == list(range(len(bars)))
    bars = [bar.get_width() for bar in intensity.containers[0]]
    assert bars == pytest.approx([part.intensity for part in found.parts])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [part.part for part in found.parts]
    plt.close(figure)


def test_every_quantity_has_a_convention() -> None:
    row = analyze(VoVNet(SMALL), (32, 32)).total.as_dict()
    assert row.keys() - CONVENTIONS.keys() == {"part", "output_shape"}


def test_tool_errors() -> None:
    with pytest.raises(FileNotFoundError, match=r"mask_rcnn_V_39_eSE_FPN_3x.yaml"):
        run_tool("--config-file", "COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN.yaml")
    with pytest.raises(ValueError, match=r"MODEL.FPN.NORM here, go with --config-file"):
        run_tool("--backbone", "V-39", "MODEL.FPN.NORM", "GN")


def all_configs() -> list[str]:
    """Return the config files of this package and of Detectron2 that can be analysed.

    Of configs that differ only in the length of training, one is returned. Base files and configs
    of classifiers, which tools/pretrain_net.py reads, are left out. So are Detectron2's own
    deformable convolutions, which need its compiled part and a GPU.
    """
    ours = Path(get_config_file("Base-VoVNet-COCO.yaml")).parent
    theirs = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent
    found = {
        re.sub(r"_\d+(x|k|00)(?=\.yaml|_)", "", str(path)): str(path.relative_to(root))
        for root in (ours, theirs)
        for path in sorted(root.glob("*/*.yaml"))
        if path.parent.name != "Classification"
        and "dconv" not in path.name
        and not path.name.startswith("Base-")
    }
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("config_file", all_configs())
def test_every_config(config_file: str) -> None:
    model, _, size = build(config_file)
    found = analyze(model, size if size[0] == size[1] else (256, 320))
    assert found.total.multiply_adds > 0
    assert not [note for note in found.notes if "parameters of" in note]
