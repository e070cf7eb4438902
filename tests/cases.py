# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A context manager for tests that check many cases in a loop."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def case(name: str) -> Iterator[None]:
    """Add the name of the case to an error that is raised inside."""
    try:
        yield
    except (AssertionError, pytest.fail.Exception) as error:
        raise AssertionError(f"In case {name!r}: {error}") from error
