# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Docstrings begin with a sentence, and not with a fragment that only the name explains."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPENINGS = re.compile(
    r"(As|Beside|By|From|How|Of|Than|That|The same|These|Those|What|Where|Whether|Which|Why)\b"
)
"""Words that no docstring begins with. CONTRIBUTING.md has examples of better sentences."""

SECTIONS = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
"""Sections. Only a docstring of ``__init__`` may begin with one."""

FOLDERS = ("benchmarks", "docs", "tests", "tools", "vovnet_d2")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def find_docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield all strings that are statements, such as docstrings of functions and of values."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str()) as docstring):
                yield docstring


def find_fragments(source: str) -> list[str]:
    """Return the line number and the first line of each docstring that begins with a fragment."""
    tree = ast.parse(source)
    constructors = [
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name == "__init__"
        and isinstance(node.body[0], ast.Expr)
    ]
    return [
        f"{docstring.lineno}: {docstring.value.strip().splitlines()[0]}"
        for docstring in find_docstrings(tree)
        if OPENINGS.match(text := docstring.value.strip())
        or (SECTIONS.match(text) and docstring not in constructors)
    ]


def test_docstrings_begin_with_a_sentence() -> None:
    found = {file: find_fragments(file.read_text(encoding="utf-8")) for file in FILES}
    assert {str(file.relative_to(ROOT)): lines for file, lines in found.items() if lines} == {}


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
        ("\n    Args:\n        a: a number.\n    ", True),
        ("\n    Attributes:\n        a: a number.\n    ", True),
        ("Returns: a number.", True),
        ("Add two numbers.\n\n    Args:\n        a: a number.\n    ", False),
    ],
)
def test_which_openings_are_refused(docstring: str, refused: bool) -> None:
    function = f'def f():\n    """{docstring}"""\n'
    variable = f'x = 1\n"""{docstring}"""\n'
    for source in (function, variable):
        assert bool(find_fragments(source)) == refused


def test_only_a_constructor_begins_with_its_arguments() -> None:
    method = 'def {}(self, a):\n    """\n    Args:\n        a: a number.\n    """\n'
    assert find_fragments(method.format("__init__")) == []
    assert find_fragments(method.format("run")) == ["2: Args:"]
