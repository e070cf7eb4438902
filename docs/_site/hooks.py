# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Hooks of MkDocs: pages that stand outside docs/, notebooks as pages, and the links of both.

The Markdown files read well on a code host and on the site. Links in them are paths in the
repository; the hooks turn each into a path in the site.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {
    "README.md": "index.md",
    "MODEL_ZOO.md": "MODEL_ZOO.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
}
"""Pages beside docs/, and their paths in the site."""

_LINK = re.compile(r"(\]\()([^)#\s]+)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/ and a page for each notebook."""
    for source, target in ROOT_PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "benchmarks").rglob("*")):
        if path.suffix in (".md", ".png", ".csv", ".json"):
            target = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, target, abs_src_path=str(path)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        content = _notebook_to_markdown(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to pages of the site."""
    target = page.file.src_uri
    source = next((s for s, t in ROOT_PAGES.items() if t == target), "")
    if not source:
        source = target if target.startswith("benchmarks/") else f"docs/{target}"
    parts = _CODE.split(markdown)  # code stands at the odd positions
    parts[::2] = [
        _LINK.sub(lambda link: link[1] + _site_path(link[2], source, target), text)
        for text in parts[::2]
    ]
    return "".join(parts)


def _site_path(link: str, source: str, target: str) -> str:
    """Translate a link of the repository to a link of the site.

    Args:
        link: a link on a page, relative to the page.
        source: the path of the page in the repository.
        target: the path of the page in the site.

    Returns:
        the link, relative to ``target``.
    """
    if "://" in link or link.startswith("mailto:"):
        return link
    path = os.path.normpath(PurePosixPath(source).parent / link)
    if path.startswith("docs/"):
        path = path.removeprefix("docs/")
        page = path.replace(".ipynb", ".md")
        path = path if page == target else page  # the page of a notebook links to the file itself
    elif (ROOT / path).is_dir():
        path += "/README.md"
    path = ROOT_PAGES.get(path, path)
    return PurePosixPath(os.path.relpath(path, PurePosixPath(target).parent)).as_posix()


def _notebook_to_markdown(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = []
    for cell in cells:
        text = "".join(cell["source"])
        texts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(texts)
