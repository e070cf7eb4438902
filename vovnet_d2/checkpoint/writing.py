# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Writing a file of weights, with what its tensors alone do not tell."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from .metadata import Metadata
from .reading import METADATA_KEY

__all__ = ["save_weights"]


def save_weights(path: str, tensors: Mapping[str, torch.Tensor], metadata: Metadata) -> None:
    """Write tensors, as ``{"model": tensors, "vovnet_d2": metadata}`` or as safetensors.

    An interrupted run leaves no half-written file: it gets its name when it is complete.

    Args:
        path: ends with .safetensors for that format, or with .pth, .pt or .bin for PyTorch's.

    Raises:
        ValueError: another ending.
        FileNotFoundError: there is no such folder.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(f"{path}: choose a name that ends with .pth, .pt, .bin or .safetensors.")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"There is no folder {Path(path).parent} to write {path} to.")
    partial = f"{path}.partial"
    try:
        if suffix == ".safetensors":
            from safetensors.torch import save_file

            extra = {"format": "pt", METADATA_KEY: json.dumps(metadata.to_dict())}
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial, extra)
        else:
            torch.save({"model": dict(tensors), METADATA_KEY: metadata.to_dict()}, partial)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
