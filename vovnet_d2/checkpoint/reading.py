# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of weights are read without running code that they contain.

The first bytes of a file tell its kind. The name does not: often a .pth is a saved HTML page.
"""

import argparse
import io
import json
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import UserValueError
from .zipped import find_weights, unpacked

logger = logging.getLogger(__name__)

METADATA_KEY = "vovnet_d2"
"""The entry of our own files that says what the keys cannot; see
:mod:`vovnet_d2.checkpoint.metadata`.
"""

# Under which key the tensors are, in order of preference: Detectron2, mmcv and Lightning, PyTorch's
# tutorials, pycls, BasicSR and Paddle, others; then averaged weights.
_WRAPPERS = (
    *("model", "state_dict", "model_state_dict", "model_state", "params", "net", "module"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_state", "ema", "params_ema"),
)

# What Detectron2's trainer and hooks put beside the tensors: plain values, which weights_only
# admits, and NumPy's scalars; in timm's training checkpoints, the arguments.
_numpy_scalar = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    _numpy_scalar,
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
    argparse.Namespace,
]

_DAMAGED = "is damaged or truncated: download or copy it again."
_HTML = re.compile(rb"\s*(<!doctype\s+html|<html|<head|<\?xml)", re.IGNORECASE)
# Protocols 0 and 1 have no mark: a dict, a list, or an imported name, by their first opcodes.
_OLD_PICKLE = re.compile(rb"\([dl]p\d|[}\]]q|c[\w.]+\n[\w.]+\n")
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]+")
_SENTENCES = {
    "empty": "is empty: download it again.",
    "html": "is an HTML page, not weights: the link that it was saved from is dead or asks for a "
    "log-in. Delete it and take the file from elsewhere.",
    "lfs": "is a Git LFS pointer, not the weights themselves: run `git lfs pull` where it lies.",
    "archive": "is a compressed archive: unpack it and give the file of weights inside.",
    "text": "is a text file, not weights (.pth, .bin, .safetensors).",
}


def read_checkpoint(path: str, *, allow_pickle: bool = False, entry: str = "") -> dict[str, Any]:
    """Read a .pth, .bin, .pt, .safetensors or Detectron2 model-zoo .pkl file to the CPU.

    Only tensors and plain values are read, and no file can run code.

    Args:
        path: a local file, or a zip archive that holds one such file (.pth.zip).
        allow_pickle: also read Python pickles of NumPy arrays, as Detectron2's model zoo has them.
            Only arrays are taken from them.
        entry: the key of the weights in a file that holds several. By default the usual keys are
            tried in order, and those of averaged weights come last.

    Returns:
        the content of the file, with the tensors by name under ``"model"`` and all other entries
            (``"optimizer"``, ``"iteration"``, ...) under their own names.

    Raises:
        ValueError: the file is damaged, is no checkpoint, or would run code. The message says
            which.
    """
    if (inner := find_weights(path)) is not None:
        file = io.BytesIO(b"".join(unpacked(path, inner)))
        return _with_model(_read(file, path, allow_pickle), path, entry)
    with open(path, "rb") as whole:
        return _with_model(_read(whole, path, allow_pickle), path, entry)


def _read(file: IO[bytes], path: str, allow_pickle: bool) -> Any:
    head = file.read(512)
    file.seek(0)
    kind = _kind(head)
    if kind in _SENTENCES:
        raise UserValueError(f"{path} {_SENTENCES[kind]}")
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind == "zip" or _is_legacy_torch(head):
        return _read_torch(file, path, is_zip=kind == "zip")
    if kind == "pickle":
        return _read_array_pickle(file, path, allow_pickle)
    raise UserValueError(
        f"{path} is no known file of weights (PyTorch, safetensors, or Detectron2's model zoo), "
        "or its beginning is damaged."
    )


def looks_like_html(path: str) -> bool:
    """Return True if a file is a web page that a server gave instead of a file."""
    with open(path, "rb") as file:
        return _kind(file.read(512)) == "html"


def _kind(head: bytes) -> str:
    if not head:
        return "empty"
    if _HTML.match(head):
        return "html"
    if head.startswith(b"version https://git-lfs"):
        return "lfs"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        return "archive"
    if head[5:9] == b"\x00\x00\x00{":  # the head's size in 8 bytes, then JSON
        return "safetensors"
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= pickle.HIGHEST_PROTOCOL:
        return "pickle"
    if _OLD_PICKLE.match(head):
        return "pickle"
    return "text" if _TEXT.fullmatch(head) else "unknown"


def _is_legacy_torch(head: bytes) -> bool:
    """Return True if a pickle begins with the number by which ``torch.save`` before 1.6 marked its
    files.
    """
    return head[2:14] == b"\x8a\n" + torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")


def _read_torch(file: IO[bytes], path: str, is_zip: bool) -> Any:
    if is_zip:
        _check_archive(file, path)
        file.seek(0)
    try:
        # Not by its path, since torch.load takes a .safetensors for what it is called.
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserValueError(f"{path} {_why_torch_failed(error)}") from error


def _check_archive(file: IO[bytes], path: str) -> None:
    """Compare the records of the archive with their checksums. ``torch.load`` does not do so."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
            for record in archive.infolist() if "data.pkl" in names else []:
                if record.CRC:  # torch.save can be told to write none
                    with archive.open(record) as content:
                        while content.read(2**20):
                            pass
    except Exception as error:  # zipfile raises what comes to it, OSError included
        raise UserValueError(f"{path} {_DAMAGED}") from error
    if "constants.pkl" in names:
        raise UserValueError(
            f"{path} is a TorchScript program: save the state_dict() of the model that it was made "
            "from."
        )
    if "data.pkl" not in names:
        raise UserValueError(
            f"{path} is a zip archive without PyTorch's weights in it: unpack it first."
        )


