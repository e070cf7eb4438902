# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import hashlib
import http.server
import logging
import pickle
import threading
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import SimpleTrainer, hooks
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.logger import setup_logger
from reference import STRUCTURES, Net, assert_same_maps, native_names, thin
from state_dicts import COMPLETE_LAYOUTS, equal, features, random_state, snapshot
from torch import nn

from vovnet_d2 import VoVNet, VoVNetCheckpointer, VoVNetSpec, add_vovnet_config, convert_state_dict

NET = thin(STRUCTURES["eSE in all"])
GOOD = random_state(NET, counted=True)
STAGES = ("stem", "stage2", "stage3", "stage4", "stage5")


def vovnet(net: Net = NET, **args) -> VoVNet:
    return VoVNet(VoVNetSpec(**vars(net)), **{"out_features": STAGES, **args}).eval()


def config(net: Net = NET, architecture: str = "GeneralizedRCNN") -> CfgNode:
    """Return the config of a very small detector."""
    cfg = get_cfg()
    add_vovnet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.BACKBONE.NAME = "build_vovnet_fpn_backbone"
    cfg.MODEL.VOVNET.update({name.upper(): value for name, value in vars(net).items()})
    cfg.MODEL.FPN.update(IN_FEATURES=["stage2", "stage3", "stage4", "stage5"], OUT_CHANNELS=8)
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.update(NAME="StandardROIHeads", IN_FEATURES=["p2", "p3"], NUM_CLASSES=3)
    cfg.MODEL.ROI_BOX_HEAD.update(NAME="FastRCNNConvFCHead", NUM_FC=1, FC_DIM=8)
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    return cfg


@pytest.fixture(scope="module")
def pristine() -> nn.Module:
    return build_model(config())


@pytest.fixture
def detector(pristine) -> nn.Module:
    return copy.deepcopy(pristine)


@pytest.fixture
def messages() -> list[str]:
    """Collect the messages of our logger, even if they do not propagate to the root logger."""
    logged: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(f"{record.levelname}: {record.getMessage()}")

    logger, handler = logging.getLogger("vovnet_d2"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield logged
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def no_logging(monkeypatch):
    """Return a function that resets logging to the state of a new process, without handlers."""
    ours = logging.getLogger("vovnet_d2")

    def begin() -> None:
        setup_logger.cache_clear()
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        for name, value in (("handlers", []), ("level", logging.NOTSET), ("propagate", True)):
            monkeypatch.setattr(ours, name, value)

    yield begin
    setup_logger.cache_clear()
    monkeypatch.undo()
    ours.setLevel(ours.level)  # clears Python's cache of enabled levels


def test_messages_are_shown_once_if_our_logger_is_not_set_up(tmp_path, capsys, no_logging):
    torch.save(GOOD, tmp_path / "a.pth")
    no_logging()
    for _ in range(2):
        checkpointer = VoVNetCheckpointer(vovnet())
    checkpointer.load(str(tmp_path / "a.pth"))
    assert capsys.readouterr().out.count("The file holds V-19-slim-eSE") == 1


def test_logging_that_is_set_up_already_does_not_change(no_logging):
    no_logging()
    logging.getLogger().addHandler(logging.NullHandler())
    VoVNetCheckpointer(vovnet())
    assert not logging.getLogger("vovnet_d2").handlers


# Every layout, prefix and wrapper gives the feature maps of the published tensors


def in_layout(state, layout: str, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: t for name, t in convert_state_dict(state, layout).items()}


@torch.enable_grad()
def solver_state() -> dict[str, object]:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "iteration": 89999,
    }


