# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Features of PyTorch give the same results with our networks as with plain networks."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from reference import STRUCTURES, random_state, thin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vovnet_d2 import VoVNet, VoVNetSpec, optimize_for_inference
from vovnet_d2.benchmark.plain import plain
from vovnet_d2.modeling.fusion import fuse_norms
from vovnet_d2.modeling.vovnet import OSABlock

# The stages after the third repeat what it does, so the networks end there.
NET = replace(thin(STRUCTURES["eSE in all"]), blocks_per_stage=(1, 2, 1, 1))
STAGES = ("stem", "stage2", "stage3")
# Tensors by name, so that a message can name a difference.
Found = dict[str, Tensor]


def build(norm: str = "FrozenBN", **args) -> VoVNet:
    model = VoVNet(VoVNetSpec(**vars(NET)), norm=norm, out_features=STAGES, **args)
    model.load_state_dict(random_state(NET), strict=False)
    return model.train()


def last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def fused() -> nn.Module:
    model = build().eval().requires_grad_(False)
    fuse_norms(model)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "FrozenBN": build,
    "FrozenBN, channels-last": lambda: last(build()),
    "BN": lambda: build("BN"),
    "GN": lambda: build("GN"),
    "no norm": lambda: build(""),
    "checkpointed": lambda: build(checkpoint_blocks=True),
    "optimized": lambda: optimize_for_inference(build()),
    "packed": lambda: optimize_for_inference(build()),
}
# The plain networks that they are compared with.
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "FrozenBN": lambda: plain(build()),
    "BN": lambda: plain(build("BN")),
    "GN": lambda: plain(build("GN")),
    "no norm": lambda: plain(build("")),
    "fused": lambda: plain(fused()),
}
SAME_AS = {"checkpointed": "FrozenBN", "FrozenBN, channels-last": "FrozenBN"}
SAME_AS |= {"optimized": "fused", "packed": "fused"}


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, bool], nn.Module]:
    """Return the networks, and the plain networks, by name. Tests only use copies."""
    tables = ((NETWORKS, False), (PLAIN, True))
    return {(name, plain): table[name]() for table, plain in tables for name in table}


def loss(maps: dict[str, Tensor]) -> Tensor:
    return sum(y.double().square().mean() for y in maps.values())


def step(model: nn.Module, x: Tensor) -> Found:
    """Return the gradients of the input and of the parameters by name."""
    x = x.detach().requires_grad_()
    named = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss(model(x)), [x, *named.values()])
    return dict(zip(["image", *named], gradients, strict=True))


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.float()(x.float())
    assert all(y.dtype == torch.bfloat16 for y in maps.values())
    return {name: y.detach() for name, y in maps.items()}


@contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def backward(model, x) -> Found:
    loss(model(x)).backward()
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


def distributed(model, x):
    if not any(p.requires_grad for p in model.parameters()):
        return model(x)  # torch refuses to distribute networks without trainable parameters
    with one_process(), warnings.catch_warnings():
        warnings.filterwarnings("error", "Grad strides do not match")
        parallel = DistributedDataParallel(model)
        return backward(parallel, x)


def sharded(model, x):
    # torch 2.6 can shard on GPUs only.
    on_cpu = hasattr(torch.cpu.Stream, "record_event")
    if not on_cpu or not any(p.requires_grad for p in model.parameters()):
        return model(x)
    with one_process():
        mesh = dist.init_device_mesh("cpu", (1,))
        # torch can only shard contiguous parameters.
        fully_shard(model.to(memory_format=torch.contiguous_format), mesh=mesh)
        return {name: gradient.full_tensor() for name, gradient in backward(model, x).items()}


def compiled(model, x):
    torch._dynamo.reset()
    found = step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    return {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}


def called(model, x):
    return {name: y.detach() for name, y in model(x).items()}


def exported(model, x):
    maps = torch.export.export(model, (x,)).module()(x)
    return {name: y.detach() for name, y in maps.items()}


def checkpointing(model, x):
    return step(Calling(model, lambda x: checkpoint(model, x, use_reentrant=False)), x)


def saved_on_cpu(model, x):
    with torch.autograd.graph.save_on_cpu():
        return step(model, x)


