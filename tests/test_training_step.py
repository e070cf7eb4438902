# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What training computes and what it keeps, against the network as commonly written."""

import copy
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from devices import DEVICES
from reference import KINDS, STRUCTURES, TABLE, random_state, thin
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vovnet_d2 import VoVNet, VoVNetSpec
from vovnet_d2.analysis.saved_memory import saved_bytes
from vovnet_d2.benchmark.plain import plain
from vovnet_d2.modeling.convolution import ConvNormAct, Geometry, convolve
from vovnet_d2.modeling.layers import EffectiveSE, downsample

STAGES = ("stem", "stage2", "stage3", "stage4", "stage5")
NET = thin(STRUCTURES["eSE in all"])


def build(net=NET, norm="FrozenBN", **args) -> VoVNet:
    model = VoVNet(VoVNetSpec(**vars(net)), norm=norm, out_features=STAGES, **args)
    model.load_state_dict(random_state(net), strict=False)
    return model.train()


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the parameters, in the order of their names."""
    model.zero_grad()
    sum(y.float().square().mean() for y in model(x).values()).backward()
    return [parameter.grad for _, parameter in sorted(model.named_parameters())]


def error(gradients: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Root mean square over all parameters, relative."""
    pairs = list(zip(gradients, exact, strict=True))
    difference = sum((g.double() - e).square().sum() for g, e in pairs)
    return (difference / sum(e.square().sum() for _, e in pairs)).sqrt().item()


# The pieces


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


GEOMETRIES = {
    "plain": ((1, 1), (1, 1), (1, 1), 1),
    "strided": ((2, 2), (1, 1), (1, 1), 1),
    "dilated": ((1, 1), (2, 2), (2, 2), 1),
    "in groups": ((1, 1), (1, 1), (1, 1), 2),
}
# The larger of the weight and the map takes no scaling: of 7x9 pixels, of 1x1.
SIZES = ((7, 9), (1, 1))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_of_a_convolution(geometry):
    """As autograd's of the operators one after the other."""
    geometry = Geometry(*GEOMETRIES[geometry])
    for widths, scaled, size, relu in product(
        ((4,), (2, 3, 1)), (False, True), SIZES, (False, True)
    ):
        maps = [tensor(2, width, *size) for width in widths]
        weight = tensor(4, sum(widths) // geometry.groups, 3, 3)
        bias = tensor(4).requires_grad_(not scaled)
        scale = tensor(4).detach() if scaled else None
        x = F.conv2d(torch.cat(maps, 1), weight, None, *geometry)
        expected = (x if scale is None else x * scale[:, None, None]) + bias[:, None, None]
        expected = expected.relu() if relu else expected
        found = convolve(maps, weight, scale, bias, geometry, relu=relu)
        torch.testing.assert_close(found, expected)
        inputs = [x for x in (weight, bias, *maps) if x.requires_grad]
        direction = torch.randn_like(found)
        gradients = [torch.autograd.grad(y, inputs, direction) for y in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_gradients_that_are_not_asked_for():
    maps = [tensor(1, 2, 5, 5), tensor(1, 2, 5, 5).detach()]
    weight = tensor(3, 4, 3, 3).requires_grad_(False)
    y = convolve(maps, weight, None, None, Geometry(*GEOMETRIES["plain"]), relu=True)
    y.sum().backward()
    assert maps[0].grad.any()
    assert maps[1].grad is weight.grad is None


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_of_squeeze_excitation(residual):
    module = EffectiveSE(4).double()
    offset = torch.tensor([-40.0, -1, 1, 40])[:, None, None]  # both ends of the hard sigmoid
    inputs = (tensor(2, 4, 5, 3), *((tensor(2, 4, 5, 3),) if residual else ()))

    def function(weight, bias, x, *residual):
        parameters = {"fc.weight": weight, "fc.bias": bias}
        return torch.func.functional_call(module, parameters, (x + offset, *residual))

    assert torch.autograd.gradcheck(function, (*module.parameters(), *inputs))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_pooling(memory_format):
    x = tensor(2, 3, 9, 12).detach().contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(downsample, (x,))


def test_fp32_is_as_exact_as_separate_norms():
    """Of one layer: further on, a value near zero may pass a ReLU in one and not in the other."""
    for pixels in (32, 4):
        model = build(NET).stage4[0].layers[1]
        peer = plain(model)
        exact = copy.deepcopy(peer).double()
        x = torch.randn(2, model.in_channels, pixels, pixels)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        inputs.append(x.double().requires_grad_())
        outputs = [m(i) for m, i in zip((model, peer, exact), inputs, strict=True)]
        results = []
        for m, i, y in zip((model, peer, exact), inputs, outputs, strict=True):
            y.square().mean().backward()
            results.append([[y.detach()], [i.grad], [m.weight.grad]])
        for ours, theirs, truth in zip(*results, strict=True):
            assert error(ours, truth) <= 2 * error(theirs, truth)


# The network


@pytest.mark.parametrize(
    ("structure", "norm", "recompute"),
    [
        *((structure, "FrozenBN", False) for structure in STRUCTURES),
        *((structure, "BN", True) for structure in STRUCTURES),
        *(("eSE in all", norm, recompute) for norm in ("GN", "") for recompute in (False, True)),
        ("eSE in all", "FrozenBN", True),
        ("eSE in all", "BN", False),
    ],
)
def test_gradients_equal_the_plain_network(structure, norm, recompute):
    model = build(thin(STRUCTURES[structure]), norm, checkpoint_blocks=recompute).double()
    peer = plain(model)
    peer.checkpoint_blocks = False
    x = torch.randn(2, 3, 65, 96, dtype=torch.float64)
    exact = step(peer, x)
    last = torch.channels_last
    assert error(step(model, x), exact) <= 1e-12
    assert error(step(model.to(memory_format=last), x.to(memory_format=last)), exact) <= 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_gradients_on_a_gpu(norm, recompute):
    model = build(norm=norm, checkpoint_blocks=recompute).double()
    peer = plain(model)
    peer.checkpoint_blocks = False
    x = torch.randn(2, 3, 65, 96, dtype=torch.float64)
    exact = step(peer, x)
    found = step(model.cuda(), x.cuda())
    assert error([gradient.cpu() for gradient in found], exact) <= 1e-12


class DoublingNorm(FrozenBatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Ceiling(nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(max=1)


@pytest.mark.parametrize(
    "norm",
    [FrozenBatchNorm2d(4), DoublingNorm(4), nn.Identity()],
    ids=["frozen", "doubling", "none"],
)
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), Ceiling(), nn.SiLU(), F.relu, None],
    ids=["ReLU", "Ceiling", "SiLU", "function", "none"],
)
def test_norms_and_activations_that_do_more(norm, activation):
    ours = ConvNormAct(3, 4, 3, norm=norm, activation=activation)
    peer = Conv2d(3, 4, 3, norm=norm, activation=activation)
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(ours(x), peer(x))


def test_hooks_see_what_they_see_in_the_plain_network():
    ours = ConvNormAct(3, 4, 3, norm=FrozenBatchNorm2d(4), activation=nn.ReLU())
    peer = plain(ours)
    x = torch.randn(2, 3, 9, 9)
    seen = []
    for model in (ours, peer):
        for part in (model.norm, model.activation):
            part.register_forward_hook(lambda part, args, output: seen.append(output.clone()))
        model(x).sum().backward()
    assert len(seen) == 4
    for found, expected in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(found, expected)


def test_recomputation_counts_each_batch_once():
    model = build(norm="BN", checkpoint_blocks=True)
    peer = plain(model)
    peer.checkpoint_blocks = False
    x = torch.randn(2, 3, 64, 64)
    step(model, x)
    step(peer, x)
    expected = dict(peer.named_buffers())
    assert expected["stage3.0.aggregation.norm.num_batches_tracked"] == 1
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[name], msg=name)
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_mixed_precision(device, dtype, recompute):
    model = build(checkpoint_blocks=recompute).to(device)
    peer = plain(model)
    x = torch.randn(2, 3, 64, 64, device=device)
    exact = step(copy.deepcopy(peer).double(), x.double())
    with torch.autocast(device, dtype=dtype):
        assert model(x)["stage5"].dtype == dtype
        gradients, theirs = step(model, x), step(peer, x)
    assert all(g.dtype == torch.float32 for g in gradients)
    assert error(gradients, exact) <= 1.5 * error(theirs, exact)


