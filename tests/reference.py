# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Second implementation of VoVNet, for the tests to compare with. It follows the papers and the
names of the published weights. It consists of plain functions over a dict of tensors, and shares no
code with the package."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Net:
    stage_mid_channels: tuple[int, ...]
    stage_out_channels: tuple[int, ...]
    blocks_per_stage: tuple[int, ...]
    layers_per_block: int
    ese: str = "none"
    depthwise: bool = False
    stem_channels: tuple[int, ...] = (64, 64, 128)
    stem: str = "strided"
    residual: bool = True
    bottleneck: bool = False


_SLIM, _LARGE = (64, 80, 96, 112), (128, 160, 192, 224)
_LARGE_OUT = (256, 512, 768, 1024)
_DEPTHWISE = {"depthwise": True, "stem_channels": (64, 64, 64)}

TABLE = {
    "V-27-slim": Net(_SLIM, (128, 256, 384, 512), (1, 1, 1, 1), 5),
    "V-39": Net(_LARGE, _LARGE_OUT, (1, 1, 2, 2), 5),
    "V-57": Net(_LARGE, _LARGE_OUT, (1, 1, 4, 3), 5),
    "V-75": Net(_LARGE, _LARGE_OUT, (1, 2, 6, 3), 5),
    "V-93": Net(_LARGE, _LARGE_OUT, (1, 3, 8, 3), 5),
    "V-99": Net(_LARGE, _LARGE_OUT, (1, 3, 9, 3), 5),
    "V-19-slim-dw-eSE": Net(_SLIM, (112, 256, 384, 512), (1, 1, 1, 1), 3, "all", **_DEPTHWISE),
    "V-19-dw-eSE": Net(_LARGE, _LARGE_OUT, (1, 1, 1, 1), 3, "all", **_DEPTHWISE),
    "V-19-slim-eSE": Net(_SLIM, (112, 256, 384, 512), (1, 1, 1, 1), 3, "all"),
    "V-19-eSE": Net(_LARGE, _LARGE_OUT, (1, 1, 1, 1), 3, "all"),
    "V-39-eSE": Net(_LARGE, _LARGE_OUT, (1, 1, 2, 2), 5, "all"),
    "V-57-eSE": Net(_LARGE, _LARGE_OUT, (1, 1, 4, 3), 5, "all"),
    "V-99-eSE": Net(_LARGE, _LARGE_OUT, (1, 3, 9, 3), 5, "all"),
}

# Together they cover full and depthwise convolutions, with and without reduction, one and several
# blocks in a stage, and the options that no published model has.
_DEEP = replace(TABLE["V-19-slim-eSE"], blocks_per_stage=(2, 1, 3, 1), layers_per_block=2)
STRUCTURES = {
    "full": replace(_DEEP, ese="none"),
    "pooled stem": replace(_DEEP, stem="pooled"),
    "no residual": replace(_DEEP, residual=False, ese="none"),
    "eSE in all": _DEEP,
    "eSE in last": replace(_DEEP, ese="last"),
    "eSE, no residual": replace(_DEEP, residual=False),
    "depthwise": replace(_DEEP, **_DEPTHWISE),
    "depthwise, pooled stem": replace(_DEEP, stem="pooled", **_DEPTHWISE),
    "bottleneck": replace(_DEEP, bottleneck=True, ese="none"),
    "bottleneck, pooled stem": replace(_DEEP, bottleneck=True, stem="pooled", ese="last"),
}


def _kind(net: Net) -> tuple[object, ...]:
    reduced = net.depthwise and net.stem_channels[-1] != net.stage_mid_channels[0]
    repeated = max(net.blocks_per_stage) > 1
    return net.ese, net.depthwise, reduced, repeated, net.layers_per_block


# The first variant of each kind. Other variants of a kind have the same parts with other widths or
# numbers of repeats, so a test of these parts need not run on them.
KINDS = list({_kind(net): name for name, net in reversed(TABLE.items())}.values())[::-1]


