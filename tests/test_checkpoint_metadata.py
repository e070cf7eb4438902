# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import logging
import re
from dataclasses import replace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling.meta_arch import GeneralizedRCNN
from reference import STRUCTURES, TABLE, thin
from state_dicts import random_state
from torch import nn

from vovnet_d2 import VOVNET_SPECS, VoVNet, VoVNetCheckpointer, VoVNetSpec, convert_state_dict
from vovnet_d2.checkpoint import InputConvention, check_input_convention
from vovnet_d2.checkpoint.metadata import BGR_255, BGR_IMAGENET, RGB_IMAGENET, Metadata

NET = thin(STRUCTURES["eSE in last"])


def config(convention: InputConvention):
    """Return Detectron2's config with the three lines of an input convention."""
    cfg = get_cfg()
    for line in convention.config_lines():
        key, value = line.split(": ")
        cfg.merge_from_list([key, value])
    return cfg


def test_detectron2s_default_is_the_convention_of_published_weights():
    assert InputConvention.of_config(get_cfg()) == BGR_255


def test_the_usual_normalisation():
    assert RGB_IMAGENET.pixel_mean == pytest.approx([255 * v for v in (0.485, 0.456, 0.406)])
    assert BGR_IMAGENET.pixel_mean == RGB_IMAGENET.pixel_mean[::-1]
    assert BGR_IMAGENET.pixel_std == RGB_IMAGENET.pixel_std[::-1]
    assert RGB_IMAGENET.pixel_std == pytest.approx([255 * v for v in (0.229, 0.224, 0.225)])


CONVENTIONS = {
    "published": BGR_255,
    "DD3D": BGR_IMAGENET,
    "RGB, unscaled": InputConvention("RGB", RGB_IMAGENET.pixel_mean, (1, 1, 1)),
    "timm": RGB_IMAGENET,
    "timm, 0.5": InputConvention("RGB", (127.5,) * 3, (127.5,) * 3),
    "folded": InputConvention("BGR", (0, 0, 0), (1, 1, 1)),
    "grey": InputConvention("", (127.5,), (57.0,)),
}


@pytest.mark.parametrize("weights", CONVENTIONS)
@pytest.mark.parametrize("given", CONVENTIONS)
def test_a_config_that_disagrees_with_the_weights_is_a_warning(weights, given):
    expected, actual = CONVENTIONS[weights], CONVENTIONS[given]
    cfg = config(actual) if actual.format else get_cfg()
    if not actual.format:
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "L", [127.5], [57.0]
    warning = check_input_convention(cfg, expected)
    assert (warning is None) == (weights == given)
    if warning:
        assert all(line in warning for line in expected.config_lines())
        assert [re.match(r"[\w.]+", line)[0] for line in expected.config_lines()] == [
            "INPUT.FORMAT",
            "MODEL.PIXEL_MEAN",
            "MODEL.PIXEL_STD",
        ]


def test_an_unknown_convention_is_no_warning():
    assert check_input_convention(get_cfg(), None) is None


def test_rounding_is_no_difference():
    cfg = config(InputConvention("RGB", (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)))
    assert check_input_convention(cfg, RGB_IMAGENET) is None
    # A change of 2 % of the deviation is a difference, in the deviation and in the mean.
    mean, std = RGB_IMAGENET.pixel_mean, RGB_IMAGENET.pixel_std
    for other in (
        replace(RGB_IMAGENET, pixel_std=(std[0] * 1.02, *std[1:])),
        replace(RGB_IMAGENET, pixel_mean=(mean[0] + 0.02 * std[0], *mean[1:])),
    ):
        assert check_input_convention(config(other), RGB_IMAGENET) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("YUV", (0,) * 3, (1,) * 3), "Input format 'YUV': choose BGR or RGB"),
        (("BGR", (0,) * 3, (1,)), "one of each is needed"),
        (("BGR", (0,), (0,)), "no deviation is 0"),
    ],
)
def test_invalid_conventions(arguments, message):
    with pytest.raises(ValueError, match=message):
        InputConvention(*arguments)


# In files


class Detector(GeneralizedRCNN):
    """Detectron2's detector, with an empty region proposal network and empty heads."""

    def __init__(self, backbone: nn.Module, convention: InputConvention):
        super().__init__(
            backbone=backbone,
            proposal_generator=nn.Identity(),
            roi_heads=nn.Identity(),
            pixel_mean=convention.pixel_mean,
            pixel_std=convention.pixel_std,
            input_format=convention.format,
        )


