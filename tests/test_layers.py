# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import ast
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torchvision.ops import deform_conv2d

from vovnet_d2.modeling.layers import (
    NORMS,
    DeformableConv2d,
    DepthwiseSeparableConv2d,
    EffectiveSE,
    bottleneck,
    conv_norm_act,
    max_pool,
)


def test_max_pool_equals_ceil_mode_pooling():
    for height in range(2, 20):
        for width in range(2, 20):
            x = torch.randn(1, 2, height, width).relu()
            expected = F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
            assert torch.equal(max_pool(x), expected), (height, width)


def test_max_pool_gives_the_gradient_of_ceil_mode_pooling():
    x = torch.rand(2, 3, 10, 13, dtype=torch.float64)  # all values differ, so maxima are unique
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.rand(2, 3, 5, 6)
    (max_pool(x) * weight).sum().backward()
    (F.max_pool2d(y, 3, 2, ceil_mode=True) * weight).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_names_of_norms_equal_those_of_detectron2():
    tree = ast.parse(textwrap.dedent(inspect.getsource(get_norm)))
    (table,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    assert set(NORMS) == {"", *(key.value for key in table.keys)}


@pytest.mark.parametrize("norm", NORMS)
def test_conv_norm_act(norm):
    layer = conv_norm_act(3, 32, 3, norm=norm, stride=2).train()
    expected = get_norm(norm, 32)
    assert type(layer.norm) is type(expected)
    assert (layer.bias is None) == (norm != "")
    x = torch.randn(2, 3, 9, 12)
    y = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1)
    assert torch.equal(layer(x), (y if expected is None else expected.train()(y)).relu())


@pytest.mark.parametrize(
    ("channels", "groups"), [(32, 32), (48, 16), (64, 32), (80, 16), (112, 16), (7, 1)]
)
def test_group_norm_of_any_width(channels, groups):
    norm = conv_norm_act(3, channels, 1, norm="GN").norm
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


def test_norm_by_callable():
    layer = conv_norm_act(3, 6, 1, norm=lambda channels: nn.InstanceNorm2d(channels, affine=True))
    assert isinstance(layer.norm, nn.InstanceNorm2d)
    assert layer.norm.num_features == 6
    assert layer.bias is None


@pytest.mark.parametrize("norm", ["bn", "FrozenBatchNorm", "IN"])
def test_unknown_norm(norm):
    with pytest.raises(ValueError, match=f"norm '{norm}': choose from '', 'BN', .* a callable"):
        conv_norm_act(3, 8, 3, norm=norm)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (
            lambda **args: DepthwiseSeparableConv2d(6, 10, norm="", **args),
            lambda m, x, **conv: F.conv2d(
                F.conv2d(x, m["depthwise.weight"], groups=6, **conv),
                m["pointwise.weight"],
                m["pointwise.bias"],
            ).relu(),
        ),
        (
            lambda **args: bottleneck(6, 10, norm="", **args),
            lambda m, x, **conv: F.conv2d(
                F.conv2d(x, m["reduce.weight"], m["reduce.bias"]).relu(),
                m["conv.weight"],
                m["conv.bias"],
                **conv,
            ).relu(),
        ),
    ],
    ids=["depthwise", "bottleneck"],
)
def test_pairs_of_convolutions(layer, expected, stride, dilation):
    module = layer(stride=stride, dilation=dilation)
    x = torch.randn(2, 6, 9, 12)
    y = expected(module.state_dict(), x, stride=stride, padding=dilation, dilation=dilation)
    assert y.shape[1] == 10
    torch.testing.assert_close(module(x), y)


def test_new_depthwise_convolutions_keep_the_variance():
    conv = DepthwiseSeparableConv2d(64, 8, norm="BN").depthwise
    images = torch.randn(16, 64, 9, 9)
    assert conv(images)[:, :, 1:-1, 1:-1].var().item() == pytest.approx(1, rel=0.2)


def test_bottleneck_is_half_the_output_wide():
    assert bottleneck(6, 10, norm="BN").reduce.out_channels == 5


def test_effective_se():
    module = EffectiveSE(4)
    x = torch.randn(2, 4, 5, 7) + torch.tensor([-40.0, -1, 1, 40])[:, None, None]
    with torch.no_grad():
        module.fc.weight.copy_(torch.eye(4)[:, :, None, None])
        module.fc.bias.copy_(torch.tensor([0.0, 0.25, 0.5, 0.0]))
    means = x.sum((2, 3)) / 35 + module.fc.bias
    scale = ((means + 3) / 6).clamp(0, 1)
    assert scale[0, 0] == 0  # the values reach both ends of the hard sigmoid
    assert scale[0, 3] == 1
    torch.testing.assert_close(module(x), x * scale[:, :, None, None])


