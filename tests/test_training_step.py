# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Results and saved tensors of a training step are compared with a plain network."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from devices import DEVICES
from reference import KINDS, STRUCTURES, TABLE, random_state, short, thin
from torch import nn

from vovnet_d2 import VoVNet, VoVNetSpec
from vovnet_d2.benchmark.memory import saved_bytes
from vovnet_d2.benchmark.plain import plain
from vovnet_d2.modeling import tracing, training_step
from vovnet_d2.modeling.convolution import ConvNormAct
from vovnet_d2.modeling.fpn import attach_fpn

STAGES = ("stem", "stage2", "stage3", "stage4", "stage5")
NET = thin(STRUCTURES["eSE in all"])


def build(net=NET, norm="FrozenBN", stages=STAGES, **args) -> VoVNet:
    model = VoVNet(VoVNetSpec(**vars(net)), norm=norm, out_features=stages, **args)
    model.load_state_dict(random_state(net), strict=False)
    return model.train()


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of the parameters in the order of their names."""
    model.zero_grad()
    sum(y.float().square().mean() for y in model(x).values()).backward()
    return [parameter.grad for _, parameter in sorted(model.named_parameters())]


def error(gradients: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Return the relative root mean square error over all parameters."""
    pairs = list(zip(gradients, exact, strict=True))
    difference = sum((g.double() - e).square().sum() for g, e in pairs)
    return (difference / sum(e.square().sum() for _, e in pairs)).sqrt().item()


# Layers


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(4,), (2, 3, 1)], ids=str)
def test_gradients_of_a_convolution_of_several_maps(widths, bias, memory_format):
    conv = ConvNormAct(sum(widths), 4, 1, bias=bias).double().to(memory_format=memory_format)
    maps = [torch.randn(2, width, 3, 2, dtype=torch.float64) for width in widths]
    maps = [x.contiguous(memory_format=memory_format).requires_grad_() for x in maps]

    def function(*inputs):
        weight, bias, *maps = inputs if conv.bias is not None else (inputs[0], None, *inputs[1:])
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (maps,))

    expected = F.conv2d(torch.cat(maps, 1), conv.weight, conv.bias)
    found = conv(maps)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=memory_format)
    inputs = (*conv.parameters(), *maps)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    "args",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "bias": True},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": 1, "padding": "same"},
        {"kernel_size": 1, "groups": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(7, 9), (1, 1)], ids=str)
