# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Every figure on the pages in docs/ exists and was made by a command on the page."""

import re
import shlex
from pathlib import Path

import make_docs_figures
import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if make_docs_figures.commands(page)]


@pytest.fixture(params=PAGES, ids=lambda page: page.stem)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def folder_of(command: str) -> Path:
    words = shlex.split(command)
    return DOCS.parent / words[words.index("--output") + 1]


def test_there_is_a_page() -> None:
    assert PAGES


def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_every_figure_has_its_command(page: Path) -> None:
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text())
    made = {folder_of(command) for command in make_docs_figures.commands(page)}
    assert {(page.parent / image).parent for image in images} == made
    assert len(images) == len(set(images))


def test_the_table_of_each_figure_names_a_command_on_the_page(page: Path) -> None:
    commands = set(make_docs_figures.commands(page))
    for folder in {folder_of(command) for command in commands}:
        tables = list(folder.glob("*.csv"))
        assert tables
        for table in tables:
            written = re.search(r"^# command: (.*)$", table.read_text(), re.MULTILINE)
            assert written is not None
            assert written[1] in commands
            assert table.with_suffix(".png").is_file()


def test_there_are_no_unused_figures() -> None:
    made = {folder_of(c) for page in PAGES for c in make_docs_figures.commands(page)}
    assert set((DOCS / "figures").iterdir()) == made