FILES = {
    "bare": lambda state: state,
    "published": lambda state: in_layout(state, "detectron2", "backbone.bottom_up."),
    "with solver state": lambda state: {
        "model": in_layout(state, "detectron2", "backbone.bottom_up."),
        **solver_state(),
    },
    "data parallel": lambda state: in_layout(state, "detectron2", "module."),
    "data parallel detector": lambda state: {
        "model": in_layout(state, "detectron2", "module.backbone.bottom_up.")
    },
    "img_backbone": lambda state: {
        "state_dict": in_layout(state, "detectron2", "img_backbone."),
        "meta": {"CLASSES": ("car",)},
    },
    "timm": lambda state: in_layout(state, "timm"),
    "native detector": lambda state: {"model": in_layout(state, "native", "backbone.bottom_up.")},
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "norm", "counted"),
    [
        *((file, "FrozenBN", True) for file in FILES),
        *product(["bare"], ["BN"], [True, False]),
        ("bare", "FrozenBN", False),
    ],
)
def test_files(tmp_path, file, norm, counted):
    state = random_state(NET, counted=counted)
    torch.save(FILES[file](state), tmp_path / "a.pth")
    model = vovnet(norm=norm)
    VoVNetCheckpointer(model).load(str(tmp_path / "a.pth"))
    x = torch.randn(1, 3, 64, 64)
    assert_same_maps(model.double()(x.double()), features(NET, state, x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("structure", "layout"),
    [
        *((n, COMPLETE_LAYOUTS[0]) for n in STRUCTURES if "bottleneck" not in n),
        *product(["depthwise"], COMPLETE_LAYOUTS[1:]),
    ],
)
def test_load_state_dict_gives_the_same(tmp_path, structure, layout):
    net = thin(STRUCTURES[structure])
    state = in_layout(random_state(net), layout)
    torch.save(state, tmp_path / "a.pth")
    models = [vovnet(net), vovnet(net)]
    VoVNetCheckpointer(models[0]).load(str(tmp_path / "a.pth"))
    models[1].load_state_dict(state)
    assert equal(models[0].state_dict(), models[1].state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert_same_maps(models[0].double()(x.double()), features(net, random_state(net), x))


def test_a_bottleneck_and_deformable_layers(tmp_path):
    """Save and load layers that only our own layout has names for."""
    for net, args in (
        (thin(STRUCTURES["bottleneck"]), {}),
        (NET, {"stage_with_dcn": (False, True, True, True), "with_modulated_dcn": True}),
    ):
        model = vovnet(net, **args)
        for tensor in model.state_dict().values():
            tensor.uniform_(0.5, 1)
        VoVNetCheckpointer(model, str(tmp_path)).save("a")
        other = vovnet(net, **args)
        VoVNetCheckpointer(other).load(str(tmp_path / "a.pth"))
        assert equal(model.state_dict(), other.state_dict())


def test_plain_weights_load_into_a_deformable_network(tmp_path):
    torch.save(GOOD, tmp_path / "a.pth")
    model = vovnet(stage_with_dcn=(False, False, True, True))
    VoVNetCheckpointer(model).load(str(tmp_path / "a.pth"))
    assert torch.equal(
        model.stage5[0].layers[0].weight, GOOD["stage5.OSA5_1.layers.0.OSA5_1_0/conv.weight"]
    )
    assert not model.stage5[0].layers[0].offset.weight.any()


def test_deformable_weights_do_not_load_into_a_plain_network(tmp_path, messages):
    source = vovnet(stage_with_dcn=(False, False, True, True))
    VoVNetCheckpointer(source, str(tmp_path)).save("a")
    path, model = str(tmp_path / "a.pth"), vovnet(stage_with_dcn=(False, False, False, True))
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"It has 12 tensors .* such as stage4\.0\.layers\.0\.offset\.weight\. .*"
        r"MODEL\.VOVNET\.STAGE_WITH_DCN: \[False, False, True, True\]",
    ):
        VoVNetCheckpointer(model).load(path)
    assert equal(snapshot(model), before)
    VoVNetCheckpointer(model, allow_partial=True).load(path)
    assert any(m.startswith("WARNING: Loading in part. It has 12 tensors") for m in messages)
    # A shorter model loads the file, because it does not build the stages that differ.
    VoVNetCheckpointer(vovnet(out_features=["stage3"])).load(path)


def test_a_tensor_that_no_stage_has_is_refused(tmp_path):
    """Load a file with the bias of a convolution. The model has no such bias, only norms."""
    state = {**GOOD, "stage3.OSA3_1.layers.0.OSA3_1_0/conv.bias": torch.ones(10)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"no place for, such as stage3\.0\.layers\.0\.bias\."):
        VoVNetCheckpointer(vovnet()).load(str(tmp_path / "a.pth"))


def test_half_precision_and_frozen_stages(tmp_path):
    torch.save(
        {k: t.half() if t.is_floating_point() else t for k, t in GOOD.items()}, tmp_path / "a"
    )
    model = vovnet(norm="BN", freeze_at=3)
    VoVNetCheckpointer(model).load(str(tmp_path / "a"))
    names = native_names(NET, counted=True)
    for published, name in names.items():
        if name in model.state_dict() and not name.endswith("tracked"):
            assert torch.equal(model.state_dict()[name], GOOD[published].half().float())


# Detectors


def test_a_backbone_loads_into_a_detector(tmp_path, detector, messages):
    torch.save(in_layout(GOOD, "timm"), tmp_path / "a.pth")
    before = snapshot(detector)
    checkpointer = VoVNetCheckpointer(detector)
    checkpointer.load(str(tmp_path / "a.pth"))
    names = native_names(NET, counted=True)
    loaded = {f"backbone.bottom_up.{names[k]}": t for k, t in GOOD.items() if "tracked" not in k}
    after = snapshot(detector)
    assert equal({k: after[k] for k in loaded}, loaded)
    rest = after.keys() - loaded.keys()
    assert len(rest) > 10
    assert equal({k: after[k] for k in rest}, {k: before[k] for k in rest})
    assert set(checkpointer.missing_outside_backbone) == rest
    assert not [message for message in messages if not message.startswith("INFO")]
    assert "roi_heads.box_predictor.cls_score" in next(m for m in messages if "not found in" in m)


@pytest.mark.parametrize("prefix", ["", "module.", "model.student."])
def test_a_whole_detector(tmp_path, detector, prefix):
    """Load the heads, and a backbone under its published names."""
    backbone = {f"backbone.bottom_up.{name}": tensor for name, tensor in GOOD.items()}
    heads = {
        name: torch.randn_like(tensor)
        for name, tensor in detector.state_dict().items()
        if ".bottom_up." not in name
    }
    old = {"proposal_generator.anchor_generator.cell_anchors.0": torch.ones(3, 4)}
    state = {prefix + name: tensor for name, tensor in {**backbone, **heads, **old}.items()}
    torch.save({"model": state, "iteration": 7}, tmp_path / "a.pth")
    checkpointer = VoVNetCheckpointer(detector)
    assert checkpointer.load(str(tmp_path / "a.pth")) == {"iteration": 7}
    assert checkpointer.missing_outside_backbone == []
    after = snapshot(detector)
    assert equal({k: after[k] for k in heads}, heads)
    assert torch.equal(
        after["backbone.bottom_up.stem.conv1.weight"], GOOD["stem.stem_1/conv.weight"]
    )


def test_a_head_of_another_number_of_classes_is_not_loaded(tmp_path, detector, messages):
    state = snapshot(detector)
    state["roi_heads.box_predictor.cls_score.weight"] = torch.ones(81, 8)
    state["roi_heads.box_predictor.cls_score.bias"] = torch.ones(81)
    torch.save({"model": state}, tmp_path / "a.pth")
    checkpointer = VoVNetCheckpointer(detector)
    checkpointer.load(str(tmp_path / "a.pth"))
    said = [m for m in messages if m.startswith("WARNING")]
    assert len(said) == 2
    assert checkpointer.missing_outside_backbone == [
        "roi_heads.box_predictor.cls_score.weight",
        "roi_heads.box_predictor.cls_score.bias",
    ]
    assert "cls_score.weight has shape (81, 8) in the file and (4, 8) in the model" in said[0]


def test_a_detector_with_other_heads(tmp_path, detector, messages):
    """Check that missing and unused names are logged as Detectron2 logs them."""
    predictor = "roi_heads.box_predictor.bbox_pred"
    state = {k: t for k, t in snapshot(detector).items() if not k.startswith(predictor)}
    state["roi_heads.mask_head.predictor.weight"] = torch.ones(3)
    torch.save({"model": state}, tmp_path / "a.pth")
    checkpointer = VoVNetCheckpointer(detector)
    checkpointer.load(str(tmp_path / "a.pth"))
    missing, unexpected = [m for m in messages if m.startswith("WARNING")]
    assert "not found in the checkpoint" in missing
    assert f"{predictor}.{{bias, weight}}" in missing
    assert "not used by the model" in unexpected
    assert "roi_heads.mask_head.predictor.weight" in unexpected
    expected = {f"{predictor}.weight", f"{predictor}.bias"}
    assert set(checkpointer.missing_outside_backbone) == expected
    checkpointer.load("")
    assert checkpointer.missing_outside_backbone == []


def test_a_missing_classifier_is_reported_outside_the_backbone(tmp_path):
    torch.save(GOOD, tmp_path / "a.pth")
    checkpointer = VoVNetCheckpointer(vovnet(num_classes=3, out_features=["linear"]))
    checkpointer.load(str(tmp_path / "a.pth"))
    assert set(checkpointer.missing_outside_backbone) == {"linear.weight", "linear.bias"}


def test_the_table(tmp_path, detector, messages):
    state = {f"img_backbone.{name}": tensor for name, tensor in GOOD.items()}
    state["img_backbone.classifier.weight"] = torch.ones(5, 64)
    state["img_neck.lateral.weight"] = torch.ones(5)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    VoVNetCheckpointer(detector).load(str(tmp_path / "a.pth"))
    table = next(message for message in messages if "| tensors" in message).splitlines()
    assert table[0] == (
        "INFO: The file holds V-19-slim-eSE with stage_mid_channels (8, 10, 12, 14), "
        "stage_out_channels (14, 32, 48, 64), blocks_per_stage (2, 1, 3, 1), layers_per_block 2, "
        "stem_channels (8, 8, 16), detectron2 names below 'img_backbone.', 3 input channels, "
        "5 classes."
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[1:]]
    assert cells[0] == ["tensors", "loaded", "missing", "unexpected", "wrong shape"]
    # Counts of the names in reference.py, without `num_batches_tracked`.
    count = {
        stage: str(sum(n.startswith(stage) and "tracked" not in n for n in GOOD))
        for stage in STAGES
    }
    heads = str(sum(".bottom_up." not in name for name in detector.state_dict()))
    assert cells[2:] == [
        *([stage, count[stage], "0", "0", "0"] for stage in STAGES),
        ["linear", "0", "0", "1", "0"],
        ["other", "0", heads, "1", "0"],
    ]
    assert any("does not tell its input" in message for message in messages)


def test_the_expected_input_is_logged(tmp_path, detector, messages):
    VoVNetCheckpointer(detector, str(tmp_path)).save("a")
    VoVNetCheckpointer(detector).load(str(tmp_path / "a.pth"))
    assert messages[-1] == (
        'INFO: It expects INPUT.FORMAT: "BGR", MODEL.PIXEL_MEAN: [103.53, 116.28, 123.675], '
        "MODEL.PIXEL_STD: [1, 1, 1] (as it says itself)."
    )


@pytest.mark.gpu
@torch.no_grad()
def test_a_network_on_a_gpu(tmp_path):
    """Load a good file into a network on a GPU, then a bad file, which must change nothing."""
    torch.save(GOOD, tmp_path / "a.pth")
    torch.save({**GOOD, "stem.stem_1/conv.weight": torch.ones(3)}, tmp_path / "b.pth")
    model = vovnet().cuda()
    VoVNetCheckpointer(model, str(tmp_path)).load(str(tmp_path / "a.pth"))
    assert all(tensor.is_cuda for tensor in model.state_dict().values())
    x = torch.randn(1, 3, 64, 64)
    maps = {name: map.cpu() for name, map in model.double()(x.double().cuda()).items()}
    assert_same_maps(maps, features(NET, GOOD, x))
    before = snapshot(model)
    with pytest.raises(ValueError, match="damaged"):
        VoVNetCheckpointer(model).load(str(tmp_path / "b.pth"))
    assert equal(snapshot(model), before)


def test_another_variant_is_refused_with_the_fitting_config_lines(tmp_path, detector):
    """Load a file that has all tensors of the model in the same shapes, and more blocks."""
    more = replace(NET, blocks_per_stage=(2, 1, 4, 1), ese="last")
    torch.save(random_state(more), tmp_path / "a.pth")
    before = snapshot(detector)
    with pytest.raises(ValueError, match="not loaded") as caught:
        VoVNetCheckpointer(detector).load(str(tmp_path / "a.pth"))
    for part in (
        "blocks_per_stage is (2, 1, 4, 1) in the file and (2, 1, 3, 1) in the model",
        "ese is last in the file and all in the model",
        "MODEL.VOVNET.BLOCKS_PER_STAGE: [2, 1, 4, 1]",
        'MODEL.VOVNET.ESE: "last"',
        "--allow-partial",
    ):
        assert part in str(caught.value)
    assert equal(snapshot(detector), before)


def test_loading_in_part_can_be_allowed(tmp_path, detector, messages):
    more = replace(NET, blocks_per_stage=(2, 1, 4, 1))
    state = random_state(more)
    torch.save(state, tmp_path / "a.pth")
    VoVNetCheckpointer(detector, allow_partial=True).load(str(tmp_path / "a.pth"))
    name = "backbone.bottom_up.stage4.2.aggregation.weight"
    expected = state["stage4.OSA4_3.concat.OSA4_3_concat/conv.weight"]
    assert torch.equal(detector.state_dict()[name], expected)
    assert any(m.startswith("WARNING: Loading in part. It holds") for m in messages)


@pytest.mark.parametrize("norm", ["GN", ""])
def test_norms_that_do_not_fit(tmp_path, norm):
    torch.save(GOOD, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r'MODEL\.VOVNET\.NORM: "FrozenBN" or "BN"'):
        VoVNetCheckpointer(vovnet(norm=norm)).load(str(tmp_path / "a.pth"))


def test_a_shorter_backbone_loads_a_longer_file(tmp_path):
    torch.save(GOOD, tmp_path / "a.pth")
    model = vovnet(out_features=["stage3"])
    VoVNetCheckpointer(model).load(str(tmp_path / "a.pth"))
    name = "stage3.OSA3_1.concat.OSA3_1_concat/conv.weight"
    assert torch.equal(model.stage3[0].aggregation.weight, GOOD[name])


class Pair(nn.Module):
    """Model with two VoVNets, for example one for colour and one for depth."""

    def __init__(self, second: Net = NET):
        super().__init__()
        self.first, self.second, self.head = vovnet(), vovnet(second), nn.Linear(2, 2)


def test_one_file_for_two_networks(tmp_path):
    model = Pair()
    torch.save(GOOD, tmp_path / "a.pth")
    checkpointer = VoVNetCheckpointer(model)
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.missing_outside_backbone == ["head.weight", "head.bias"]
    assert equal(model.first.state_dict(), model.second.state_dict())
    assert torch.equal(model.first.stem.conv1.weight, GOOD["stem.stem_1/conv.weight"])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("second", [NET, replace(NET, blocks_per_stage=(1, 1, 1, 1))])
def test_two_networks_in_a_file(tmp_path, second, prefix, messages):
    model, other = Pair(second), Pair(second)
    torch.save({prefix + name: t for name, t in model.state_dict().items()}, tmp_path / "a.pth")
    checkpointer = VoVNetCheckpointer(other)
    checkpointer.load(str(tmp_path / "a.pth"))
    assert equal(other.state_dict(), model.state_dict())
    assert checkpointer.missing_outside_backbone == []
    assert not any("not found" in m or "not used" in m for m in messages)


# Fields of the spec that names and shapes of tensors do not show


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [("residual", False, "RESIDUAL: False"), ("stem", "pooled", 'STEM: "pooled"')],
)
def test_our_own_files_record_stem_and_residual(tmp_path, field, value, line):
    other = vovnet(replace(NET, **{field: value}))
    VoVNetCheckpointer(other, str(tmp_path)).save("a")
    with pytest.raises(ValueError, match=f"Its {field} is {value}.* MODEL.VOVNET.{line}"):
        VoVNetCheckpointer(vovnet()).load(str(tmp_path / "a.pth"))


