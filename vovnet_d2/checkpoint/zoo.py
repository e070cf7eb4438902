# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights that can be had, by name: where they are, what they are, and under which licence."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from vovnet_d2.modeling.specs import VOVNET_SPECS, VoVNetSpec

from .metadata import BGR_255, BGR_IMAGENET, RGB_IMAGENET, InputConvention, Metadata
from .recognition import Description

__all__ = ["ZOO", "ZooEntry", "download", "file_sha256", "get_entry", "metadata_of_layout"]

logger = logging.getLogger(__name__)

_PREFIX = "timm://"
_FILENAME = "model.safetensors"
_DD3D_HEADS = ("fcos2d_head", "fcos3d_head")


@dataclass(frozen=True)
class ZooEntry:
    """Weights of one network.

    Attributes:
        repo: repository on the Hugging Face hub.
        variant: the variant they are nearest to, a key of ``VOVNET_SPECS``.
        spec: the exact architecture.
        input: what they expect of their input.
        license: SPDX identifier.
        top1: published ImageNet-1k top-1 accuracy, in percent, by the size of the test images.
        revision: the commit in ``repo``, or None where none is pinned (the newest is taken).
        sha256: of the file, or None where it is not known. The hub's own record of it, kept in the
            cache, is compared in any case.
    """

    repo: str
    variant: str
    spec: VoVNetSpec
    input: InputConvention
    license: str
    top1: dict[int, float]
    revision: str | None = None
    sha256: str | None = None

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo}/resolve/{self.revision or 'main'}/{_FILENAME}"

    @property
    def metadata(self) -> Metadata:
        return Metadata(self.spec.stem, self.spec.residual, self.input, self.repo)


def _timm(name: str, variant: str, **fields: object) -> tuple[str, ZooEntry]:
    # timm has eSE in the last block of each stage.
    spec = replace(VOVNET_SPECS[variant], ese="last")
    entry = {"input": RGB_IMAGENET, "license": "Apache-2.0", **fields}
    return _PREFIX + name, ZooEntry(f"timm/{name}", variant, spec, **entry)  # type: ignore[arg-type]


ZOO: dict[str, ZooEntry] = dict(
    [
        _timm(
            "ese_vovnet19b_dw.ra_in1k",
            "V-19-dw-eSE",
            top1={224: 76.83},
            revision="aa57bf7516f34af5780d983b4ee679bcba5c344c",
        ),
        _timm("ese_vovnet39b.ra_in1k", "V-39-eSE", top1={224: 79.31}),
        _timm(
            "ese_vovnet57b.ra4_e3600_r256_in1k",
            "V-57-eSE",
            input=InputConvention("RGB", (127.5,) * 3, (127.5,) * 3),
            top1={256: 82.46, 320: 83.30},
            revision="4ef6c6f07c1ca01d4a970d002e98e147ed933f46",
        ),
    ]
)
"""Name, as ``MODEL.WEIGHTS`` takes it, to what it stands for. All were trained on ImageNet-1k."""


def get_entry(name: str) -> ZooEntry:
    """
    Raises:
        ValueError: there are no weights of that name; the message lists those that there are.
    """
    if name in ZOO:
        return ZOO[name]
    close = get_close_matches(name, ZOO, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"No weights {name} in the zoo.{hint} There are: {', '.join(ZOO)}. Other VoVNets of timm "
        "have no trained weights."
    )


def download(entry: ZooEntry) -> str:
    """Get the file of an entry through huggingface_hub: from its cache, or with a progress bar.

    The cache, offline mode (``HF_HUB_OFFLINE=1``) and mirrors are huggingface_hub's.

    Returns:
        its path.

    Raises:
        FileNotFoundError: it is not in the cache and cannot be downloaded.
        ValueError: the file is not what the hub says it is.
        OSError: what this machine has against it, such as a full disk.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{entry.repo} is on the Hugging Face hub: `pip install huggingface_hub safetensors` "
            f"to have it downloaded, or download {entry.url} and set MODEL.WEIGHTS to the file."
        ) from error
    try:
        # Of a pinned revision, the network is asked only if the cache does not have it.
        path = hf_hub_download(entry.repo, _FILENAME, revision=entry.revision)
    except Exception as error:
        # The hub's errors have no number; nor have those of the connection, which it wraps.
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise
        path = _cached_revision(entry, error)
    # The cache names a file by the SHA-256 that the hub gave for it.
    blob = Path(path).resolve().name
    expected = entry.sha256 or (blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None)
    if expected and file_sha256(path) != expected:
        raise ValueError(
            f"{path} is not the file that {entry.repo} has (SHA-256 {expected}): delete it, and it "
            "is downloaded again."
        )
    return path


def _cached_revision(entry: ZooEntry, error: Exception) -> str:
    """What timm, say, has put into the cache, where the revision that is meant cannot be had."""
    from huggingface_hub import hf_hub_download

    reason = f"{error.__cause__ or error}".partition("\n")[0]
    try:
        path = hf_hub_download(entry.repo, _FILENAME, local_files_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{entry.repo} is not in the cache of huggingface_hub and could not be downloaded "
            f"({type(error).__name__}: {reason}). Where the hub is out of reach (or HF_HUB_OFFLINE "
            f"is set), download {entry.url} elsewhere and set MODEL.WEIGHTS to the file."
        ) from error
    logger.warning(
        "Revision %s of %s could not be had (%s): taken is revision %s, which is in the cache.",
        entry.revision or "main",
        entry.repo,
        reason,
        Path(path).parent.name,
    )
    return path


def file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def metadata_of_layout(found: Description, names: Iterable[str]) -> Metadata:
    """What the layout of a file tells that says nothing of itself: conventions of those who
    published such files, so less certain than what a file says.

    Args:
        names: of all that the file holds, the parts outside the VoVNet included.
    """
    if found.layout == "timm":
        # timm's v1 models have no residual; all its VoVNets have the strided stem by default.
        residual = found.fields["ese"] != "none"
        same = [entry for entry in ZOO.values() if not found.differences(entry.spec)]
        convention = same[0].input if same else RGB_IMAGENET
        return Metadata("strided", residual, convention, "timm's convention")
    if found.layout == "osmr":
        return Metadata("strided", True, RGB_IMAGENET, "osmr's convention")
    if found.layout == "detectron2":
        return _metadata_of_published(found, list(names))
    return Metadata()


def _metadata_of_published(found: Description, names: list[str]) -> Metadata:
    if any(part in _DD3D_HEADS for name in names for part in name.split(".")):
        return Metadata("strided", True, BGR_IMAGENET, "DD3D's convention")
    # Only the v2 weights in Detectron2's own prefix are known to agree: v1 came as classifiers in
    # RGB, and detectors outside Detectron2 differ in their deviations.
    known = (
        found.fields["ese"] != "none"
        and found.num_classes is None
        and not found.prefix.endswith("img_backbone.")
    )
    told = Metadata("strided", True, source="the published weights' convention")
    if not known:
        return told
    # DD3D's own V-99-eSE was published without heads, too. An FPN is no head.
    bare = all(name.startswith(found.prefix.removesuffix("bottom_up.")) for name in names)
    if bare and not found.differences(VOVNET_SPECS["V-99-eSE"]):
        return replace(told, candidates=(BGR_255, BGR_IMAGENET))
    return replace(told, input=BGR_255)
