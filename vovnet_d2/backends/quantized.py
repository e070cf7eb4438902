# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What a quantized file says of itself: the model that it was made from, and its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["check_quantized", "mark_quantized"]

_KEY = "vovnet_d2.model"
"""The entry of an ONNX file's metadata with the key of the float model."""


def mark_quantized(model: Any, key: str) -> None:
    """Write into an ONNX model which float model it was quantized from.

    Args:
        key: what :func:`model_key` returns for the float model.
    """
    model.metadata_props.add(key=_KEY, value=key)


def check_quantized(path: Path, key: str) -> tuple[str, ...]:
    """Check that a quantized file was made from the model that it is to stand for.

    Args:
        key: what :func:`model_key` returns for the model.

    Returns:
        the names of the outputs of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a quantized file of this package, or of another model.
    """
    import onnx

    if not path.is_file():
        raise FileNotFoundError(f"There is no INT8 file {path}.")
    try:
        model = onnx.load(path)
    except Exception as error:  # of protobuf, which has a class of its own for it
        raise ValueError(f"{path} is no ONNX file: tools/export_model.py --int8 writes one.") from (
            error
        )
    found = {entry.key: entry.value for entry in model.metadata_props}.get(_KEY)
    if found is None:
        raise ValueError(
            f"{path} was not written by tools/export_model.py --int8, which is needed."
        )
    if found != key:
        raise ValueError(
            f"{path} was quantized from another model (other weights or another config): run "
            "tools/export_model.py --int8 with these."
        )
    return tuple(output.name for output in model.graph.output)