def test_the_residual_of_single_blocks_does_not_matter(tmp_path):
    single = replace(NET, blocks_per_stage=(1, 1, 1, 1))
    other = vovnet(replace(single, residual=not single.residual))
    VoVNetCheckpointer(other, str(tmp_path)).save("a")
    net = vovnet(single)
    VoVNetCheckpointer(net).load(str(tmp_path / "a.pth"))
    assert torch.equal(net.stem.conv1.weight, other.stem.conv1.weight)


def test_a_difference_from_a_convention_of_a_layout_is_a_warning(tmp_path, messages):
    """Load timm's names without eSE into a network with a residual, which only warns.

    timm's networks of this kind have no residual, but other networks may use timm's names.
    """
    net = replace(NET, ese="none")
    torch.save(in_layout(random_state(net), "timm"), tmp_path / "a.pth")
    VoVNetCheckpointer(vovnet(net)).load(str(tmp_path / "a.pth"))
    assert any(m.startswith("WARNING: Its residual is False (timm's convention)") for m in messages)


def test_fields_that_a_file_does_not_record_are_logged(tmp_path, messages):
    torch.save(in_layout(GOOD, "native"), tmp_path / "a.pth")
    VoVNetCheckpointer(vovnet()).load(str(tmp_path / "a.pth"))
    assert any("does not tell its stem and residual and input" in m for m in messages)


