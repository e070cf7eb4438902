# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Download files from web servers: continue what broke off, and compare checksums.

``torch.hub.download_url_to_file`` starts anew after a broken connection and knows only SHA-256.
huggingface_hub resumes downloads, but only from a repository of the hub.
"""

import hashlib
import logging
import os
import ssl
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

from iopath.common.file_io import file_lock
from tqdm import tqdm

from ..errors import UserFileNotFoundError, one_line
from .reading import looks_like_html
from .zipped import find_weights, unpacked

logger = logging.getLogger(__name__)

_TIMEOUT = 30  # seconds without a byte
_CHUNK = 2**20
_NETWORK_ERRORS = (URLError, ConnectionError, TimeoutError, HTTPException, ssl.SSLError)


class _Unusable(Exception):
    """The server returned something else than the file."""


def fetch(urls: Iterable[str], folder: Path, *, checksum: str = "") -> str:
    """Download a file from the first of several addresses that has it.

    A download that breaks off continues at once. Without a connection it continues at the next
    call. If several processes ask for a file, one downloads it and the others wait.

    Args:
        urls: addresses of the same file.
        folder: the folder for the file. The file keeps the name in its address.
        checksum: for example "sha1:b7a5bf67"; the first digits suffice, see :func:`agrees`.

    Returns:
        path of the file.

    Raises:
        FileNotFoundError: no address has the file. The message has the reason for each.
        OSError: this machine cannot keep the file, for example on a full disk.
    """
    reasons = []
    for url in urls:
        target = folder / name_of(url)
        try:
            with file_lock(str(target)):
                if not target.is_file():
                    _download(url, target, checksum)
            return str(target)
        except (_Unusable, *_NETWORK_ERRORS) as error:
            reasons.append(f"{url}: {one_line(error)}")
            logger.warning("Not downloaded. %s", reasons[-1])
    raise UserFileNotFoundError("; ".join(reasons))


def name_of(url: str) -> str:
    """Return the name of the file in a URL."""
    return PurePosixPath(unquote(urlparse(url).path)).name


def file_digest(path: str, algorithm: str) -> str:
    """Return the checksum of a file in hexadecimal digits. For a .pth.zip it is the checksum of the
    .pth inside."""
    found = hashlib.new(algorithm, usedforsecurity=False)
    entry = find_weights(path)
    for chunk in _chunks(path) if entry is None else unpacked(path, entry):
        found.update(chunk)
    return found.hexdigest()


def agrees(path: str, checksum: str) -> bool:
    """Return True if a file has the given checksum.

    A checksum is written as its algorithm, a colon, and its first hexadecimal digits or all of
    them.
    """
    algorithm, _, beginning = checksum.partition(":")
    return file_digest(path, algorithm).startswith(beginning)


def _chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _download(url: str, target: Path, checksum: str) -> None:
    # The file of another server may differ, and must not be mixed with this file.
    server = hashlib.sha256(url.encode()).hexdigest()[:8]
    partial = target.with_name(f"{target.name}.{server}.partial")
    logger.info("Downloading %s to %s ...", url, target)
    resumed = partial.is_file()
    _receive_all(url, partial)
    if (reason := _why_unusable(partial, checksum)) and resumed:
        # The file on the server may have changed since its first part came.
        partial.unlink()
        _receive_all(url, partial)
        reason = _why_unusable(partial, checksum)
    if reason:
        partial.unlink()
        raise _Unusable(reason)
    if not checksum:
        digest = file_digest(str(partial), "sha256")
        logger.info("No checksum of %s is known to compare with. SHA-256: %s", target.name, digest)
    os.replace(partial, target)


def _why_unusable(path: Path, checksum: str) -> str:
    if looks_like_html(str(path)):
        return "the server answers with an HTML page"
    if not checksum:
        return ""
    try:
        same = agrees(str(path), checksum)
    except ValueError:
        return "the archive is damaged"
    return "" if same else f"the file has another checksum than {checksum}"


def _receive_all(url: str, partial: Path) -> None:
    """Receive a file, and reconnect after a broken connection as long as each connection delivers
    data.
    """
    while True:
        before = _size(partial)
        try:
            return _receive(url, partial)
        except HTTPError as error:
            # The part is as long as the file, or longer. If it is not complete, it is useless.
            if error.code != 416 or not before:
                raise
            if error.headers.get("Content-Range") == f"bytes */{before}":
                return None
            partial.unlink()
        except _NETWORK_ERRORS as error:
            if _size(partial) <= before:
                raise
            logger.info("The connection broke (%s): going on.", error)


def _receive(url: str, partial: Path) -> None:
    """Receive the missing part of a file in one request, with a progress bar."""
    start = _size(partial)
    headers = {"User-Agent": "vovnet_d2", **({"Range": f"bytes={start}-"} if start else {})}
    with urlopen(Request(url, headers=headers), timeout=_TIMEOUT) as response:
        if response.status != 206:  # a server that cannot give a part gives the whole
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = tqdm(
            desc=name_of(url),
            initial=start,
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
        )
        with bar, open(partial, "ab" if start else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(partial) < total:
        raise ConnectionError(f"it ended after {_size(partial)} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