class Calling(nn.Module):
    """Module that calls a function and has the parameters of another module."""

    def __init__(self, model: nn.Module, function: Callable[..., object]):
        super().__init__()
        self.module, self.function = model, function

    def forward(self, x):
        return self.function(x)


WATCHED = ("", "stem.conv1.norm", "stem.conv1.activation", "stage3.1.aggregation", "stage3.1.ese")


def hooks(model, x):
    """Check that features kept by forward hooks are not overwritten, with and without gradients."""
    kept: Found = {}
    for name in WATCHED:
        module = model.get_submodule(name) if name in dict(model.named_modules()) else None
        if module is not None and not isinstance(module, nn.Identity):
            module.register_forward_hook(
                lambda module, args, output, name=name: kept.update(
                    {f"{name}, then": tree_clone(output), name: output}
                )
            )
    gradients = step(model, x)
    with torch.no_grad():
        model(x)
    for name in [name for name in kept if f"{name}, then" in kept and name != "stem.conv1.norm"]:
        before, after = kept[f"{name}, then"], kept[name]
        assert all(map(torch.equal, flat(before), flat(after))), f"{name} was overwritten"
    outputs = {f"{n} {i}": y for n, o in kept.items() for i, y in enumerate(flat(o))}
    return gradients | {n: y.detach() for n, y in outputs.items() if "norm" not in n}


def tree_clone(output):
    return [y.detach().clone() for y in flat(output)]


def flat(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


NORMS_AND_RELU = ("GroupNorm", "ReLU")


def hooks_on_all_modules(model, x):
    """Count the calls of each kind of module with a global hook."""
    if any(hasattr(module, "checkpoint_blocks") for module in model.modules()):
        model.checkpoint_blocks = False  # otherwise modules are called twice
    calls: dict[str, int] = {}

    def count(module, args, output):
        kind = type(module).__name__
        calls[kind] = calls.get(kind, 0) + 1

    handle = register_module_forward_hook(count)
    try:
        gradients = step(model, x)
    finally:
        handle.remove()
    assert calls["ReLU"] > 10
    known = {kind: n for kind, n in calls.items() if "Norm2d" in kind or kind in NORMS_AND_RELU}
    return gradients | {kind: torch.tensor(n) for kind, n in known.items()}


def per_sample_gradients(model, x):
    model.eval()  # statistics of a batch do not belong to one sample
    parameters = dict(model.named_parameters())

    def function(parameters, x):
        return loss(functional_call(model, parameters, (x[None],)))

    return vmap(grad(function), (None, 0))(parameters, x)


def forward_gradient(model, x):
    model.eval()
    primal, tangent = jvp(lambda x: model(x), (x,), (x.flip(0),))
    with forward_ad.dual_level():
        duals = model(forward_ad.make_dual(x, x.flip(0)))
        others = {name: forward_ad.unpack_dual(y).tangent for name, y in duals.items()}
    found = primal | {f"tangent of {name}": y for name, y in tangent.items()}
    found |= {f"tangent of {name} without torch.func": y for name, y in others.items()}
    return {name: y.detach() for name, y in found.items()}


def ensemble(model, x):
    models = [copy.deepcopy(model).eval() for _ in range(2)]
    for parameter in models[1].parameters():
        parameter.data.mul_(1.01)
    parameters, buffers = stack_module_state(models)
    base = models[0]
    return vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)


def part_of_an_ensemble(model, x):
    """Run two networks that differ in one convolution."""
    model.eval()
    name = "stage3.0.layers.1.weight"
    weights = torch.stack([model.get_parameter(name), 2 * model.get_parameter(name)])
    return vmap(lambda weight: functional_call(model, {name: weight}, (x,)))(weights)


def second_derivatives(model, x):
    """Differentiate twice, without eSE, because torch has no second derivative of hard sigmoid."""
    model.eval()
    for module in model.modules():
        if isinstance(module, OSABlock):
            module.ese = None
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(loss(model(x)), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return {"first": first.detach(), "second": second}


def unused_outputs(model, x):
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)["stage2"].square().mean(), x)
    return {"image": gradient}


def traced_by_fx(model, x):
    return step(torch.fx.symbolic_trace(model), x)


def scripted(model, x):
    return step(torch.jit.script(model), x)


def copied(model, x):
    step(model, x)
    return step(copy.deepcopy(model), x)