# Saving and resuming


class Data:
    def __iter__(self):
        while True:
            yield torch.randn(2, 3, 32, 32)


class Regressor(nn.Module):
    """Model that returns losses, as Detectron2's trainer expects."""

    def __init__(self):
        super().__init__()
        self.backbone = vovnet(norm="BN", out_features=["stage5"])
        self.head = nn.Linear(64, 1)

    def forward(self, x):
        return {"loss": self.head(self.backbone(x)["stage5"].mean((2, 3))).square().mean()}


class Run:
    """Training with a checkpointer, as Detectron2's launchers set it up."""

    def __init__(self, folder):
        self.model = Regressor().train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])
        self.trainer = SimpleTrainer(self.model, Data(), self.optimizer)
        self.checkpointer = VoVNetCheckpointer(
            self.model,
            str(folder),
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            trainer=self.trainer,
        )
        self.trainer.register_hooks(
            [
                hooks.LRScheduler(self.optimizer, self.scheduler),
                hooks.PeriodicCheckpointer(self.checkpointer, 3),
            ]
        )

    def state(self):
        return [x.state_dict() for x in (self.model, self.optimizer, self.scheduler, self.trainer)]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_resume(tmp_path):
    run, other = Run(tmp_path), Run(tmp_path)
    assert not other.checkpointer.has_checkpoint()
    run.trainer.train(0, 3)
    assert not same(run.state(), other.state())
    assert other.checkpointer.get_checkpoint_file() == str(tmp_path / "model_final.pth")
    rest = other.checkpointer.resume_or_load("ignored", resume=True)
    assert rest["iteration"] == other.trainer.iter == 2
    other.trainer.iter = run.trainer.iter  # Detectron2's trainers add one when they resume
    assert same(run.state(), other.state())
    assert other.scheduler.last_epoch == 3


