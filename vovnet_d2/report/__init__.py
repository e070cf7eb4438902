# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""One HTML page describes a run, from the files in its folder (``tools/report.py``)."""

from importlib.util import find_spec

from ..errors import UserImportError

for _package, _module in {"Jinja2": "jinja2", "matplotlib": "matplotlib"}.items():
    if find_spec(_module) is None:
        raise UserImportError(f"A report needs {_package}: pip install 'vovnet_d2[demo]'")

from .detections import register_files  # noqa: E402
from .page import write_page  # noqa: E402

__all__ = ["register_files", "write_page"]
