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
before, start = set(sys.modules), time.process_time()
import vovnet_d2
seconds, new = time.process_time() - start, set(sys.modules) - before
print(seconds, *sorted(new))
import vovnet_d2.data
print(*sorted(set(sys.modules) - before))
"""


def import_anew() -> tuple[float, list[str], list[str]]:
    """Seconds of the processor, and the modules that are new; those too that the data bring."""
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = result.stdout.splitlines()
    seconds, *modules = first.split()
    return float(seconds), modules, second.split()


def test_what_trains_and_evaluates_is_not_imported():
    _, modules, with_data = import_anew()
    own = {tuple(name.split(".")[:2]) for name in modules if name.startswith("vovnet_d2.")}
    late = {"predictor", "engine", "data", "analysis", "benchmark", "export", "demo"}
    assert ("vovnet_d2", "modeling") in own
    assert not {part for _, part in own} & late
    others = {name.split(".")[0] for name in modules} - {"vovnet_d2", "detectron2", "fvcore"}
    assert not others & {"matplotlib", "scipy", "sklearn", "cv2", "timm", "onnx", "huggingface_hub"}
    assert "torchvision.models.feature_extraction" not in modules
    assert "vovnet_d2.data.digits" in with_data
    assert "sklearn" not in with_data


@pytest.mark.slow
def test_import_takes_less_than_a_tenth_of_a_second():
    assert median(import_anew()[0] for _ in range(7)) < 0.1
