# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of SOLVER.COMPILE: a compiled backbone makes the same steps as an eager backbone.

In most tests torch traces and differentiates the network and chooses the tensors to save, but it
runs the operators without generated code, because compilation of that code takes minutes.
"""

import copy
import faulthandler
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import FASTER_RCNN, launch, read_log, tiny_config
from fault_runs import assert_equal, load
from test_distillation import write_teacher
from test_engine_trainer import launch_and_interrupt
from torch import nn
from torch._dynamo import lookup_backend

from vovnet_d2 import VoVNet, VoVNetSpec
from vovnet_d2.benchmark.memory import saved_bytes
from vovnet_d2.engine import compilation
from vovnet_d2.engine.compilation import compile_backbone, explain_compilation
from vovnet_d2.engine.pictures import draw_predictions
from vovnet_d2.engine.run_checks import check_run
from vovnet_d2.errors import UserError
from vovnet_d2.modeling.fpn import attach_fpn

pytest_plugins = ["engine_fixtures"]

WITHOUT_CODE = "aot_eager_decomp_partition"
WIDTHS = {"stem_channels": (8,) * 3, "stage_mid_channels": (8,) * 4}
SPEC = VoVNetSpec(
    **WIDTHS, stage_out_channels=(16,) * 4, blocks_per_stage=(1, 1, 1, 1), layers_per_block=1
)
COMPILED = ["SOLVER.COMPILE.ENABLED", "True"]
NO_TEST = ["DATASETS.TEST", "()"]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Compile without generated code.

    Return a list that gets an entry for each compiled graph. The entry is True if the graph is to
    be differentiated.
    """
    graphs: list[bool] = []

    def compile_graph(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(torch.is_grad_enabled())
        return lookup_backend(WITHOUT_CODE)(graph, inputs)

    monkeypatch.setattr(compilation, "_BACKEND", compile_graph)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def build(norm: str = "FrozenBN") -> nn.Module:
    torch.manual_seed(0)
    stages = ("stage2", "stage3")
    bottom_up = VoVNet(SPEC, norm=norm, out_features=stages)
    net = attach_fpn(bottom_up, in_features=stages, out_channels=8, top_block=None)
    return net.double().train()


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the gradients of all parameters as one vector."""
    model.zero_grad()
    sum(y.square().mean() for y in model(x).values()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_gradients_and_statistics_equal_those_of_the_eager_network(norm: str) -> None:
    """Compare with the eager network. Constants of frozen norms are float32 even in float64."""
    eager, x = build(norm), images(64, 96)
    model = copy.deepcopy(eager)
    compile_backbone(model, memory_budget=0.3, dynamic=False)
    exact = step(eager, x)
    error = (step(model, x) - exact).norm() / exact.norm()
    assert error <= (1e-7 if norm == "FrozenBN" else 1e-12)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, msg=name)


@pytest.mark.slow
def test_the_memory_budget_reduces_saved_tensors() -> None:
    x = images(64, 96)
    saved = []
    for budget in (1.0, 0.5, 0.0):
        model = build()
        compile_backbone(model, memory_budget=budget, dynamic=False)
        saved.append(saved_bytes(model, x))
    assert saved[0] > saved[1] > saved[2]
    assert saved[2] < 0.5 * saved_bytes(build(), x)
    assert torch._functorch.config.activation_memory_budget == 1.0  # the setting of the process


@pytest.mark.slow
def test_names_equal_those_of_the_eager_network_and_copies_are_eager(compiled: list[bool]) -> None:
    """Check names and modules, and that a copy, such as averaged weights, runs eagerly."""
    eager, x = build(), images(32, 64)
    model = copy.deepcopy(eager)
    compile_backbone(model, dynamic=False)
    step(model, x)
    assert len(compiled) == 1
    assert list(model.state_dict()) == list(eager.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in eager.named_modules()]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(step(twin, x), step(eager, x), rtol=0, atol=0)
    assert len(compiled) == 1


@pytest.mark.slow
def test_other_sizes_need_no_new_compilation(compiled: list[bool]) -> None:
    eager = build()
    model = copy.deepcopy(eager)
    compile_backbone(model)
    for size in ((64, 96), (96, 64), (64, 64), (128, 160)):
        exact = step(eager, images(*size))
        assert (step(model, images(*size)) - exact).norm() <= 1e-7 * exact.norm()
    assert len(compiled) == 1


def compare_generated_code() -> tuple[float, bool]:
    """Return the relative error of compiled gradients, and whether less is saved for them.

    The network is in float32, as in a training. With ATEN_CPU_CAPABILITY=avx2 on a CPU with
    AVX-512, torch 2.15 generates wrong code in float64 under a memory budget.
    """
    faulthandler.enable()
    eager, x = build().float(), images(64, 96).float()
    model = copy.deepcopy(eager)
    compile_backbone(model, memory_budget=0.5, dynamic=False)
    exact = step(eager, x)
    error = (step(model, x) - exact).norm() / exact.norm()
    return float(error), saved_bytes(model, x) < saved_bytes(eager, x)


@pytest.mark.slow
def test_generated_code() -> None:
    """Use torch's own backend, which generates code.

    The code is compiled and run in a separate process, so that other tests have no influence, and
    a crash of the code only ends this test.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        error, saves_less = pool.submit(compare_generated_code).result()
    assert error <= 1e-5
    assert saves_less


@pytest.mark.slow
def test_a_training_resumes_to_the_bit_with_an_average_and_a_teacher(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[bool]
) -> None:
    """Resume a compiled training. Its checkpoints have the usual names. Evaluations are eager."""
    teacher = write_teacher(tmp_path / "t", FASTER_RCNN)
    options = ["SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.EMA", "0.5"]
    options += ["DISTILLATION.TEACHER", teacher[0], "DISTILLATION.WEIGHTS", teacher[1]]
    options += ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "1"]
    options += ["TEST.EVAL_PERIOD", "2", "INPUT.FIXED_SIZE", "64"]
    launch(FASTER_RCNN, tmp_path / "eager", *options)
    assert compiled == []
    launch(FASTER_RCNN, tmp_path / "whole", *options, *COMPILED)
    assert compiled
    assert all(compiled)
    launch_and_interrupt(monkeypatch, 2, tmp_path / "parts", *options, *COMPILED)
    launch(FASTER_RCNN, tmp_path / "parts", "--resume", *options, *COMPILED)
    eager, whole, parts = (
        load(tmp_path / name / "model_final.pth") for name in ("eager", "whole", "parts")
    )
    assert_equal(parts, whole)
    assert list(whole["model"]) == list(eager["model"])
    compiled.clear()
    weights = ["MODEL.WEIGHTS", str(tmp_path / "whole" / "model_final_ema.pth")]
    found = launch(FASTER_RCNN, tmp_path / "test", "--eval-only", *COMPILED, *weights)
    assert found.keys() == {"bbox"}
    assert compiled == []


