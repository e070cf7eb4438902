# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The site of the documentation builds, its links are valid, and its FAQ quotes real messages."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from detectron2.config import CfgNode

from vovnet_d2.engine import load_config
from vovnet_d2.engine.config import get_value, list_keys

ROOT = Path(__file__).parents[1]
SHIPPED = "COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.yaml"


class Page(HTMLParser):
    """Parser that collects the anchors, the links and the loaded files of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if found.get("id"):
            self.anchors.add(str(found["id"]))
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if found.get("rel") != "canonical":
            key = {"link": "href", "script": "src", "img": "src", "iframe": "src"}.get(tag, "")
            if found.get(key):
                self.loaded.append(str(found[key]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the site needs Python 3.11 or newer")
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    return folder


@pytest.mark.slow
def test_links_of_the_site_are_valid(site: Path) -> None:
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    assert len(pages) > 20
    dead = []
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":  # its links are absolute
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            is_anchored = not parts.fragment or (
                target in pages and unquote(parts.fragment) in pages[target].anchors
            )
            if not (target.is_file() and is_anchored):
                dead.append((path.name, link))
    assert dead == []


@pytest.mark.slow
def test_the_page_of_a_notebook_links_to_the_file(site: Path) -> None:
    for page in (site / "notebooks").glob("*.html"):
        assert f"{page.stem}.ipynb" in Page(page).links


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    assert [(p.name, url) for p in pages for url in pages[p].loaded if urlsplit(url).netloc] == []


@pytest.mark.slow
def test_roles_of_docstrings_are_converted(site: Path) -> None:
    """Check that roles of Sphinx, which Markdown does not know, are converted."""
    for path in (site / "reference").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r":(?:class|func|meth|data|mod|attr|paper):", text) == []


def messages() -> str:
    """Return all texts of the package, with "…" instead of inserted values."""
    texts = []
    for file in sorted((ROOT / "vovnet_d2").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[.\d]*[sdg]", "…", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                texts.append("".join(map(str, parts)))
    return "\n".join(texts)


# Detectron2 and OpenCV print these.
FOREIGN = {
    "Non-existent config key: MODEL.VOVNET",
    "libGL.so.1: cannot open shared object file",
}


def test_the_faq_quotes_the_sentences_of_the_package() -> None:
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(quoted) >= 25
    known = messages()
    missing = [
        (message, part)
        for message in quoted
        if message not in FOREIGN
        for part in message.split("…")
        if part.strip(" .:,()") and part.strip(" .") not in known
    ]
    assert missing == []


def read_yaml(page: str) -> CfgNode:
    """Return the config that the first YAML file of a page has."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return CfgNode(yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)[0]))


def test_the_complete_config_of_the_docs_equals_the_packages(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(read_yaml("docs/own_config.md").dump())
    assert load_config(str(file)) == load_config(SHIPPED)


def test_the_lines_of_readme_replace_a_resnet() -> None:
    """Merge the lines into a config of Detectron2, and build the network."""
    lines, shipped = read_yaml("README.md"), load_config(SHIPPED)
    assert {key: get_value(lines, key) for key in list_keys(lines)} == {
        key: get_value(shipped, key) for key in list_keys(lines)
    }
    # The weights and the backbone of VoVNet need these keys. The other keys belong to the detector.
    assert {"WEIGHTS", "PIXEL_MEAN", "PIXEL_STD", "BACKBONE", "FPN", "VOVNET"} == set(lines.MODEL)
    assert set(lines.INPUT) == {"FORMAT"}
