# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Writing a file of weights, with what its tensors alone do not tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .atomic import atomic_write
from .metadata import Metadata
from .reading import METADATA_KEY

__all__ = ["save_weights"]


def save_weights(
    path: str, tensors: Mapping[str, torch.Tensor], metadata: Metadata, *, key: str = "model"
) -> None:
    """Write tensors, as ``{"model": tensors, "vovnet_d2": metadata}`` or as safetensors.

    An interrupted run leaves no half-written file: it gets its name when it is complete.

    Args:
        path: ends with .safetensors for that format, or with .pth, .pt or .bin for PyTorch's.
        key: what the tensors stand under in PyTorch's.

    Raises:
        ValueError: another ending.
        FileNotFoundError: there is no such folder.
        FileNotWrittenError: the disk is full, say; a file of this name is left as it was.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(f"{path}: choose a name that ends with .pth, .pt, .bin or .safetensors.")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"There is no folder {Path(path).parent} to write {path} to.")
    with atomic_write(path, replace=True) as partial, open(partial, "wb") as file:
        if suffix == ".safetensors":
            from safetensors.torch import save

            extra = {"format": "pt", METADATA_KEY: json.dumps(metadata.to_dict())}
            file.write(save({k: t.contiguous() for k, t in tensors.items()}, extra))
        else:
            torch.save({key: dict(tensors), METADATA_KEY: metadata.to_dict()}, file)