def test_convolutions_of_several_maps(args, size):
    """Check strides, padding and kernels, a bias before a frozen norm, and maps of one pixel."""
    ours = ConvNormAct(6, 4, norm=FrozenBatchNorm2d(4), activation=nn.ReLU(), **args)
    ours.norm.running_mean.normal_()
    peer = plain(ours)
    maps = [torch.randn(2, width, *size) for width in (2, 3, 1)]
    twins = [[x.clone().requires_grad_() for x in maps] for _ in range(2)]
    outputs = [model(xs) for model, xs in zip((ours, peer), twins, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for found, expected in zip(*twins, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    torch.testing.assert_close(ours.weight.grad, peer.weight.grad)


def test_gradients_that_are_not_requested():
    conv = ConvNormAct(4, 3, 1, bias=False).requires_grad_(False)
    maps = [torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(1, 2, 5, 5)]
    conv(maps).sum().backward()
    assert maps[0].grad.any()
    assert maps[1].grad is conv.weight.grad is None


def constants_computed(model, x, monkeypatch) -> int:
    """Return the number of norms that compute their constants in a step."""
    calls = []
    compute = training_step._compute_constants
    with monkeypatch.context() as patch:
        patch.setattr(
            training_step, "_compute_constants", lambda *a: calls.append(a) or compute(*a)
        )
        step(model, x)
    return len(calls)


def test_constants_of_frozen_norms_are_computed_once(monkeypatch):
    model = build().double()
    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert constants_computed(model, x, monkeypatch) == len(norms)
    assert constants_computed(model, x, monkeypatch) == 0
    norms[3].running_var.mul_(4)
    assert constants_computed(model, x, monkeypatch) == 1
    norms[3].eps *= 2
    assert constants_computed(model, x, monkeypatch) == 1
    assert constants_computed(copy.deepcopy(model), x, monkeypatch) == len(norms)
    model.float().double()
    assert constants_computed(model, x, monkeypatch) == len(norms)
    model.load_state_dict(model.state_dict())
    assert constants_computed(model, x, monkeypatch) == len(norms)
    with torch.inference_mode():
        norms[3].running_var = torch.ones_like(norms[3].running_var)
    for _ in range(2):  # this tensor has no version counter
        assert constants_computed(model, x, monkeypatch) == 1
        assert error(step(model, x), step(plain(model), x)) <= 1e-12
        with torch.inference_mode():
            norms[3].running_var.mul_(2)


def test_constants_of_mixed_precision_are_not_used_in_float32():
    model, unused, x = build(), build(), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        step(model, x)
    assert all(map(torch.equal, step(model, x), step(unused, x)))


def test_errors_in_float32_are_as_small_as_with_separate_norms():
    """Compare one layer. Later a ReLU may pass a value near zero in only one of the networks."""
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


# Networks


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
def test_subclasses_of_norms_and_activations(norm, activation):
    ours = ConvNormAct(3, 4, 3, norm=norm, activation=activation)
    peer = Conv2d(3, 4, 3, norm=norm, activation=activation)
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(ours(x), peer(x))


def test_hooks_see_the_same_as_in_the_plain_network():
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


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_of_every_kind_are_called(kind):
    conv = ConvNormAct(3, 4, 3, norm=FrozenBatchNorm2d(4), activation=nn.ReLU())
    called = set()
    for part in (conv.norm, conv.activation):
        getattr(part, f"register_{kind}_hook")(lambda part, *_: called.add(type(part)))
    conv(torch.randn(2, 3, 9, 9, requires_grad=True)).sum().backward()
    assert called == {FrozenBatchNorm2d, nn.ReLU}


def test_activation_checkpointing_counts_each_batch_once():
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


def test_autocast_caches_no_weight_without_its_gradient():
    conv = ConvNormAct(4, 3, 1)
    maps = [torch.randn(1, 2, 5, 5) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        conv(maps).sum().backward()
        conv(torch.cat(maps, dim=1)).float().square().sum().backward()
    single = ConvNormAct(4, 3, 1)
    single.load_state_dict(conv.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        y = single(torch.cat(maps, dim=1))
        (y.sum() + y.float().square().sum()).backward()
    for name, parameter in conv.named_parameters():
        expected = single.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "recompute"), [("FrozenBN", False), ("BN", True)])
def test_compiled(norm, recompute):
    """Compare a compiled step. Constants of compiled networks are float32 even in float64.

    Three blocks are enough, because torch generates code for each block.
    """
    stages = ("stem", "stage2", "stage3")
    model = build(short(NET), norm, stages, checkpoint_blocks=recompute).double()
    peer = plain(model)
    peer.checkpoint_blocks = False
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True)
    assert error(step(compiled, x), step(peer, x)) <= 1e-7
    for name, buffer in peer.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-6, atol=1e-9)


# Memory


def test_saved_bytes():
    """Compare with sizes by hand. Each storage counts once, and parameters do not count."""
    conv = nn.Conv2d(3, 4, 1)
    x = torch.randn(2, 3, 5, 7)
    assert saved_bytes(conv, x) == 4 * x.numel()
    assert saved_bytes(nn.Sequential(conv, nn.Sigmoid(), nn.Tanh()), x) == 4 * (2 * 3 + 2 * 8) * 35


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_less_memory_is_saved_than_by_the_plain_network(variant, norm):
    model = build(thin(TABLE[variant]), norm)
    x = torch.randn(2, 3, 128, 160)
    reference = saved_bytes(plain(model), x)
    assert saved_bytes(model, x) < reference
    model.checkpoint_blocks = True
    assert saved_bytes(model, x) < 0.35 * reference


def with_fpn(model: nn.Module) -> nn.Module:
    return attach_fpn(model, in_features=STAGES[1:], out_channels=16, top_block=None)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_saved_activations_with_an_fpn(dtype):
    """Check limits with an FPN, which keeps feature maps, too, and weights in bfloat16."""
    model = with_fpn(build(thin(TABLE["V-39-eSE"]))).train()
    x = torch.randn(2, 3, 256, 320)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        assert saved_bytes(model, x) <= 0.75 * saved_bytes(plain(model), x)


@pytest.mark.slow
def test_saved_activations_of_the_full_network():
    model = VoVNet("V-39-eSE", out_features=STAGES[1:]).train()
    x = torch.randn(2, 3, 256, 320)
    reference = saved_bytes(plain(model), x)
    assert saved_bytes(model, x) <= 0.71 * reference
    model.checkpoint_blocks = True
    assert saved_bytes(model, x) <= 0.35 * reference


def test_no_zeros_for_outputs_without_a_gradient():
    x = torch.randn(1, 3, 64, 64)
    counts = []
    for model in (build(norm="BN"), plain(build(norm="BN"))):
        y = model(x)["stage3"].sum()
        with torch.profiler.profile() as profiler:
            y.backward()
        names = [event.name for event in profiler.events()]
        counts.append(sum(name in ("aten::zeros", "aten::zeros_like") for name in names))
    assert counts[0] <= counts[1]


# torch without the private names


def test_without_the_private_names(monkeypatch):
    """Check that only hooks of a module are found, and no modes that observe operators."""
    spec = importlib.util.spec_from_file_location("tracing_of_another_torch", tracing.__file__)
    other = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        for name in ("_len_torch_dispatch_stack", "_are_functorch_transforms_active"):
            patch.delattr(torch._C, name)
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            patch.delattr(nn.modules.module, f"_global_{kind}_hooks")
        patch.delattr(torch.autograd.forward_ad, "_current_level")
        spec.loader.exec_module(other)
        assert not other.is_followed(torch.ones(1))
    relu = nn.ReLU()
    assert not other.has_hooks(relu)
    relu.register_forward_hook(print)
    assert other.has_hooks(relu)
