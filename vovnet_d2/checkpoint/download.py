# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Get the files of the zoo from a folder or mirror of the user, from a cache, or from the web."""

import logging
import os
import re
from pathlib import Path

import torch

from ..errors import UserFileNotFoundError, UserValueError
from .fetching import agrees, fetch, file_digest
from .zoo import HUB_FILE, ZooEntry

logger = logging.getLogger(__name__)

MIRROR = "VOVNET_D2_WEIGHTS"
"""The environment variable that names a folder with files of the zoo, or the URL that they lie
below.
"""


def download(entry: ZooEntry) -> str:
    """Get the file of an entry of the zoo, with a progress bar for a download.

    :data:`MIRROR` comes first. Files of the hub come through huggingface_hub, whose cache, offline
    mode (``HF_HUB_OFFLINE=1``) and mirrors apply. Other files are kept in the cache of torch.hub
    (``TORCH_HOME``).

    Returns:
        its path.

    Raises:
        FileNotFoundError: the file is not on this machine and cannot be downloaded.
        ValueError: the file on this machine has another content.
        OSError: this machine cannot keep the file, for example on a full disk.
    """
    mirror = os.environ.get(MIRROR, "")
    is_folder = "://" not in mirror
    if mirror and is_folder and (path := _in_folder(entry, Path(mirror))):
        return _checked(entry, path)
    urls = [] if is_folder else [f"{mirror.rstrip('/')}/{name}" for name in entry.file_names]
    cache = Path(torch.hub.get_dir(), "checkpoints")
    for name in entry.file_names:
        if (cache / name).is_file():
            return _checked(entry, str(cache / name))
    if not entry.repo:
        urls += entry.urls
    elif not urls:
        return _from_hub(entry)
    try:
        return fetch(urls, cache, checksum=entry.checksum)
    except FileNotFoundError as error:
        if entry.repo:
            return _from_hub(entry)
        raise UserFileNotFoundError(
            f"{entry.source} could not be downloaded ({error}). Get the file elsewhere, put it "
            f"into a folder and set the environment variable {MIRROR} to that folder, or set "
            "MODEL.WEIGHTS to the file."
        ) from error


def _in_folder(entry: ZooEntry, folder: Path) -> str:
    """Return the path of an entry's file in a folder; empty if the folder lacks the file. Raise
    FileNotFoundError if there is no such folder."""
    if not folder.is_dir():
        raise UserFileNotFoundError(
            f"{MIRROR} is {folder}, which is no folder: name one with files of weights in it, or a "
            "URL that begins with https://."
        )
    found = [folder / name for name in entry.file_names if (folder / name).is_file()]
    if not found:
        logger.info("%s (%s) has no %s.", folder, MIRROR, " or ".join(entry.file_names))
    return str(found[0]) if found else ""


def _checked(entry: ZooEntry, path: str) -> str:
    """Return a path. Raise ValueError if the file has another checksum than its entry."""
    if entry.checksum and not agrees(path, entry.checksum):
        raise UserValueError(
            f"{path} is not the file that {entry.source} is ({entry.checksum}): delete it, and it "
            "is downloaded again."
        )
    return path


def _from_hub(entry: ZooEntry) -> str:
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        raise UserFileNotFoundError(
            f"{entry.repo} is on the Hugging Face hub: `pip install huggingface_hub safetensors` "
            f"to have it downloaded, or download {entry.urls[0]} and set MODEL.WEIGHTS to the file."
        ) from error
    logger.info("Looking for %s in the cache of the Hugging Face hub, then on the hub.", entry.repo)
    try:
        # The hub is asked for a pinned revision only if the cache does not have it.
        path = hf_hub_download(entry.repo, HUB_FILE, revision=entry.revision)
    except Exception as error:
        # The hub's errors have no errno, and neither have its errors of a connection.
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise
        path = _cached_revision(entry, error)
    # The cache names a file by the SHA-256 that the hub gave for it.
    blob = Path(path).resolve().name
    expected = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else ""
    if expected and file_digest(path, "sha256") != expected:
        raise UserValueError(
            f"{path} is not the file that {entry.repo} has (SHA-256 {expected}): delete it, and it "
            "is downloaded again."
        )
    return _checked(entry, path)


def _cached_revision(entry: ZooEntry, error: Exception) -> str:
    """Find the file that another program, such as timm, has put into the cache. It is used if the
    right revision cannot be downloaded."""
    from huggingface_hub import hf_hub_download

    reason = f"{error.__cause__ or error}".partition("\n")[0]
    try:
        path = hf_hub_download(entry.repo, HUB_FILE, local_files_only=True)
    except FileNotFoundError:
        raise UserFileNotFoundError(
            f"{entry.repo} is not in the cache of huggingface_hub and could not be downloaded "
            f"({type(error).__name__}: {reason}). Where the hub is out of reach (or HF_HUB_OFFLINE "
            f"is set), download {entry.urls[0]} elsewhere, and set MODEL.WEIGHTS to the file, or "
            f"name the file {' or '.join(entry.file_names)} and set the environment variable "
            f"{MIRROR} to its folder."
        ) from error
    logger.warning(
        "Revision %s of %s cannot be downloaded (%s): revision %s in the cache is used.",
        entry.revision or "main",
        entry.repo,
        reason,
        Path(path).parent.name,
    )
    return path
