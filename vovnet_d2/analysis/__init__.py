# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The VoVNet paper's argument, computed and measured: complexity, memory access, connectivity."""

from .complexity import Complexity, PartComplexity, analyze

__all__ = ["Complexity", "PartComplexity", "analyze"]