class Doubling(nn.Module):
    """Network of its own class, because torch 2.6 does not compile classes of torch.nn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class NoCompilerError(RuntimeError):
    """Stand-in for an error of torch, whose name depends on the version."""


NoCompilerError.__module__ = "torch._inductor.exc"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let compilation fail as on a machine without a compiler."""

    def fail(*_: Any) -> Any:
        raise NoCompilerError("No working C++ compiler found.\nMore lines.")

    monkeypatch.setattr(compilation, "_BACKEND", fail)
    return r"backbone \(SOLVER.COMPILE.*: No working C\+\+ compiler found\. On a CPU .* g\+\+"


def test_a_machine_without_a_compiler_gives_one_sentence(
    no_compiler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Check the short sentence, and that the log has the whole message."""
    model = Doubling()
    compile_backbone(model)
    cfg = tiny_config(FASTER_RCNN, tmp_path, *COMPILED)
    with pytest.raises(UserError, match=no_compiler), explain_compilation(cfg):
        model(torch.ones(1, 2))
    assert "More lines." in caplog.text


# Messages of torch 2.6 to 2.15 and of Triton about a missing compiler.
MISSING = [
    "No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
    "Compiler: g++ is not found.",
    "Cannot find a working triton installation. Either the package is not installed or ...",
    "Found Tesla P100 which is too old to be supported by the triton GPU compiler, which ...",
    "Failed to find C compiler. Please specify via CC environment variable or set ...",
    "An exception occurred in a subprocess:\nRuntimeError: Failed to find C compiler. Please",
]


@pytest.mark.parametrize("text", MISSING)
def test_a_missing_compiler_is_explained(text: str, tmp_path: Path) -> None:
    told = re.escape(text.splitlines()[-1].rstrip("."))
    for options, kind in ((COMPILED, UserError), ([], RuntimeError)):
        cfg = tiny_config(FASTER_RCNN, tmp_path, *options)
        with pytest.raises(kind, match=told) as caught, explain_compilation(cfg):
            raise RuntimeError(text)
        assert (type(caught.value) is RuntimeError) == (kind is RuntimeError)


@pytest.mark.parametrize("text", ["out of resource: shared memory", "C++ compile error"])
def test_bugs_keep_their_tracebacks(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise NoCompilerError(text)

    monkeypatch.setattr(compilation, "_BACKEND", fail)
    model = Doubling()
    compile_backbone(model)
    cfg = tiny_config(FASTER_RCNN, tmp_path, *COMPILED)
    with pytest.raises(Exception, match=re.escape(text)) as caught, explain_compilation(cfg):
        model(torch.ones(1, 2))
    assert not isinstance(caught.value, UserError)


@pytest.mark.slow
def test_a_training_says_that_a_machine_cannot_compile(
    coco: Path, tmp_path: Path, no_compiler: str
) -> None:
    with pytest.raises(UserError, match=no_compiler):
        launch(FASTER_RCNN, tmp_path, *COMPILED, *NO_TEST)
    log = read_log(tmp_path)
    assert "torch.compile has failed" in log
    assert "Traceback" not in log


class Blind(nn.Module):
    """Detector with a backbone of one layer, which finds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Doubling()

    def forward(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.backbone(torch.ones(1, 1))
        return [{} for _ in records]


def test_pictures_of_predictions_compile_nothing(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the backbone is compiled only once, for the training steps."""
    compiled: list[bool] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(compilation, "_BACKEND", count)
    model = Blind()
    compile_backbone(model)
    model.train()([{}])
    assert compiled == [True]
    assert draw_predictions(tiny_config(FASTER_RCNN, tmp_path, *COMPILED), model)
    assert compiled == [True]


@pytest.mark.slow
def test_checkpointed_blocks_in_several_processes_are_one_graph(
    alone: None, compiled: list[bool]
) -> None:
    """Check the number of graphs with and without activation checkpointing.

    DistributedDataParallel makes torch split a graph into one part per bucket. torch 2.6 cannot
    split a graph with activation checkpointing.
    """
    from torch._dynamo import config

    assert config.optimize_ddp is True
    spec = replace(SPEC, stage_mid_channels=(160,) * 4, stage_out_channels=(160,) * 4)  # 3 MB
    graphs = []
    for checkpointed in (False, True):
        model = VoVNet(spec, norm="GN", out_features=["stage5"], checkpoint_blocks=checkpointed)
        compile_backbone(model.train(), dynamic=False)
        several = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
        for _ in range(2):  # the second step uses the graphs of the first step
            several(torch.rand(1, 3, 32, 32))["stage5"].mean().backward()
            assert config.optimize_ddp is True
        graphs.append(len(compiled))
        compiled.clear()
        torch._dynamo.reset()
    assert graphs[0] > 1
    assert graphs[1] == 1


def test_without_private_names_of_torch_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Linear(1, 1)
    compilation._compile_as_one_graph(plain)
    assert plain._compiled_call_impl is None
    model = copy.deepcopy(plain)
    compile_backbone(model)
    call = model._compiled_call_impl
    monkeypatch.setattr(torch._dynamo, "config", object())
    compilation._compile_as_one_graph(model)
    assert model._compiled_call_impl is call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MEMORY_BUDGET", "1.5", "ENABLED", "True"], "MEMORY_BUDGET is 1.5: give a share"),
        (["MEMORY_BUDGET", "-0.1", "ENABLED", "True"], "MEMORY_BUDGET is -0.1: give a share"),
        (["MEMORY_BUDGET", "0.5"], "set SOLVER.COMPILE.ENABLED True"),
    ],
)
def test_invalid_memory_budgets(options: list[str], message: str, tmp_path: Path) -> None:
    words = [w if i % 2 else f"SOLVER.COMPILE.{w}" for i, w in enumerate(options)]
    cfg = tiny_config(FASTER_RCNN, tmp_path, *words)
    with pytest.raises(ValueError, match=message):
        check_run(cfg, training=True)
    check_run(cfg, training=False)


@pytest.mark.parametrize("budget", ["0.0", "0.5", "1.0"])
def test_valid_memory_budgets(budget: str, tmp_path: Path) -> None:
    words = ["SOLVER.COMPILE.MEMORY_BUDGET", budget, "SOLVER.COMPILE.ENABLED", "True"]
    check_run(tiny_config(FASTER_RCNN, tmp_path, *words), training=True)
