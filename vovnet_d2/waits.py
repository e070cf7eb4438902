# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The time that one process waits for another."""

import os
from datetime import timedelta

from .errors import UserValueError


def longest_wait() -> timedelta:
    """Return how long a process waits for another one that does not answer.

    The environment variable VOVNET_D2_TIMEOUT gives the seconds; the default is half an hour, as in
    Detectron2. A process that has ended is noticed at once. On GPUs, it may be the launcher that
    notices this and ends the other processes.

    Raises:
        ValueError: VOVNET_D2_TIMEOUT is not a number of seconds.
    """
    value = os.environ.get("VOVNET_D2_TIMEOUT", "")
    if not value:
        return timedelta(minutes=30)
    if not value.isdecimal() or int(value) == 0:
        raise UserValueError(
            f"VOVNET_D2_TIMEOUT is {value!r}: set it to a number of seconds, or not at all."
        )
    return timedelta(seconds=int(value))