def test_without_resume_only_weights_are_loaded(tmp_path):
    run, other = Run(tmp_path), Run(tmp_path)
    run.trainer.train(0, 3)
    fresh = copy.deepcopy(other.optimizer.state_dict())
    other.checkpointer.resume_or_load(str(tmp_path / "model_final.pth"), resume=False)
    assert equal(run.model.state_dict(), other.model.state_dict())
    assert same(other.optimizer.state_dict(), fresh)


def test_nothing_to_load():
    model = vovnet()
    before = snapshot(model)
    assert VoVNetCheckpointer(model).resume_or_load("") == {}
    assert equal(snapshot(model), before)


def alter(path, **changes) -> None:
    content = torch.load(path)
    torch.save({**content, **changes}, path)


def test_a_resume_needs_all_of_the_model(tmp_path):
    run, other = Run(tmp_path), Run(tmp_path)
    run.trainer.train(0, 3)
    model = run.model.state_dict()
    model.pop("head.weight")
    alter(tmp_path / "model_final.pth", model=model)
    before = copy.deepcopy(other.state())
    with pytest.raises(
        ValueError, match=r"To resume, all of the model must be in it; .*: 1 tensor,"
    ):
        other.checkpointer.resume_or_load("", resume=True)
    assert same(other.state(), before)


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "trainer"])
def test_a_resume_that_fails_late_changes_nothing(tmp_path, key):
    run, other = Run(tmp_path), Run(tmp_path)
    run.trainer.train(0, 3)
    wrong = 3 if key == "scheduler" else {"state": {}, "param_groups": []}
    alter(tmp_path / "model_final.pth", **{key: wrong})
    before = copy.deepcopy(other.state())
    with pytest.raises(ValueError, match=f"its {key} is not this run's .* do not resume"):
        other.checkpointer.resume_or_load("", resume=True)
    assert same(other.state(), before)