def test_distributed():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = build().double()
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        exact = step(plain(model), x)
        assert error(step(DistributedDataParallel(model), x), exact) <= 1e-12
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "recompute"), [("FrozenBN", False), ("BN", True)])
def test_compiled(norm, recompute):
    """In float64, where a compiled network's constants are float32 still."""
    model = build(norm=norm, checkpoint_blocks=recompute).double()
    peer = plain(model)
    peer.checkpoint_blocks = False
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True)
    assert error(step(compiled, x), step(peer, x)) <= 1e-7
    for name, buffer in peer.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-6, atol=1e-9)


# Memory


def test_saved_bytes():
    """Of known pieces: each storage once, parameters not at all."""
    conv = nn.Conv2d(3, 4, 1)
    x = torch.randn(2, 3, 5, 7)
    assert saved_bytes(conv, x) == 4 * x.numel()
    assert saved_bytes(nn.Sequential(conv, nn.Sigmoid(), nn.Tanh()), x) == 4 * (2 * 3 + 2 * 8) * 35


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_less_is_saved_than_by_the_plain_network(variant, norm):
    model = build(thin(TABLE[variant]), norm)
    x = torch.randn(2, 3, 128, 160)
    reference = saved_bytes(plain(model), x)
    assert saved_bytes(model, x) < reference
    model.checkpoint_blocks = True
    assert saved_bytes(model, x) < 0.35 * reference


@pytest.mark.slow
def test_saved_activations_of_the_full_network():
    model = VoVNet("V-39-eSE", out_features=STAGES[1:]).train()
    x = torch.randn(2, 3, 256, 320)
    reference = saved_bytes(plain(model), x)
    assert saved_bytes(model, x) <= 0.65 * reference
    model.checkpoint_blocks = True
    assert saved_bytes(model, x) <= 0.35 * reference
