# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Work that the main process does for all processes."""

from collections.abc import Callable
from typing import Any, TypeVar

from detectron2.utils import comm

from ..errors import UserError

T = TypeVar("T")


def in_main_process(do: Callable[[], T]) -> T:
    """Call a function in the main process, and return its result in all processes.

    A :class:`UserError` of the function is raised in all processes, so that none waits for the
    others.
    """
    found: Any = None
    if comm.is_main_process():
        try:
            found = do()
        except UserError as error:
            found = error
    found = comm.all_gather(found)[0]
    if isinstance(found, UserError):
        raise found
    return found