def vovnet(**changes) -> VoVNet:
    return VoVNet(VoVNetSpec(**{**vars(NET), **changes}))


@pytest.mark.parametrize("convention", [c for c in CONVENTIONS.values() if c.format], ids=str)
def test_a_training_records_its_input_convention(tmp_path, convention):
    VoVNetCheckpointer(Detector(vovnet(), convention), str(tmp_path)).save("a")
    checkpointer = VoVNetCheckpointer(vovnet())
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.input_convention == convention


def test_a_backbone_alone_has_no_input_convention(tmp_path):
    VoVNetCheckpointer(vovnet(), str(tmp_path)).save("a")
    checkpointer = VoVNetCheckpointer(vovnet())
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.input_convention is None


@pytest.mark.parametrize(
    ("layout", "prefix", "classes", "expected"),
    [
        ("detectron2", "", None, BGR_255),
        ("detectron2", "backbone.bottom_up.", None, BGR_255),
        ("detectron2", "", 10, None),  # v1 classification weights
        ("detectron2", "img_backbone.", None, None),
        ("timm", "", 10, RGB_IMAGENET),
        ("native", "", None, None),
    ],
)
def test_input_conventions_of_layouts(tmp_path, layout, prefix, classes, expected):
    state = convert_state_dict(random_state(NET, num_classes=classes), layout)
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "a.pth")
    checkpointer = VoVNetCheckpointer(vovnet())
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.input_convention == expected


@pytest.mark.parametrize(
    ("prefix", "others", "expected"),
    [
        ("", [], (BGR_255, BGR_IMAGENET)),
        ("backbone.bottom_up.", ["backbone.fpn_lateral2.weight"], (BGR_255, BGR_IMAGENET)),
        ("backbone.bottom_up.", ["roi_heads.box_head.fc1.weight"], BGR_255),
        ("backbone.bottom_up.", ["fcos2d_head.cls_logits.weight"], BGR_IMAGENET),
        ("img_backbone.", ["module.fcos3d_head.box3d_quat.0.weight"], BGR_IMAGENET),
    ],
)
def test_dd3ds_weights(tmp_path, monkeypatch, caplog, prefix, others, expected):
    """Recognise weights of DD3D by their heads. The backbone equals the published V-99-eSE."""
    net = thin(TABLE["V-99-eSE"], 32)
    spec = VoVNetSpec(**vars(net))
    monkeypatch.setitem(VOVNET_SPECS, "V-99-eSE", spec)
    state = {prefix + name: tensor for name, tensor in random_state(net).items()}
    torch.save(state | {name: torch.ones(1) for name in others}, tmp_path / "a.pth")
    checkpointer = VoVNetCheckpointer(VoVNet(spec))
    with caplog.at_level(logging.INFO, logger="vovnet_d2"):
        checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.input_convention == expected
    candidates = expected if isinstance(expected, tuple) else (expected,)
    for convention in CONVENTIONS.values():
        if convention.format:
            warning = check_input_convention(config(convention), expected)
            assert (warning is None) == (convention in candidates)
            lines = [line for candidate in candidates for line in candidate.config_lines()]
            assert warning is None or all(line in warning for line in lines)
        assert convention not in candidates or convention.config_lines()[2] in caplog.text
    assert "does not tell its" not in caplog.text


def test_metadata_survive_writing_and_reading():
    for stem in ("strided", "pooled"):
        for residual in (True, False):
            for convention in (None, *CONVENTIONS.values()):
                spec = VoVNetSpec(**{**vars(NET), "stem": stem, "residual": residual})
                metadata = Metadata.of_spec(spec, convention, "here")
                assert Metadata.from_dict(metadata.to_dict()) == metadata
                assert Metadata.from_dict(metadata.to_dict()).source == "here"


@pytest.mark.parametrize(
    "damaged",
    [None, [], {"stem": 3}, {"residual": "no"}, {"input": {"format": "RGB"}}, {"input": [1]}],
    ids=str,
)
def test_damaged_metadata(damaged):
    with pytest.raises(ValueError, match="entry 'vovnet_d2' is not what it should be"):
        Metadata.from_dict(damaged)
