# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights are written to a file, with the facts that tensors alone do not tell."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..atomic import atomic_write
from ..errors import UserFileNotFoundError, UserValueError
from .metadata import Metadata
from .reading import METADATA_KEY


def save_weights(
    path: str, tensors: Mapping[str, torch.Tensor], metadata: Metadata, *, key: str = "model"
) -> None:
    """Write tensors, as ``{"model": tensors, "vovnet_d2": metadata}`` or as safetensors.

    An interrupted run leaves no half-written file: the file gets its name when it is complete.

    Args:
        path: ends with .safetensors for that format, or with .pth, .pt or .bin for PyTorch's.
        key: the key of the tensors in a file of PyTorch's.

    Raises:
        ValueError: the path has another ending.
        FileNotFoundError: there is no such folder.
        FileNotWrittenError: the file cannot be written, for example on a full disk. An earlier file
            of this name stays.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise UserValueError(
            f"{path}: choose a name that ends with .pth, .pt, .bin or .safetensors."
        )
    if not Path(path).parent.is_dir():
        raise UserFileNotFoundError(f"There is no folder {Path(path).parent} to write {path} to.")
    with atomic_write(path, replace=True) as partial, open(partial, "wb") as file:
        if suffix == ".safetensors":
            from safetensors.torch import save

            extra = {"format": "pt", METADATA_KEY: json.dumps(metadata.to_dict())}
            file.write(save({k: t.contiguous() for k, t in tensors.items()}, extra))
        else:
            torch.save({key: dict(tensors), METADATA_KEY: metadata.to_dict()}, file)