def thin(net, divisor: int = 8):
    """Return a ``Net`` or a ``VoVNetSpec`` with the same structure and much smaller widths."""
    widths = ("stage_mid_channels", "stage_out_channels", "stem_channels")
    return replace(net, **{w: tuple(c // divisor for c in getattr(net, w)) for w in widths})


def short(net):
    """Return the same structure with one stage of two blocks, and with chains of one layer.

    It is for tests that do the same with every layer and take long for each.
    """
    return replace(net, blocks_per_stage=(1, 2, 1, 1), layers_per_block=1)


def tensors(
    net: Net, *, in_channels: int = 3, num_classes: int | None = None, counted: bool = False
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the published name, the native name and the shape of every tensor.

    The bottleneck variant was never published. Both names of its layers are native.

    Args:
        counted: True if the norms have ``num_batches_tracked``.
    """

    def norm(published: str, native: str, channels: int):
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            yield f"{published}.{tensor}", f"{native}.{tensor}", (channels,)
        if counted:
            yield f"{published}.num_batches_tracked", f"{native}.num_batches_tracked", ()

    def full(published: str, native: str, c_in: int, c_out: int, size: int):
        yield f"{published}/conv.weight", f"{native}.weight", (c_out, c_in, size, size)
        yield from norm(f"{published}/norm", f"{native}.norm", c_out)

    def layer(published: str, native: str, c_in: int, c_out: int):
        if net.depthwise:
            yield f"{published}/dw_conv3x3.weight", f"{native}.depthwise.weight", (c_in, 1, 3, 3)
            pointwise = f"{native}.pointwise"
            yield f"{published}/pw_conv1x1.weight", f"{pointwise}.weight", (c_out, c_in, 1, 1)
            yield from norm(f"{published}/pw_norm", f"{pointwise}.norm", c_out)
        else:
            yield from full(published, native, c_in, c_out, 3)

    def bottleneck(native: str, c_in: int, c_out: int):
        half = c_out // 2
        for name, shape in (("reduce", (half, c_in, 1, 1)), ("conv", (c_out, half, 3, 3))):
            yield f"{native}.{name}.weight", f"{native}.{name}.weight", shape
            yield from norm(f"{native}.{name}.norm", f"{native}.{name}.norm", shape[0])

    first, second, third = net.stem_channels
    yield from full("stem.stem_1", "stem.conv1", in_channels, first, 3)
    yield from layer("stem.stem_2", "stem.conv2", first, second)
    yield from layer("stem.stem_3", "stem.conv3", second, third)
    c_in = third
    for s in (2, 3, 4, 5):
        mid, out = net.stage_mid_channels[s - 2], net.stage_out_channels[s - 2]
        blocks = net.blocks_per_stage[s - 2]
        for b in range(1, blocks + 1):
            osa = f"OSA{s}_{b}"
            published, native = f"stage{s}.{osa}", f"stage{s}.{b - 1}"
            width = c_in
            if net.depthwise and c_in != mid:
                name = f"{published}.conv_reduction.{osa}_reduction_0"
                yield from full(name, f"{native}.reduction", c_in, mid, 1)
                width = mid
            for i in range(net.layers_per_block):
                if net.bottleneck:
                    yield from bottleneck(f"{native}.layers.{i}", width, mid)
                else:
                    name = f"{published}.layers.{i}.{osa}_{i}"
                    yield from layer(name, f"{native}.layers.{i}", width, mid)
                width = mid
            joined = c_in + net.layers_per_block * mid
            name = f"{published}.concat.{osa}_concat"
            yield from full(name, f"{native}.aggregation", joined, out, 1)
            if net.ese == "all" or (net.ese == "last" and b == blocks):
                yield f"{published}.ese.fc.weight", f"{native}.ese.fc.weight", (out, out, 1, 1)
                yield f"{published}.ese.fc.bias", f"{native}.ese.fc.bias", (out,)
            c_in = out
    if num_classes is not None:
        yield "classifier.weight", "linear.weight", (num_classes, c_in)
        yield "classifier.bias", "linear.bias", (num_classes,)


def parameter_count(net: Net, num_classes: int | None = None) -> int:
    return sum(
        prod(shape)
        for name, _, shape in tensors(net, num_classes=num_classes)
        if "running_" not in name
    )


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return a random tensor in float64, like one of a trained network.

    Norms are away from the identity, and feature maps neither vanish nor grow.
    """
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    args = {"generator": generator, "dtype": torch.float64}
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        return 0.5 + torch.rand(shape, **args)
    if len(shape) == 1:
        return 0.2 * torch.randn(shape, **args)
    return torch.randn(shape, **args) * (2 / prod(shape[1:])) ** 0.5


def random_state(net: Net, **options) -> dict[str, Tensor]:
    """Return random tensors under their published names."""
    if sum(net.stage_out_channels) > 500:  # large tensors are not kept
        return _make_random_state(net, **options)
    return {name: tensor.clone() for name, tensor in _keep_random_state(net, **options).items()}


def _make_random_state(net: Net, **options) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        published: random_tensor(published, shape, generator)
        for published, _, shape in tensors(net, **options)
    }


_keep_random_state = lru_cache(maxsize=32)(_make_random_state)


def native_names(net: Net, **options) -> dict[str, str]:
    """Return the native name of each published name."""
    return {published: native for published, native, _ in tensors(net, **options)}


def features(
    net: Net, state: dict[str, Tensor], x: Tensor, *, stage5_dilation: int = 1
) -> dict[str, Tensor]:
    """Return the feature maps of a network in inference.

    ``state`` holds the tensors of the network under their published names.
    """

    def norm_relu(x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (
            state[f"{name}.{tensor}"][:, None, None]
            for tensor in ("weight", "bias", "running_mean", "running_var")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).relu()

    def full(x: Tensor, name: str, **conv) -> Tensor:
        return norm_relu(F.conv2d(x, state[f"{name}/conv.weight"], **conv), f"{name}/norm")

    def layer(x: Tensor, name: str, **conv) -> Tensor:
        if not net.depthwise:
            return full(x, name, **conv)
        x = F.conv2d(x, state[f"{name}/dw_conv3x3.weight"], groups=x.shape[1], **conv)
        x = F.conv2d(x, state[f"{name}/pw_conv1x1.weight"])
        return norm_relu(x, f"{name}/pw_norm")

    def bottleneck(x: Tensor, name: str, **conv) -> Tensor:
        x = F.conv2d(x, state[f"{name}.reduce.weight"])
        x = norm_relu(x, f"{name}.reduce.norm")
        x = F.conv2d(x, state[f"{name}.conv.weight"], **conv)
        return norm_relu(x, f"{name}.conv.norm")

    def block(x: Tensor, s: int, b: int) -> Tensor:
        osa, dilation = f"OSA{s}_{b}", stage5_dilation if s == 5 else 1
        conv = {"padding": dilation, "dilation": dilation}
        collected, y = [x], x
        if net.depthwise and x.shape[1] != net.stage_mid_channels[s - 2]:
            y = full(x, f"stage{s}.{osa}.conv_reduction.{osa}_reduction_0")
        for i in range(net.layers_per_block):
            if net.bottleneck:
                y = bottleneck(y, f"stage{s}.{b - 1}.layers.{i}", **conv)
            else:
                y = layer(y, f"stage{s}.{osa}.layers.{i}.{osa}_{i}", **conv)
            collected.append(y)
        y = full(torch.cat(collected, 1), f"stage{s}.{osa}.concat.{osa}_concat")
        if net.ese == "all" or (net.ese == "last" and b == net.blocks_per_stage[s - 2]):
            weight, bias = (state[f"stage{s}.{osa}.ese.fc.{t}"] for t in ("weight", "bias"))
            attention = F.conv2d(F.adaptive_avg_pool2d(y, 1), weight, bias)
            y = y * (F.relu6(attention + 3) / 6)
        return x + y if net.residual and b > 1 else y

    x = full(x, "stem.stem_1", stride=2, padding=1)
    x = layer(x, "stem.stem_2", padding=1)
    x = layer(x, "stem.stem_3", stride=2 if net.stem == "strided" else 1, padding=1)
    outputs = {"stem": x}
    for s in (2, 3, 4, 5):
        pooled = net.stem == "pooled" if s == 2 else s < 5 or stage5_dilation == 1
        if pooled:
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for b in range(1, net.blocks_per_stage[s - 2] + 1):
            x = block(x, s, b)
        outputs[f"stage{s}"] = x
    if "classifier.weight" in state:
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        outputs["linear"] = F.linear(x, state["classifier.weight"], state["classifier.bias"])
    return outputs


def assert_same_maps(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9
) -> None:
    """Check that names, shapes and values are equal.

    Values may differ by ``tolerance`` times the largest value of a feature map.
    """
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert tensor.abs().max() > 0.01, (
            f"{name} is almost zero, so the comparison would say nothing"
        )
        error = (actual[name] - tensor).abs().max() / tensor.abs().max()
        assert error <= tolerance, f"{name}: relative difference {error:.1e}"
