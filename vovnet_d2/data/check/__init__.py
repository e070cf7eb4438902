# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set in COCO's format, found before a training trips over it."""

from .check import Source, check_data_sets, find_registered, require_free, write_fixed
from .problems import PROBLEMS, Severity
from .report import format_report, report_to_json

__all__ = [
    "PROBLEMS",
    "Severity",
    "Source",
    "check_data_sets",
    "find_registered",
    "format_report",
    "report_to_json",
    "require_free",
    "write_fixed",
]
