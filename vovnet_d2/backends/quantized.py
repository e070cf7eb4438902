# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The notes in a quantized file: the model that it was made from, and its outputs."""

from pathlib import Path
from typing import Any

from ..errors import UserFileNotFoundError, UserValueError

_KEY, _SYMMETRIC = "vovnet_d2.model", "vovnet_d2.symmetric"
"""The metadata entries of an ONNX file that hold the key of the float model, and whether the
quantization is symmetric."""


def mark_quantized(model: Any, key: str, *, symmetric: bool = False) -> None:
    """Write the :func:`model_key` of the float model into an ONNX model quantized from it, and
    whether the quantization is symmetric."""
    model.metadata_props.add(key=_KEY, value=key)
    model.metadata_props.add(key=_SYMMETRIC, value=str(symmetric))


def check_symmetric(path: Path) -> None:
    """Check that a quantized file is symmetric, as TensorRT needs it. Raise ValueError if not."""
    import onnx

    if _metadata(onnx.load(path)).get(_SYMMETRIC) != "True":
        raise UserValueError(
            f"{path} was not quantized for TensorRT: run tools/export_model.py --int8 with "
            "--for-tensorrt."
        )


def _metadata(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def check_quantized(path: Path, key: str) -> tuple[str, ...]:
    """Check that a quantized file was made from the model with a :func:`model_key`, and return the
    names of its outputs.

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
    found = _metadata(model).get(_KEY)
    if found is None:
        raise UserValueError(
            f"{path} was not written by tools/export_model.py --int8: make one with that command."
        )
    if found != key:
        raise UserValueError(
            f"{path} was quantized from another model (other weights or another config): run "
            "tools/export_model.py --int8 with these."
        )
    return tuple(output.name for output in model.graph.output)
