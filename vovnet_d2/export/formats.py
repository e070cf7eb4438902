# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The file formats: how each is written and run, and the operators in its graph."""

import importlib.util
import logging
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from ..errors import UserImportError, UserValueError
from .targets import BackboneTarget, DetectorTarget, ExportTarget

logger = logging.getLogger(__name__)

OPSET = 20
"""The newest opset of ONNX that both exporters of torch write; deformable convolution needs 19."""

_TAKES_ONE_PIXEL = hasattr(symbolic_shapes, "backed_size_oblivious")

MIN_SIZE = 32 if _TAKES_ONE_PIXEL else 64
"""The least height and width of the images that an exported network takes.

VoVNet takes 32 pixels, whose last feature map has one. torch 2.6 exports no such feature map.
"""

Program = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class ExportedFile:
    """Describes a file that was exported.

    Attributes:
        exporter: the exporter of torch that wrote it.
        operators: number of nodes by their names, in the graph and its subgraphs, without
            constants.
        opset: the opset of an ONNX file.
    """

    path: Path
    exporter: str
    operators: Counter[str]
    opset: int | None = None


@dataclass(frozen=True)
class Format:
    """Describes a format: how files of it are written and read.

    Attributes:
        write: exports a target to a path.
        read: loads the file, to run on a device.
        packages: the packages that it needs, except torch.
        detectors: True if it takes whole detectors.
    """

    suffix: str
    write: Callable[[ExportTarget, Path], ExportedFile]
    read: Callable[[Path, torch.device], Program]
    packages: tuple[str, ...] = ()
    detectors: bool = False


def export(target: ExportTarget, format: str, path: Path) -> ExportedFile:
    """Write a target to a file.

    Args:
        format: a key of :data:`FORMATS`.

    Raises:
        ValueError: the format is unknown, or does not take this target.
        ModuleNotFoundError: the format needs a package that is not installed.
    """
    check_format(format, type(target))
    try:
        with warnings.catch_warnings(), torch.no_grad(), _sizes_of_any_parity():
            # The comparison with eager mode at other sizes shows mistakes of a trace.
            warnings.simplefilter("ignore")
            return FORMATS[format].write(target, path)
    except RuntimeError as error:
        others = [name for name in formats_for(type(target)) if name != format]
        reason = str(error).strip().partition("\n")[0]
        raise UserValueError(
            f"This model cannot be exported as {format} ({reason}). Other formats to try: "
            f"{', '.join(others)}."
        ) from error


def load(format: str, path: Path, device: torch.device | str = "cpu") -> Program:
    """Load a file of :func:`export` as a function from tensors to a tuple of tensors."""
    return FORMATS[format].read(path, torch.device(device))


def formats_for(target: type[ExportTarget]) -> list[str]:
    return [
        name
        for name, format in FORMATS.items()
        if format.detectors or not issubclass(target, DetectorTarget)
    ]


def check_format(format: str, target: type[ExportTarget]) -> None:
    """Check that a format takes a target and that its packages are there; see :func:`export`."""
    if format not in FORMATS:
        raise UserValueError(f"Unknown format {format!r}: choose from {', '.join(FORMATS)}.")
    choices = formats_for(target)
    if format not in choices:
        raise UserValueError(
            f"{format} does not take a whole detector, because torch.export cannot follow a "
            f"varying number of boxes: choose from {', '.join(choices)}, or export the part "
            "backbone or fpn."
        )
    missing = [name for name in FORMATS[format].packages if not importlib.util.find_spec(name)]
    if missing:
        raise UserImportError(
            f"Exporting as {format} needs {', '.join(missing)}: pip install 'vovnet_d2[export]'."
        )


# torch.export ------------------------------------------------------------------------------------


def _sizes_of_any_parity() -> AbstractContextManager[Any]:
    """Let torch up to 2.11 export a pooling layer for odd and even sizes, as newer versions do.

    Its function for the size of the result looks at the remainder of a division. So the exported
    program would take only odd or only even sizes.
    """
    try:
        from torch import _meta_registrations
    except ImportError:  # private in torch
        return nullcontext()
    if not hasattr(_meta_registrations, "div_rtn"):
        return nullcontext()
    return mock.patch.object(_meta_registrations, "div_rtn", operator.floordiv)


