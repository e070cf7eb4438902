# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Docstrings begin with a sentence, not with a fragment that leans on the name beside them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPENINGS = re.compile(
    r"(As|Beside|By|From|How|Of|Than|That|The same|These|Those|What|Where|Whether|Which|Why)\b"
)
"""Words that a docstring does not begin with. CONTRIBUTING.md has examples of what to write."""

ROOMS = ("benchmarks", "docs", "tests", "tools", "vovnet_d2")
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def find_docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield all strings that stand alone: docstrings of modules, classes, functions and values."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str()) as docstring):
                yield docstring


def find_fragments(source: str) -> list[str]:
    """Return the line number and the first line of each docstring that begins with a fragment."""
    return [
        f"{docstring.lineno}: {docstring.value.strip().splitlines()[0]}"
        for docstring in find_docstrings(ast.parse(source))
        if OPENINGS.match(docstring.value.strip())
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_begin_with_a_sentence(file: Path) -> None:
    assert find_fragments(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("docstring", "refused"),
    [
        ("Whether a file is there.", True),
        ("Those of this process.", True),
        ("Of a convolution, as torch names it.", True),
        ("\n    What each process does.\n    ", True),
        ("Return True if a file is there.", False),
        ("Whatever the config says, keep one file.", False),
        ("Official names of the variants.", False),
    ],
)
def test_which_openings_are_refused(docstring: str, refused: bool) -> None:
    function = f'def f():\n    """{docstring}"""\n'
    variable = f'x = 1\n"""{docstring}"""\n'
    for source in (function, variable):
        assert bool(find_fragments(source)) == refused
