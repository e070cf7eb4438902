# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What importing the package costs beside importing Detectron2's modeling."""

import subprocess
import sys
from statistics import median

import pytest

CODE = """
import sys, time
import detectron2.modeling
before, start = set(sys.modules), time.process_time()
import vovnet_d2
seconds, new = time.process_time() - start, set(sys.modules) - before
print(seconds, *sorted(new))
"""


def import_anew() -> tuple[float, list[str]]:
    """Seconds of the processor, and the modules that are new."""
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, *modules = result.stdout.split()
    return float(seconds), modules


def test_what_trains_and_evaluates_is_not_imported():
    _, modules = import_anew()
    own = {tuple(name.split(".")[:2]) for name in modules if name.startswith("vovnet_d2.")}
    late = {"predictor", "engine", "data", "analysis", "benchmark", "export", "demo"}
    assert ("vovnet_d2", "modeling") in own
    assert not {part for _, part in own} & late
    others = {name.split(".")[0] for name in modules} - {"vovnet_d2", "detectron2", "fvcore"}
    assert not others & {"matplotlib", "scipy", "sklearn", "cv2", "timm", "onnx", "huggingface_hub"}


@pytest.mark.slow
def test_import_takes_less_than_a_tenth_of_a_second():
    assert median(import_anew()[0] for _ in range(7)) < 0.1
