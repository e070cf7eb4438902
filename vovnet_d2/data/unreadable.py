# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read are named in an error, or are left out and counted."""

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import check_image_size

from ..errors import UserValueError, one_line
from .check.files import resolve_inside
from .image_file import read_image, why_unreadable

logger = logging.getLogger(__name__)


class UnreadableImageError(UserValueError):
    """An image that training needs cannot be read; the message says which and why."""


def image_roots(names: Sequence[str]) -> list[str]:
    """Return the folders that must hold the images of these data sets. The list is empty if a data
    set has no annotation file, as only the paths of annotation files are restricted."""
    found = [MetadataCatalog.get(name) for name in names]
    if not all(metadata.get("json_file") for metadata in found):
        return []
    return [metadata.image_root for metadata in found if metadata.get("image_root") is not None]


class ReadableOnly:
    """Wraps a mapper and handles damaged images.

    A damaged image causes an error that names the file. Up to ``max_skipped`` different images
    are left out instead: the mapper returns None for them, and the training stream puts other
    images in their place. The choice depends on the seed and the position alone.
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
            mapper: reads ``record["file_name"]`` and, for semantic labels,
                ``record["sem_seg_file_name"]``, by :mod:`~vovnet_d2.data.image_file`. Detectron2's
                own mapper reads some damaged PNG files as black images.
            roots: the folders that may hold images; an image outside causes an error. If empty,
                images may be anywhere.
            max_skipped: how many images this process and its workers may leave out. With None no
                image is left out, and no error mentions the option.
        """
        self.mapper = mapper
        self.roots = roots
        self._max_skipped = max_skipped
        # Shared with the workers: the number of images that were left out, then a hash of the name
        # of each. None if no image may be left out.
        self._skipped = multiprocessing.Array("q", 1 + max_skipped) if max_skipped else None

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked get this object by pickle. Detectron2 pickles mappers by
        # cloudpickle, which does not know shared memory: multiprocessing's own pickler does.
        return {**self.__dict__, "_skipped": bytes(ForkingPickler.dumps(self._skipped))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _skipped=ForkingPickler.loads(state["_skipped"]))

    @property
    def count(self) -> int:
        """Return how many images all workers together have left out."""
        return self._skipped[0] if self._skipped else 0

    def __call__(self, record: dict[str, Any]) -> Any:
        """Map a record to the input of the network, or return None if its unreadable image is left
        out. Raise UnreadableImageError if too many were left out before it, or if the image is
        outside the folders."""
        if "file_name" not in record:  # a custom data set may hold something else
            return self.mapper(record)
        self._require_inside(record["file_name"])
        files = [record[key] for key in ("file_name", "sem_seg_file_name") if key in record]
        try:
            return self.mapper(record)
        except Exception as error:
            for file in files:
                if reason := _why_unreadable(file, record):
                    self._skip(file, reason, error)
                    return None
            raise  # The files are fine: the augmentation, for example, has failed.

    def _require_inside(self, file_name: str) -> None:
        if not self.roots:
            return
        for root in self.roots:
            folder = os.path.join(root, "")
            inside = file_name.startswith(folder)
            # The name in the annotation file, or the absolute path of a file outside this folder.
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
            "%s cannot be used (%s): another image takes its place. This is image %d of the %d "
            "that DATALOADER.MAX_UNREADABLE lets a training leave out.",
            *(file_name, reason, len(known) + 1, self._max_skipped),
        )

    def _explain(self, file_name: str, reason: str) -> str:
        before = f", and {self.count} were left out before it" if self.count else ""
        way_out = (
            ", and DATALOADER.MAX_UNREADABLE lets a training leave out some"
            if self._max_skipped is not None
            else ""
        )
        return (
            f"{file_name} cannot be used: {reason}{before}. tools/check_dataset.py lists all such "
            f"images{way_out}."
        )


def _hash(file_name: str) -> int:
    """Return a number for a file name. It is the same in all workers, unlike the result of
    ``hash``."""
    digest = hashlib.sha256(file_name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _why_unreadable(file_name: str, record: dict[str, Any]) -> str:
    """Return why a file of a record cannot be read, or that its size is not the one in the
    annotations. Return an empty string if the file can be used."""
    try:
        is_picture = file_name == record["file_name"]
        if reason := why_unreadable(file_name, labels=not is_picture):
            return reason
        if is_picture:
            check_image_size(record, read_image(file_name))
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        return one_line(error)
    return ""
