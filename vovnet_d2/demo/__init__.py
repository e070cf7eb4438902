# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo runs a detector on pictures, a video or a camera: ``tools/demo.py``."""

from .command import main

__all__ = ["main"]
