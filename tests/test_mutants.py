# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The table of faults in CONTRIBUTING.md names existing tests. ``make mutants`` chooses tests."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tests_that_notice_faults_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, table = text.split("## What a test must notice")
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            defined = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"\ndef {test}(" in defined, f"{file}::{test}"


def test_the_tests_of_a_file_import_the_file() -> None:
    tests_of = runpy.run_path(str(ROOT / "tests/mutants/mutate_changes.py"))["tests_of"]
    assert "tests/test_engine_scaling.py" in tests_of(["vovnet_d2/engine/scaling.py"])
    assert "tests/test_engine_scaling.py" not in tests_of(["vovnet_d2/modeling/layers.py"])