def _why_torch_failed(error: Exception) -> str:
    if found := re.search(r"GLOBAL ([\w.]+)|global ([\w.]+) was not an allowed", str(error)):
        name = found[1] or found[2]
        return (
            f"is refused: reading it would import {name}, which is no tensor and may run code. If "
            "you trust it, save its state_dict() alone where it was made, and load that."
        )
    if isinstance(error, pickle.UnpicklingError):
        return "is refused: its pickle holds what a file of weights does not need."
    return _DAMAGED


def _read_safetensors(path: str) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise UserValueError(
            f"{path} is a safetensors file: `pip install safetensors` to read it."
        ) from error
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    if header_size > Path(path).stat().st_size - 8:
        raise UserValueError(f"{path} {_DAMAGED}")
    try:
        with safe_open(path, framework="pt") as file:
            content: dict[str, Any] = {
                "model": {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            }
            metadata = (file.metadata() or {}).get(METADATA_KEY)
    except SafetensorError as error:
        raise UserValueError(f"{path} {_DAMAGED}") from error
    if metadata is not None:
        try:
            content[METADATA_KEY] = json.loads(metadata)
        except ValueError as error:
            raise UserValueError(
                f"{path} is damaged: its entry {METADATA_KEY!r} is no JSON."
            ) from error
    return content


def _latin1(text: str, encoding: str) -> bytes:
    """Decode bytes of old protocols. Pickles of Python 3 use ``_codecs.encode`` for this only."""
    return text.encode("latin1")


# What NumPy's arrays and scalars are rebuilt by. NumPy 2 calls numpy.core numpy._core.
_ARRAY_GLOBALS: dict[str, Any] = {
    "numpy.core.multiarray._reconstruct": np.zeros(0).__reduce__()[0],
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy.core.numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that admits NumPy arrays and plain values, nothing else."""

    def __init__(self, file: IO[bytes]):
        # Detectron's own files were written by Python 2.
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(full)
        return _ARRAY_GLOBALS[full]


def _read_array_pickle(file: IO[bytes], path: str, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise UserValueError(
            f"{path} is a Python pickle, as Detectron2's old model zoo has them, and is not read "
            "unless you say so: add --allow-pickle (in code: allow_pickle=True). Arrays alone are "
            "then taken from it."
        )
    try:
        data = _ArrayUnpickler(file).load()
    except pickle.UnpicklingError as error:
        if re.fullmatch(r"[\w.]+", str(error)):
            raise UserValueError(
                f"{path} is refused even so: reading it would import {error}, which is no array "
                "and may run code."
            ) from error
        raise UserValueError(f"{path} {_DAMAGED}") from error
    except Exception as error:
        raise UserValueError(f"{path} {_DAMAGED}") from error
    if not isinstance(data, dict) or ("model" in data and "__author__" in data):
        return data
    # Caffe2's: detectors have "blobs", ImageNet models are bare.
    blobs = data.get("blobs", data)
    if not isinstance(blobs, dict):
        return data
    weights = {name: v for name, v in blobs.items() if not str(name).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def find_state_dict(content: Any, depth: int = 2) -> tuple[str, dict[Any, Any]] | None:
    """Find the tensors in the content of a file.

    Args:
        depth: how many dicts may be nested, as a file may hold a dict that holds itself.

    Returns:
        the key under which ``content`` has its tensors ("" if it is the state dict itself, "a.b"
        if they are nested) and the dict of them; None if there are none.
    """
    if not isinstance(content, dict):
        return None
    for key in _WRAPPERS if depth else ():
        if (inner := find_state_dict(content.get(key), depth - 1)) is not None:
            return ".".join(filter(None, (key, inner[0]))), inner[1]
    # Last, since some files have a single tensor (a random state, say) beside the wrapped ones.
    if any(isinstance(value, torch.Tensor | np.ndarray) for value in content.values()):
        return "", content
    return None


def _with_model(content: Any, path: str, entry: str) -> dict[str, Any]:
    """Return the content of a file with its state dict moved to "model"."""
    entries = _entries(content)
    if entry and entry not in entries:
        there = f"There are: {', '.join(entries)}." if entries else "It has no such entries."
        raise UserValueError(f"{path} has no weights under {entry!r}. {there}")
    if entry:
        content = {
            **{k: v for k, v in content.items() if k not in entries},
            "model": content[entry],
        }
    elif others := entries[1:]:
        logger.warning(
            "%s holds weights under %s, and those under %s are taken. For the others, write "
            "%s?entry=%s.",
            *(path, ", ".join(entries), entries[0], path, others[0]),
        )
    found = find_state_dict(content)
    if found is None:
        what = f"a {type(content).__name__}"
        if isinstance(content, dict):
            what = f"a dict of {', '.join(map(repr, list(content)[:5]))}" if content else "nothing"
        raise UserValueError(f"{path} holds no tensors by name, but {what}.")
    wrapper, state_dict = found
    for name, value in state_dict.items():
        # In place: modules find the versions of their layout in an attribute of the dict.
        state_dict[name] = _as_tensor(name, value, path)
    if not wrapper:
        return {"model": state_dict}
    rest = {str(key): v for key, v in content.items() if key != wrapper.partition(".")[0]}
    if wrapper == "model_state":  # pycls, whose names Detectron2 matches by heuristics
        rest["matching_heuristics"] = True
    return {**rest, "model": state_dict}


def _entries(content: Any) -> list[str]:
    """Return the usual keys of ``content`` that have a state dict, in the order of preference."""
    if not isinstance(content, dict):
        return []
    return [key for key in _WRAPPERS if find_state_dict(content.get(key), 1) is not None]


def _as_tensor(name: Any, value: Any, path: str) -> torch.Tensor:
    if not isinstance(name, str):
        raise UserValueError(
            f"{path} is no state dict: one of its names is {name!r}, not a string."
        )
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(value)
        except TypeError as error:
            raise UserValueError(f"{path}: {name} is an array of {value.dtype}.") from error
    if not isinstance(value, torch.Tensor):
        raise UserValueError(f"{path}: {name} is a {type(value).__name__}, not a tensor.")
    if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
        raise UserValueError(
            f"{path}: {name} is no plain tensor ({value.layout}, {value.dtype}, {value.device})."
        )
    return value