def test_a_failure_in_the_middle_changes_nothing(tmp_path, monkeypatch):
    """Let loading fail with an error that no earlier check can foresee."""
    torch.save(GOOD, tmp_path / "a.pth")
    model = vovnet()
    before, seen = snapshot(model), []

    def fail(*args):
        seen.append(not torch.equal(model.stem.conv1.weight, before["stem.conv1.weight"]))
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.stage5, "_load_from_state_dict", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        VoVNetCheckpointer(model).load(str(tmp_path / "a.pth"))
    assert seen == [True]
    assert equal(snapshot(model), before)


# Models without a VoVNet load as in Detectron2


def resnet(depth: int = 18) -> nn.Module:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(DEPTH=depth, RES2_OUT_CHANNELS=64, OUT_FEATURES=["res2", "res3"])
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_backbone(cfg, ShapeSpec(channels=3))


def randomised(model: nn.Module) -> nn.Module:
    for tensor in model.state_dict().values():
        tensor.uniform_(0.5, 1)
    return model


def test_resnets_load_as_in_detectron2(tmp_path):
    state = randomised(resnet()).state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    (tmp_path / "zoo.pkl").write_bytes(
        pickle.dumps({"model": arrays, "__author__": "us", "matching_heuristics": True})
    )
    caffe2 = {
        name.replace("stem.", "").replace(".norm.weight", "_bn_s").replace(".weight", "_w"): a
        for name, a in arrays.items()
        if name in ("stem.conv1.weight", "stem.conv1.norm.weight")
    }
    (tmp_path / "caffe2.pkl").write_bytes(pickle.dumps({"blobs": caffe2}, 2))
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": {f"module.{k}": t for k, t in state.items()}}, tmp_path / "wrapped.pth")
    torch.save({f"x.{k}": t for k, t in state.items()}, tmp_path / "prefixed.pth")
    model = nn.ModuleDict({"x": resnet()})
    for target, name in (
        (resnet(), "zoo.pkl"),
        (resnet(), "caffe2.pkl"),
        (resnet(), "bare.pth"),
        (resnet(), "wrapped.pth"),
        (model, "prefixed.pth"),
        (model, "bare.pth?matching_heuristics=True"),
    ):
        ours, theirs = copy.deepcopy(target), copy.deepcopy(target)
        DetectionCheckpointer(theirs).load(str(tmp_path / name))
        VoVNetCheckpointer(ours, allow_pickle=True).load(str(tmp_path / name))
        assert not equal(theirs.state_dict(), target.state_dict()), name
        assert equal(ours.state_dict(), theirs.state_dict()), name