def _dynamic_shapes(target: BackboneTarget) -> dict[str, dict[int, Any]] | None:
    if target.shape:
        return None
    height, width = (Dim(name, min=-(-MIN_SIZE // target.divisor)) for name in ("height", "width"))
    if target.divisor > 1:
        height, width = target.divisor * height, target.divisor * width
    return {"images": {0: Dim("batch", min=1), 2: height, 3: width}}


def _export_program(target: ExportTarget) -> ExportedProgram:
    assert isinstance(target, BackboneTarget)
    # Without this setting, torch excludes feature maps of one pixel.
    settings = {"backed_size_oblivious": True} if _TAKES_ONE_PIXEL else {}
    with symbolic_shapes.patch(settings):  # type: ignore[attr-defined]
        return torch.export.export(
            target.module, target.example, dynamic_shapes=_dynamic_shapes(target)
        )


def _operators_of_program(program: ExportedProgram) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def _write_program(target: ExportTarget, path: Path) -> ExportedFile:
    program = _export_program(target)
    torch.export.save(program, path)
    return ExportedFile(path, "torch.export", _operators_of_program(program))


def _read_program(path: Path, device: torch.device) -> Program:
    return torch.export.load(path).module()


def _write_compiled(target: ExportTarget, path: Path) -> ExportedFile:
    from torch._inductor import aoti_compile_and_package

    program = _export_program(target)
    aoti_compile_and_package(program, package_path=str(path))
    return ExportedFile(path, "AOTInductor", _operators_of_program(program))


def _read_compiled(path: Path, device: torch.device) -> Program:
    from torch._inductor import aoti_load_package

    compiled = aoti_load_package(str(path))
    return lambda *inputs: tuple(compiled(*inputs))


# TorchScript -------------------------------------------------------------------------------------


def _write_torchscript(target: ExportTarget, path: Path) -> ExportedFile:
    traced = torch.jit.trace(target.module, target.example, check_trace=False)
    torch.jit.save(traced, path)
    operators = Counter(
        node.kind()
        for node in _nodes_of_script(traced.inlined_graph)
        if node.kind() not in ("prim::Constant", "prim::GetAttr")
    )
    return ExportedFile(path, "torch.jit.trace", operators)


def _nodes_of_script(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes_of_script(inner)


def _read_torchscript(path: Path, device: torch.device) -> Program:
    return torch.jit.load(path, map_location=device).eval()


# ONNX --------------------------------------------------------------------------------------------


def _write_onnx(target: ExportTarget, path: Path) -> ExportedFile:
    import onnx

    options: dict[str, Any] = {
        "input_names": target.input_names,
        "output_names": target.output_names,
        "opset_version": OPSET,
        "external_data": False,
    }
    if isinstance(target, BackboneTarget):
        exporter = "torch.onnx (dynamo)"
        torch.onnx.export(
            _export_program(target),
            target.example,
            path,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(target),
            verbose=False,
            **options,
        )
    else:
        exporter = "torch.onnx (TorchScript)"
        torch.onnx.export(
            target.module,
            target.example,
            path,
            dynamo=False,
            dynamic_axes={"image": {1: "image_height", 2: "image_width"}},
            **options,
        )
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    operators = Counter(
        f"{node.domain}::{node.op_type}".removeprefix("::")
        for node in _nodes_of_onnx(model.graph.node)
        if node.op_type != "Constant"
    )
    (opset,) = (o.version for o in model.opset_import if o.domain == "")
    return ExportedFile(path, exporter, operators, opset)


def _nodes_of_onnx(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes_of_onnx(graph.node)


def load_onnxruntime(
    path: Path | bytes, device: torch.device, providers: Sequence[tuple[str, dict[str, Any]]] = ()
) -> Program:
    """Load an ONNX file into ONNX Runtime, which computes with as many threads as torch.

    Args:
        path: the file, or its content.
        providers: execution providers with their options. They are tried first, then CUDA on a GPU,
            then the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    wanted: list[Any] = list(providers)
    if device.type == "cuda":
        wanted.append("CUDAExecutionProvider")
    available = onnxruntime.get_available_providers()
    chosen = [p for p in wanted if (p if isinstance(p, str) else p[0]) in available]
    session = onnxruntime.InferenceSession(path, options, [*chosen, "CPUExecutionProvider"])
    if device.type == "cuda" and session.get_providers()[0] == "CPUExecutionProvider":
        logger.warning(
            "ONNX Runtime computes on the CPU, not on %s: onnxruntime-gpu with its CUDA libraries "
            "has the CUDAExecutionProvider, which is missing or fails here.",
            device,
        )
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feed = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(y) for y in session.run(None, feed))

    return run


FORMATS = {
    "onnx": Format(
        ".onnx",
        _write_onnx,
        load_onnxruntime,
        packages=("onnx", "onnxscript", "onnxruntime"),
        detectors=True,
    ),
    "torchscript": Format(".ts", _write_torchscript, _read_torchscript, detectors=True),
    "torch_export": Format(".pt2", _write_program, _read_program),
    "aotinductor": Format(".aoti.pt2", _write_compiled, _read_compiled),
}
"""The formats by name. OpenVINO and TensorRT read the ONNX file."""
