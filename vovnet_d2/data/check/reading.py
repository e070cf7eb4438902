# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""An annotation file is read as lists of records, even if parts of it are malformed."""

import json
from pathlib import Path
from typing import Any

from .problems import Findings

SECTIONS = ("categories", "images", "annotations")


def is_plain(path: Path) -> bool:
    """Return True if a JSON file is in UTF-8 without a byte order mark, as other tools need it."""
    with path.open("rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8"


def read_annotation_file(path: Path, findings: Findings) -> dict[str, Any] | None:
    """Read a file in COCO's format, and leave out what is malformed. Return the content, in which
    each of :data:`SECTIONS` is a list of dicts; None if the file cannot be read."""
    try:
        data = path.read_bytes()
        encoding = json.detect_encoding(data)
        content = json.loads(data.decode(encoding))
    except (OSError, MemoryError, RecursionError, ValueError) as error:
        findings.add("json", _explain(path, error))
        return None
    if not isinstance(content, dict):
        findings.add("json", f"{path} holds a {type(content).__name__}, not an object")
        return None
    if encoding != "utf-8":
        # Detectron2 reads UTF-8 and stops at a byte order mark.
        findings.add("encoding", encoding)
    for section in SECTIONS:
        content[section] = _read_section(content, section, findings)
    return content


def _explain(path: Path, error: Exception) -> str:
    match error:
        case UnicodeDecodeError():
            return f"{path} is not {error.encoding}: byte {error.start} is not part of a character"
        case json.JSONDecodeError():
            end = "at its end, so it may be truncated" if error.pos >= len(error.doc) - 1 else ""
            place = end or f"at line {error.lineno}, column {error.colno}"
            return f"{path} is not JSON {place}: {error.msg}"
        case RecursionError():
            return f"{path} is nested too deeply"
        case MemoryError():
            return f"{path} does not fit in memory"
        case OSError():
            return f"{path}: {error.strerror or error}"
    return f"{path}: {error}"


def _read_section(
    content: dict[str, Any], section: str, findings: Findings
) -> list[dict[str, Any]]:
    records = content.get(section)
    if not isinstance(records, list):
        what = f"is a {type(records).__name__}" if section in content else "is missing"
        findings.add("section", f'"{section}" {what}')
        return []
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            findings.add("record", f"{section}[{index}] is {_shorten(record)}")
    return [dict(record) for record in records if isinstance(record, dict)]


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