def test_effective_se_does_not_change_its_arguments():
    module = EffectiveSE(4)
    x, residual = torch.randn(2, 1, 4, 5, 7)
    before = x.clone(), residual.clone()
    with torch.no_grad():
        y = module(x, residual)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    torch.testing.assert_close(y, module(x) + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_effective_se_of_large_feature_maps(dtype: torch.dtype, training: bool) -> None:
    """Use a feature map whose sum exceeds float16."""
    module = EffectiveSE(2)
    x = torch.rand(1, 2, 300, 400) * 3
    with torch.no_grad():
        module.fc.weight.copy_(torch.eye(2)[:, :, None, None])
    average = x.double().mean((2, 3))
    expected = x.double() * ((average + 3) / 6)[:, :, None, None]
    module.to(dtype).requires_grad_(training)
    y = module(x.to(dtype).contiguous(memory_format=torch.channels_last))
    # Five values are rounded: the input, the sum, the average, the gate and the product.
    rtol = 5 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1e-6)


def _deformable(**args) -> DeformableConv2d:
    """Make a layer with random offsets of a few pixels, so that some taps lie outside the input."""
    layer = DeformableConv2d(4, 6, kernel_size=3, **{"padding": 1, **args}).double()
    for parameter in layer.offset.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def _split(layer: DeformableConv2d, x: torch.Tensor):
    """Return the predicted offsets, and the predicted masks or None."""
    y = layer.offset(x)
    taps = 9 * y.shape[1] // (27 if layer.modulated else 18)
    assert y.shape[1] == taps * (3 if layer.modulated else 2)
    return y[:, : 2 * taps], y[:, 2 * taps :].sigmoid() if layer.modulated else None


def _deform_by_grid_sample(layer: DeformableConv2d, x: torch.Tensor) -> torch.Tensor:
    """Compute a deformable convolution from its definition, with ``grid_sample`` for each tap."""
    offset, mask = _split(layer, x)
    (size, _, rows, columns), (height, width) = offset.shape, x.shape[2:]
    groups = offset.shape[1] // 18
    offset = offset.reshape(size, groups, 9, 2, rows, columns)
    taps = []
    for group, channels in enumerate(x.chunk(groups, dim=1)):
        for tap in range(9):
            places = []
            for axis, (length, number) in enumerate(((rows, tap // 3), (columns, tap % 3))):
                place = torch.arange(length, dtype=x.dtype) * layer.stride[axis]
                place = place - layer.padding[axis] + number * layer.dilation[axis]
                shape = (-1, 1) if axis == 0 else (1, -1)
                places.append(place.reshape(shape) + offset[:, group, tap, axis])
            y, x_ = places[0] * 2 / (height - 1) - 1, places[1] * 2 / (width - 1) - 1
            sample = F.grid_sample(channels, torch.stack((x_, y), -1), align_corners=True)
            if mask is not None:
                sample = sample * mask[:, group * 9 + tap, None]
            taps.append(sample)
    taps = torch.stack(taps, 1).reshape(size, groups, 9, -1, rows, columns)
    weight = layer.weight.reshape(6, groups, -1, 9)
    return torch.einsum("ngkchw,ogck->nohw", taps, weight) + layer.bias[:, None, None]


DCN_CASES = {
    "plain": {},
    "modulated": {"modulated": True},
    "two groups": {"deformable_groups": 2},
    "modulated, four groups": {"modulated": True, "deformable_groups": 4},
    "stride": {"stride": 2, "modulated": True},
    "dilation": {"padding": 2, "dilation": 2, "deformable_groups": 2},
}


@pytest.mark.parametrize("args", DCN_CASES.values(), ids=DCN_CASES)
def test_deformable_convolution(args):
    layer = _deformable(**args)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    offset, mask = _split(layer, x)
    conv = {name: args.get(name, 1) for name in ("stride", "padding", "dilation")}
    peer = deform_conv2d(x, offset, layer.weight, layer.bias, mask=mask, **conv)
    slow = _deform_by_grid_sample(layer, x)
    actual = layer(x)
    cotangent = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, inputs, cotangent)
    for expected in (peer, slow):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        expected_gradients = torch.autograd.grad(expected, inputs, cotangent)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("modulated", "factor"), [(False, 1.0), (True, 0.5)])
def test_new_deformable_convolutions_equal_plain_ones(modulated, factor, groups):
    layer = conv_norm_act(
        4,
        6,
        3,
        norm="",
        dilation=2,
        conv_class=DeformableConv2d,
        modulated=modulated,
        deformable_groups=groups,
    )
    x = torch.randn(2, 4, 9, 11)
    expected = factor * F.conv2d(x, layer.weight, padding=2, dilation=2)
    torch.testing.assert_close(layer(x), expected.relu())


def test_deformable_convolution_follows_the_contract_of_conv2d():
    norm = nn.BatchNorm2d(6).eval()
    nn.init.normal_(norm.weight)
    args = {"kernel_size": 3, "padding": 1, "bias": False, "norm": norm}
    plain, deformable = Conv2d(4, 6, **args), DeformableConv2d(4, 6, **args)
    deformable.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 4, 9, 11)
    torch.testing.assert_close(deformable(x), plain(x))
    assert deformable(x).min() < 0  # there is no activation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deformable_convolution_in_mixed_precision(dtype):
    layer = _deformable(modulated=True).float()
    x = torch.randn(2, 4, 7, 9)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("groups", [0, 3, -1])
def test_deformable_groups_that_do_not_divide(groups):
    message = f"deformable_groups is {groups}: it must divide the layer's 4 input channels"
    with pytest.raises(ValueError, match=message):
        DeformableConv2d(4, 6, kernel_size=3, deformable_groups=groups)
