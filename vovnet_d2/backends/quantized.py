# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The notes in a quantized file: the model that it was made from, and its outputs."""

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserFileNotFoundError, UserValueError

_KEY, _SYMMETRIC = "vovnet_d2.model", "vovnet_d2.symmetric"
"""The metadata entries of an ONNX file that hold the key of the float model, and whether the
quantization is symmetric."""


def mark_quantized(model: Any, key: str, *, symmetric: bool = False) -> None:
    """Write the :func:`model_key` of the float model into an ONNX model quantized from it, and
    whether the quantization is symmetric."""
    model.metadata_props.add(key=_KEY, value=key)
    model.metadata_props.add(key=_SYMMETRIC, value=str(symmetric))


class QuantizedFile(NamedTuple):
    """Describes a quantized file.

    Attributes:
        output_names: the names of its outputs.
        symmetric: whether it has the form that TensorRT needs.
    """

    output_names: tuple[str, ...]
    symmetric: bool


def check_quantized(path: Path, key: str) -> QuantizedFile:
    """Check that a quantized file was made from the model with a :func:`model_key`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: this package did not write the file, or it was made from another model.
    """
    import onnx

    if not path.is_file():
        raise UserFileNotFoundError(f"There is no INT8 file {path}.")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf raises a class of its own
        raise UserValueError(
            f"{path} is no ONNX file: tools/export_model.py --int8 writes one."
        ) from error
    notes = {entry.key: entry.value for entry in model.metadata_props}
    if _KEY not in notes:
        raise UserValueError(
            f"{path} was not written by tools/export_model.py --int8: make one with that command."
        )
    if notes[_KEY] != key:
        raise UserValueError(
            f"{path} was quantized from another model (other weights or another config): run "
            "tools/export_model.py --int8 with these."
        )
    names = tuple(output.name for output in model.graph.output)
    return QuantizedFile(names, notes.get(_SYMMETRIC) == "True")
