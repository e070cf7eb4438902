# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""docs/gpu.md lists every file that has another branch for a GPU, and names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BRANCH = re.compile(
    r'type [!=]= "(cuda|cpu)"|is_cuda|torch\.cuda\.[a-z_]+\(|startswith\("cuda"\)|"nccl"'
)

PAGE = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]


def test_every_branch_of_a_gpu_is_listed() -> None:
    listed = [file.strip(" `") for file, *_ in ROWS]
    package = ROOT / "vovnet_d2"
    found = [
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if BRANCH.search(file.read_text(encoding="utf-8"))
    ]
    assert sorted(listed) == sorted(found)


def test_the_tests_on_the_page_exist_and_need_a_gpu_if_it_says_so() -> None:
    for _, _, without, with_gpu, _ in ROWS:
        for cell, marked in ((without, False), (with_gpu, True)):
            for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell):
                text = (ROOT / "tests" / file).read_text(encoding="utf-8")
                before, defined, _ = text.partition(f"\ndef {name}(")
                assert defined, f"{file}::{name}"
                decorators = before.rpartition("\n\n")[2]
                assert ("mark.gpu" in decorators) == marked, f"{file}::{name}"