def test_missing_heads_of_resnets_are_reported(tmp_path):
    model = nn.ModuleDict({"backbone": resnet(), "head": nn.Linear(2, 2)})
    state = {k: t for k, t in model.state_dict().items() if k != "head.bias"}
    torch.save(state, tmp_path / "a.pth")
    checkpointer = VoVNetCheckpointer(model)
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.missing_outside_backbone == ["head.bias"]


def test_a_pickle_of_a_resnet_needs_the_opt_in(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {}, "__author__": "us"}))
    with pytest.raises(ValueError, match="--allow-pickle"):
        VoVNetCheckpointer(resnet()).load(str(tmp_path / "a.pkl"))


# Where files are


def test_the_error_of_a_missing_file_names_similar_files(tmp_path, monkeypatch):
    (tmp_path / "model_final.pth").touch()
    (tmp_path / "log.txt").touch()
    monkeypatch.chdir(tmp_path)
    load = VoVNetCheckpointer(vovnet()).load
    with pytest.raises(
        FileNotFoundError, match=r"model_last\.pth .* Close to it: 'model_final\.pth'\."
    ):
        load("model_last.pth")
    with pytest.raises(FileNotFoundError, match=r"There is no folder|there is no folder output"):
        load("output/model_final.pth")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["timm:/ese_vovnet39b", "s3://a/b"])
