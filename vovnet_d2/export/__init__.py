# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Export of models to ONNX, TorchScript, torch.export and AOTInductor, compared with eager mode.

A target is the part of a model to export, and a format is the kind of file. The report has the
differences between the file and the model.
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
