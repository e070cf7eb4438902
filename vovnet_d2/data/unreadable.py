# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read: told by name, or left out and counted."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from PIL import Image

from .check.files import resolve_inside
from .image_file import read_image, why_unreadable

__all__ = ["ReadableOnly", "UnreadableImageError", "image_roots"]

logger = logging.getLogger(__name__)


class UnreadableImageError(ValueError):
    """An image that training needs cannot be read; :attr:`sentence` says which and why."""

    @property
    def sentence(self) -> str:
        # A worker's error comes with its traceback before it.
        return str(self).rpartition(f"{type(self).__name__}: ")[2].strip()


def image_roots(names: Sequence[str]) -> list[str]:
    """The folders that the images of these data sets must be in; none if one of the sets has no
    annotation file whose paths could lead anywhere."""
    found = [MetadataCatalog.get(name) for name in names]
    if not all(metadata.get("json_file") for metadata in found):
        return []
    return [metadata.image_root for metadata in found if metadata.get("image_root") is not None]


class ReadableOnly:
    """A mapper around a mapper, for images that may be damaged.

    Reading one is an error that names the file. Up to ``max_skipped`` different images are left
    out instead: the mapper returns None for them, in whose place the training stream puts others,
    which are a function of the seed and the position alone.
    """

    def __init__(
        self,
        mapper: Callable[[dict[str, Any]], Any],
        *,
        roots: Sequence[str] = (),
        max_skipped: int | None = None,
    ):
        """
        Args:
            mapper: reads ``record["file_name"]`` and, of a data set with semantic labels,
                ``record["sem_seg_file_name"]``.
            roots: folders; an image outside all of them is an error. None are no restriction.
            max_skipped: how many images may be left out, in this process and its workers; None is
                none, and no error speaks of it.
        """
        self.mapper = mapper
        self.roots = roots
        self._max_skipped = max_skipped
        # Shared with the workers: the number of images that were left out, then a hash of the name
        # of each. Without any to leave out there is nothing to share.
        self._skipped = multiprocessing.Array("q", 1 + max_skipped) if max_skipped else None

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked get this object by pickle. Detectron2 pickles mappers by
        # cloudpickle, which does not know shared memory: multiprocessing's own pickler does.
        return {**self.__dict__, "_skipped": bytes(ForkingPickler.dumps(self._skipped))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _skipped=ForkingPickler.loads(state["_skipped"]))

    @property
    def count(self) -> int:
        """How many different images were left out, over all workers."""
        return self._skipped[0] if self._skipped else 0

    def __call__(self, record: dict[str, Any]) -> Any:
        """
        Returns:
            what the mapper makes of the record; None if its image is left out.

        Raises:
            UnreadableImageError: the image cannot be read and there were too many before it, or
                it is outside the folders.
        """
        if "file_name" not in record:  # of a data set of one's own
            return self.mapper(record)
        self._require_inside(record["file_name"])
        files = [record[key] for key in ("file_name", "sem_seg_file_name") if key in record]
        try:
            for file in files:
                _verify_png(file)
            return self.mapper(record)
        except Exception as error:
            for file in files:
                if reason := _why_unreadable(file, record):
                    self._skip(file, reason, error)
                    return None
            raise  # of the augmentation, say: no fault of the files

    def _require_inside(self, file_name: str) -> None:
        if not self.roots:
            return
        for root in self.roots:
            folder = os.path.join(root, "")
            inside = file_name.startswith(folder)
            # The name as the annotation file has it; or, of an absolute one, where it leads.
            name = file_name[len(folder) :] if inside else os.path.join(os.getcwd(), file_name)
            try:
                resolve_inside(root, name)
            except ValueError:
                continue
            return
        raise UnreadableImageError(
            f"{file_name} is not read: it leads out of the folder of the data set's images, "
            f"{' or '.join(self.roots)}."
        )

    def _skip(self, file_name: str, reason: str, error: Exception) -> None:
        if self._skipped is None:
            raise UnreadableImageError(self._explain(file_name, reason)) from error
        key = _hash(file_name)
        with self._skipped.get_lock():
            known = self._skipped[1 : 1 + self._skipped[0]]
            if key in known:
                return
            if len(known) >= len(self._skipped) - 1:
                raise UnreadableImageError(self._explain(file_name, reason)) from error
            self._skipped[1 + len(known)] = key
            self._skipped[0] += 1
        logger.warning(
            "%s cannot be used (%s): another image takes its place, number %d of the %d that "
            "DATALOADER.MAX_UNREADABLE allows.",
            *(file_name, reason, len(known) + 1, self._max_skipped),
        )

    def _explain(self, file_name: str, reason: str) -> str:
        before = f", and {self.count} were left out before it" if self.count else ""
        way_out = (
            ", and DATALOADER.MAX_UNREADABLE allows to leave out so many"
            if self._max_skipped is not None
            else ""
        )
        return (
            f"{file_name} cannot be used: {reason}{before}. tools/check_dataset.py lists all such "
            f"images{way_out}."
        )


def _hash(file_name: str) -> int:
    """The same in all workers, unlike Python's ``hash``."""
    digest = hashlib.sha256(file_name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _verify_png(file_name: str) -> None:
    """Compare a PNG file with its checksums: Detectron2 takes a damaged one for a black image."""
    with open(file_name, "rb") as file:
        if file.read(4) == b"\x89PNG":
            file.seek(0)
            Image.open(file).verify()


def _why_unreadable(file_name: str, record: dict[str, Any]) -> str:
    """Why a file of the record cannot be read, or the size of its image is not the one in the
    annotations; or nothing."""
    try:
        is_picture = file_name == record["file_name"]
        if reason := why_unreadable(file_name, labels=not is_picture):
            return reason
        _verify_png(file_name)
        if is_picture:
            check_image_size(record, read_image(file_name))
    except SizeMismatchError as error:
        return " ".join(str(error).split()).rstrip(".")
    except Exception as error:  # Pillow's decoders raise what comes to them
        return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
    return ""
