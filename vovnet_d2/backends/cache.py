# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The cache of files for backends, named after the content of the network."""

import hashlib
import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..atomic import FileNotWrittenError, atomic_write
from ..errors import UserValueError
from ..export.dense import DensePart
from ..export.formats import OPSET, export
from ..export.targets import ExportTarget, select_target
from ..made import is_made_here

logger = logging.getLogger(__name__)

CACHE = "VOVNET_D2_CACHE"
"""The environment variable with the folder of the cache."""


def cache_folder() -> Path:
    """Return the folder of the cache, by default ``vovnet_d2`` in the cache folder of the user."""
    if named := os.environ.get(CACHE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vovnet_d2"


def make_folder(folder: Path) -> Path:
    """Make the folder of the cache, and return it. Raise FileNotWrittenError if this fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileNotWrittenError(
            f"The cache folder {folder} cannot be made ({error.strerror}): name another one in the "
            f"environment variable {CACHE}."
        ) from error
    return folder


def export_dense_part(model: Any) -> tuple[Path, tuple[str, ...]]:
    """Export the dense part of a detector to ONNX, or find the file of an earlier export. Return
    the file and the names of its outputs.

    Raises:
        FileNotWrittenError: the file cannot be written.
        ValueError: an operator of the network does not export.
    """
    target = select_target(model, "dense", preprocessing=False)
    packages = [f"{name} {version(name)}" for name in ("torch", "onnx", "onnxscript")]
    digest = digest_of(model_key(model), __version__, str(OPSET), *packages)
    path = cache_folder() / f"dense-{digest}.onnx"
    if not is_made_here(path):  # a file that was changed or cut short is written again
        make_folder(path.parent)
        logger.info("The network is exported to ONNX. This is done once, and takes some seconds.")
        with atomic_write(path) as partial:
            _write(target, Path(partial))
    return path, target.output_names


def _write(target: ExportTarget, path: Path) -> None:
    """Write the dense part of a detector as ONNX. Raise ValueError if an operator cannot be
    exported."""
    try:
        export(target, "onnx", path)
    except ValueError as error:
        reason = str(error).partition(" Other formats to try:")[0].rstrip(".")
        raise UserValueError(f"{reason}: only the backend torch runs this model.") from error


def digest_of(*parts: str) -> str:
    """Return a digest of some texts, 32 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """Return a digest of the content of a file, 32 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def model_key(model: Any) -> str:
    """Return a digest of the dense part of a detector: its modules, their settings and tensors."""
    digest = hashlib.sha256()
    part = DensePart(model)
    for name, module in part.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {_settings(module)}\n".encode())
    for name, tensor in part.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:32]


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the plain attributes of a module, such as strides, in a fixed order.

    Hooks are left out, because their names differ between processes.
    """
    kept = sorted((k, v) for k, v in vars(module).items() if k != "training" and "_hooks" not in k)
    return [(key, text) for key, value in kept for text in _describe(value)]


def _describe(value: Any) -> Iterator[str]:
    """Yield a text for a value if there is one that is the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        yield repr(value)
    elif isinstance(value, list | tuple) and value:
        yield repr([text for each in value for text in _describe(each)])
    elif isinstance(value, dict) and value:
        yield repr([(str(key), text) for key, each in value.items() for text in _describe(each)])
    elif callable(value) and hasattr(value, "__qualname__"):
        yield value.__qualname__


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
