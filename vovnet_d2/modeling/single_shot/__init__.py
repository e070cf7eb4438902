# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The VoVNet paper's own detectors, RefineDet and DSOD. Importing this registers them."""

from .anchors import SSDAnchorGenerator
from .refinedet import RefineDet
from .ssd import SingleShotDetector

__all__ = ["RefineDet", "SSDAnchorGenerator", "SingleShotDetector"]
