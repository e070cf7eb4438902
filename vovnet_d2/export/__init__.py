# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Models out of Detectron2: ONNX, TorchScript, torch.export and AOTInductor, held against eager.

A target says what is exported, a format into what; parity compares the two, a report tells.
"""

from .formats import FORMATS, check_format, export, load
from .parity import compare
from .report import export_and_check
from .targets import PARTS, BackboneTarget, DetectorTarget, ExportTarget, select_target

__all__ = [
    "FORMATS",
    "PARTS",
    "BackboneTarget",
    "DetectorTarget",
    "ExportTarget",
    "check_format",
    "compare",
    "export",
    "export_and_check",
    "load",
    "select_target",
]
