# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The detectors of the VoVNet paper, RefineDet and DSOD. Importing this package registers them."""

from .anchors import SSDAnchorGenerator
from .refinedet import RefineDet
from .ssd import SingleShotDetector

__all__ = ["RefineDet", "SSDAnchorGenerator", "SingleShotDetector"]