def pickled(model, x):
    step(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return step(torch.load(file, weights_only=False), x)


def inference_mode(model, x):
    with torch.inference_mode():
        return copy.deepcopy(model).eval()(x.clone())


def changed_in_inference_mode(model, x):
    model.eval()
    with torch.inference_mode():
        twin = copy.deepcopy(model)
        for each in (model, twin):
            each(x)
            for name in ("stem.conv1.weight", "stage3.0.aggregation.weight"):
                each.get_parameter(name).mul_(1.5)
        return model(x) | {f"{name} of a copy": y for name, y in twin(x).items()}


def threads(model, x):
    images = [x * (1 + n) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        model.eval()
        found = list(pool.map(lambda x: step(model, x), images))
    return {f"{n} {name}": y for n, f in enumerate(found) for name, y in f.items()}


def counted_operations(model, x):
    model.eval()
    with FlopCounterMode(display=False) as counter:
        maps = model(x)
    return {"operations": torch.tensor(counter.get_total_flops()), **maps}


def fake_tensors(model, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        maps = model(mode.from_tensor(x))
    return {name: torch.tensor(y.shape) for name, y in maps.items()}


def meta_device(model, x):
    return {n: torch.tensor(y.shape) for n, y in step(model.to("meta"), x.to("meta")).items()}


FEATURES = {
    f.__name__: f
    for f in (
        step,
        autocast,
        distributed,
        sharded,
        compiled,
        exported,
        checkpointing,
        saved_on_cpu,
        hooks,
        hooks_on_all_modules,
        per_sample_gradients,
        forward_gradient,
        ensemble,
        part_of_an_ensemble,
        second_derivatives,
        unused_outputs,
        traced_by_fx,
        scripted,
        copied,
        pickled,
        inference_mode,
        changed_in_inference_mode,
        threads,
        counted_operations,
        fake_tensors,
        meta_device,
    )
}


# These features are compared with a usual step or call of the plain network. Detectron2's
# FrozenBatchNorm2d cannot be traced or scripted, and a second compilation or export takes seconds.
REFERENCES = {"traced_by_fx": step, "scripted": step, "compiled": step, "exported": called}
# These features take seconds for each network.
SLOW = ("compiled", "exported", "scripted")
OF_INFERENCE = (
    "inference_mode",
    "changed_in_inference_mode",
    "counted_operations",
    "fake_tensors",
)
# For these features, each network is the one that was built, because a copy might lose what
# optimize_for_inference keeps outside parameters and buffers. For the others it is a copy.
AS_BUILT = ("step", "changed_in_inference_mode", "counted_operations")
TOLERANCES = {"autocast": 2**-5}


def difference(found: Found, expected: Found, tolerance: float) -> str | None:
    """Return a message on the first tensor that differs by more than ``tolerance`` of its norm."""
    if found.keys() != expected.keys():
        return f"only one of the two has {sorted(found.keys() ^ expected.keys())}"
    for name, tensor in expected.items():
        error, size = (t.double().norm() for t in (found[name] - tensor, tensor))
        if not error <= tolerance * size:
            return f"{name}: off by {error / size:.1e}"
    return None


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, models):
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected: dict[tuple[str, torch.dtype], Found] = {}
    for name in NETWORKS:
        if feature in SLOW and name not in ("FrozenBN", "optimized"):
            continue
        if name == "packed" and feature not in OF_INFERENCE:
            continue
        # Networks that are optimized for inference use oneDNN in float32 only.
        dtype = torch.float32 if name == "packed" else torch.float64
        tolerance = TOLERANCES.get(feature, 1e-4 if name == "packed" else 1e-10)
        ours = NETWORKS[name]() if feature in AS_BUILT else copy.deepcopy(models[name, False])
        ours = ours.to(dtype)
        peer = SAME_AS.get(name, name)
        if (peer, dtype) not in expected:
            theirs = copy.deepcopy(models[peer, True]).to(dtype)
            reference = REFERENCES.get(feature, FEATURES[feature])
            expected[peer, dtype] = reference(theirs, x.to(dtype))
            assert expected[peer, dtype]
        problem = difference(FEATURES[feature](ours, x.to(dtype)), expected[peer, dtype], tolerance)
        assert problem is None, f"{name}: {problem}"