def test_schemes_that_do_not_exist(name):
    with pytest.raises(FileNotFoundError, match=r"is no scheme that is known here: use timm://"):
        VoVNetCheckpointer(vovnet()).load(name)


@pytest.mark.parametrize(
    "link",
    [
        "https://www.dropbox.com/s/0123456789abcde/vovnet39_ese_detectron2.pth?dl=1",
        "https://dl.dropbox.com/s/0123456789abcde/vovnet_27_slim.pth",
    ],
)
def test_dead_links(link):
    with pytest.raises(FileNotFoundError, match=r"are gone .* What lives: timm://ese_vovnet19b"):
        VoVNetCheckpointer(vovnet()).load(link)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Start a file server, and use an empty cache for downloads."""
    (tmp_path / "served").mkdir()
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Handler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads(server):
    folder, url = server
    torch.save(GOOD, folder / "weights.pth")
    model = vovnet()
    VoVNetCheckpointer(model).load(f"{url}/weights.pth")
    assert torch.equal(model.stem.conv1.weight, GOOD["stem.stem_1/conv.weight"])
    (folder / "page.pth").write_text("<!doctype html><html>gone</html>")
    content = (folder / "weights.pth").read_bytes()
    (folder / "weights-0badc0de.pth").write_bytes(content)
    for algorithm in (hashlib.sha256, hashlib.sha1):  # as in torch.hub and pytorchcv
        name = f"weights-{algorithm(content).hexdigest()[:8]}.pth"
        (folder / name).write_bytes(content)
        VoVNetCheckpointer(model).load(f"{url}/{name}")
    before = snapshot(model)
    for name, kind, message in (
        ("page.pth", ValueError, "is an HTML page"),
        ("weights-0badc0de.pth", ValueError, "another checksum than its name says"),
        ("nothing.pth", FileNotFoundError, "could not be downloaded: .*404"),
    ):
        with pytest.raises(kind, match=message):
            VoVNetCheckpointer(model).load(f"{url}/{name}")
    assert equal(snapshot(model), before)
