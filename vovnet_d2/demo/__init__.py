# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A detector at work on pictures, a video or a camera: ``tools/demo.py``."""

from .command import main

__all__ = ["main"]
