# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The time to import the package after Detectron2's modeling."""

import subprocess
import sys
from statistics import median

import pytest

# Each time is measured in a fork, so that Detectron2 is imported only once.
CODE = """
import os, sys, time
import detectron2.modeling
for _ in range(7):
    if os.fork() == 0:
        assert "vovnet_d2" not in sys.modules
        start = time.process_time()
        import vovnet_d2
        print(time.process_time() - start, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.slow
def test_import_takes_less_than_a_tenth_of_a_second():
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = [float(line) for line in result.stdout.splitlines()]
    assert len(seconds) == 7
    assert median(seconds) < 0.1
