# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets: their formats and checks, and the stream of training samples."""

from .digits import build_digits, digit_split, register_digits

__all__ = ["build_digits", "digit_split", "register_digits"]
