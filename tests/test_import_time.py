# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The time to import the package, beside that of Detectron2's modeling."""

import subprocess
import sys
from statistics import median

import pytest

CODE = """
import sys, time
import detectron2.modeling
start = time.process_time()
import vovnet_d2
print(time.process_time() - start)
"""


def import_anew() -> float:
    """Return the seconds of the processor."""
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_import_takes_less_than_a_tenth_of_a_second():
    assert median(import_anew() for _ in range(7)) < 0.1
