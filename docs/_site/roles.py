# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Docstrings are written for Sphinx and read by Markdown: bring the one to the other."""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc|paper):`~?([^`<]+?)(?:\s*<[^`]*>)?`")


def to_markdown(text: str) -> str:
    """Return a docstring with its roles as code, and without the colons before its examples."""
    text = _ROLE.sub(lambda role: f"`{role[1].lstrip('.').removeprefix('vovnet_d2.')}`", text)
    text = re.sub(r"^( *)::$\n", "", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class PlainRoles(Extension):
    """Apply :func:`to_markdown` to every docstring that is read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = to_markdown(obj.docstring.value)
