# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A value of ``MODEL.WEIGHTS`` leads to a file on this machine, and to the content of the file."""

import logging
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from detectron2.utils.file_io import PathManager

from ..errors import UserFileNotFoundError, UserValueError
from ..words import close_to_it
from .download import download
from .fetching import agrees
from .metadata import Metadata
from .reading import METADATA_KEY, read_checkpoint
from .zoo import ZOO, ZooEntry, get_entry, in_zoo

logger = logging.getLogger(__name__)

_HEURISTICS = "?matching_heuristics=True"  # Detectron2's option, written after the file's name

_ENTRY = re.compile(r"\?entry=([\w.]+)$")  # which of a file's weights, likewise

# Names such as resnet50-0676ba61.pth carry the beginning of a checksum: SHA-256 is the custom of
# torch.hub, SHA-1 that of pytorchcv, whose names may also end with .pth.zip.
_HASH_IN_NAME = re.compile(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.\w+(?:\.zip)?$")


def read_weights(
    weights: str, *, allow_pickle: bool = False
) -> tuple[dict[str, Any], Metadata | None]:
    """Read weights, and find out what is known about them.

    Args:
        weights: see :func:`locate`. ``?entry=NAME`` at the end chooses one of several sets of
            weights in a file.
        allow_pickle: see :func:`read_checkpoint`.

    Returns:
        the content of the file, as :func:`read_checkpoint` gives it, and the metadata in the file
            or in the zoo; None if there are none.

    Raises:
        FileNotFoundError, ValueError: see these two functions.
    """
    named = _ENTRY.search(weights)
    path, entry = locate(_ENTRY.sub("", weights).removesuffix(_HEURISTICS))
    checkpoint = read_checkpoint(path, allow_pickle=allow_pickle, entry=named[1] if named else "")
    if weights.endswith(_HEURISTICS):
        checkpoint["matching_heuristics"] = True
    if (own := checkpoint.pop(METADATA_KEY, None)) is not None:
        try:
            return checkpoint, Metadata.from_dict(own)
        except ValueError as error:
            raise UserValueError(f"{path} is damaged: {error}") from error
    return checkpoint, entry.metadata if entry else None


def locate(weights: str) -> tuple[str, ZooEntry | None]:
    """Find the file that ``MODEL.WEIGHTS`` names, and download it if necessary.

    Args:
        weights: a path (relative to the working directory), a name of the zoo (``timm://...``,
            ``osmr://...``, ``v99://...``), or a URL that Detectron2 knows (``https://``,
            ``detectron2://``, ...).

    Returns:
        the path on this machine, and the entry of the zoo for a name of the zoo.

    Raises:
        FileNotFoundError: there is no such file, or it could not be downloaded.
        ValueError: the zoo has no such name, or the file has another checksum.
    """
    if in_zoo(weights):
        entry = get_entry(weights)
        if not entry.commercial:
            logger.warning("The licence of %s is %s.", weights, entry.license)
        return download(entry), entry
    url = urlparse(weights)
    if url.scheme in ("", "file") or Path(weights).exists():
        return _existing(weights.removeprefix("file://")), None
    if url.hostname and url.hostname.endswith("dropbox.com") and "vovnet" in weights.lower():
        raise UserFileNotFoundError(
            f"{weights}: the VoVNet weights published on Dropbox are gone (the links have "
            f"answered 403 since 2026). What lives: {', '.join(ZOO)}. A copy that you have is "
            "given by its path."
        )
    try:
        path = PathManager.get_local_path(weights)
    except Exception as error:
        raise UserFileNotFoundError(f"{weights} could not be downloaded: {error}.") from error
    if not Path(path).is_file():  # Detectron2 takes a scheme that it does not know for a path
        raise UserFileNotFoundError(
            f"{weights} is no file, and {url.scheme}: is no scheme that is known here: use "
            "timm://, osmr://, v99://, detectron2:// or https://."
        )
    if (found := _HASH_IN_NAME.search(url.path)) and not any(
        agrees(path, f"{algorithm}:{found[1]}") for algorithm in ("sha256", "sha1")
    ):
        raise UserValueError(
            f"{path}, from {weights}, has another checksum than its name says: delete it and "
            "download it again."
        )
    return path, None


def _existing(path: str) -> str:
    if Path(path).is_file():
        return path
    if Path(path).is_dir():
        raise UserFileNotFoundError(f"{path} is a folder: name the file of weights in it.")
    folder = Path(path).parent
    if not folder.is_dir():
        raise UserFileNotFoundError(
            f"No file of weights {path}: there is no folder {folder} either."
        )
    names = [p.name for p in folder.iterdir() if p.is_file()]
    close = get_close_matches(Path(path).name, names, n=3, cutoff=0.5)
    hint = close_to_it([str(folder / name) for name in close])
    raise UserFileNotFoundError(
        f"No file of weights {path} (relative paths start in {Path.cwd()}).{hint}"
    )
