# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The doctor in environments that are broken in one way each.

An environment is a folder of stub modules and distributions, which stands in for site-packages. The
interpreter sees nothing else.
"""

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import doctor
import packaging
import pytest
from install_detectron2 import REQUIREMENTS

DOCTOR = Path(doctor.__file__)

TORCH = """
__version__ = "2.15.0+cpu"
class version: cuda = None
class backends:
    class cudnn: version = staticmethod(lambda: None)
class cuda: is_available = staticmethod(lambda: False)
def tensor(data, device): return data
"""
TORCHVISION = """
__version__ = "0.29.2+cpu"
class ops: nms = staticmethod(lambda boxes, scores, threshold: [0])
"""


class Environment:
    """Stand-in for site-packages without faults, which tests then break."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "site-packages"
        self.bin = folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        self.module("torch", TORCH)
        self.module("torchvision", TORCHVISION)
        self.module("cv2", "__version__ = '5.0.0'")
        self.module("detectron2", "__version__ = '0.6'")
        self.module("detectron2/_C", "")
        for name in doctor.TRAINING_MODULES:
            self.module(f"detectron2/{name}", "")
        self.module("vovnet_d2", "__version__ = '0.1.0'")
        (self.folder / "packaging").symlink_to(Path(packaging.__file__).parent)
        self.distribution("iopath", "0.1.9")
        self.distribution("omegaconf", "2.3.0")
        self.distribution("torch", "2.15.0")
        wanted = [r for r in REQUIREMENTS if r.startswith(("iopath", "omegaconf", "setuptools"))]
        self.distribution("setuptools", "80.0")
        self.distribution("detectron2", "0.6", wanted)
        self.distribution("vovnet_d2", "0.1.0", ["torch>=2.6", "pytest; extra == 'dev'"])
        self.distribution("opencv-python-headless", "5.0.0")

    def module(self, name: str, source: str) -> None:
        module = self.folder / name
        module.mkdir(exist_ok=True)
        (module / "__init__.py").write_text(source)

    def remove_module(self, name: str) -> None:
        shutil.rmtree(self.folder / name)

    def distribution(self, name: str, version: str, requires: Sequence[str] = ()) -> None:
        self.remove_distribution(name)
        metadata = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        (metadata / "METADATA").write_text("\n".join(lines) + "\n")

    def remove_distribution(self, name: str) -> None:
        for metadata in self.folder.glob(f"{name.replace('-', '_')}-*.dist-info"):
            shutil.rmtree(metadata)

    def program(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def diagnose(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            # -S hides the site-packages in which this test runs.
            [sys.executable, "-S", str(DOCTOR)],
            env={
                "PATH": str(self.bin),
                "PYTHONPATH": str(self.folder),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_a_healthy_environment_has_no_findings(environment: Environment) -> None:
    result = environment.diagnose()
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("This environment can train.\n")
    assert "Prevents training" not in result.stdout
    assert "Worth knowing" not in result.stdout
    assert result.stderr == ""


def test_gpus_are_listed_with_their_memory(environment: Environment) -> None:
    gpu = """
class properties: name, total_memory = "NVIDIA T4", 16 * 2**30
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda index: properties)
"""
    environment.module("torch", TORCH + gpu)
    environment.module("detectron2/_C", "def has_cuda(): return True")
    result = environment.diagnose()
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "GPU 0" in line]
    assert line.endswith(" NVIDIA T4, 16 GiB")
    assert "Worth knowing" not in result.stdout


def no_torch(environment: Environment) -> None:
    environment.remove_module("torch")


def torch_without_library(environment: Environment) -> None:
    environment.module("torch", "raise OSError('libcudart.so.13: cannot open shared object file')")


def torchvision_of_another_build(environment: Environment) -> None:
    environment.distribution("torchvision", "0.29.2+cu132")
    environment.module(
        "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')"
    )


def torchvision_without_cuda(environment: Environment) -> None:
    """Make operators fail for tensors on a GPU. A stub tensor is the name of its device."""
    torch = TORCH.replace("lambda: False", "lambda: True").replace("return data", "return device")
    environment.module("torch", torch)
    environment.module(
        "torchvision",
        "__version__ = '0.29.2+cpu'\n"
        "class ops:\n"
        "    def nms(boxes, scores, threshold):\n"
        "        if boxes == 'cuda': raise RuntimeError('torchvision::nms has no CUDA backend')",
    )


def no_detectron2(environment: Environment) -> None:
    environment.remove_module("detectron2")


def folder_named_detectron2(environment: Environment) -> None:
    """Add a clone of the repository next to the program, which Python imports as a package."""
    environment.remove_module("detectron2")
    (environment.folder / "detectron2").mkdir()


def detectron2_lacks_fvcore(environment: Environment) -> None:
    environment.module("detectron2/data", "import fvcore.common")


def detectron2_lacks_pillow(environment: Environment) -> None:
    environment.module("detectron2/data", "import PIL.Image")


def broken_detectron2(environment: Environment) -> None:
    environment.module("detectron2/data", "raise ImportError('cannot import name Mapping')")


def no_vovnet(environment: Environment) -> None:
    environment.remove_module("vovnet_d2")


def broken_vovnet(environment: Environment) -> None:
    environment.module("vovnet_d2", "raise ImportError('cannot import name VoVNet')")


@pytest.mark.parametrize(
    ("break_it", "cause", "remedy"),
    [
        (no_torch, "torch is not installed", doctor.INSTALL_PAIR),
        (torch_without_library, "libcudart.so.13", doctor.INSTALL_PAIR),
        (
            torchvision_of_another_build,
            "torchvision 0.29.2+cu132 does not work with torch 2.15.0+cpu",
            doctor.INSTALL_PAIR,
        ),
        (torchvision_without_cuda, "torchvision::nms has no CUDA backend", doctor.INSTALL_PAIR),
        (no_detectron2, "Detectron2 is not installed", doctor.INSTALL_DETECTRON2),
        (folder_named_detectron2, "Detectron2 is not installed", doctor.INSTALL_DETECTRON2),
        (detectron2_lacks_fvcore, "No module named 'fvcore'", f"{doctor.PIP} install fvcore"),
        (detectron2_lacks_pillow, "No module named 'PIL'", f"{doctor.PIP} install Pillow"),
        (broken_detectron2, "cannot import name Mapping", doctor.REINSTALL_DETECTRON2),
        (no_vovnet, "vovnet_d2 is not installed", f"{doctor.PIP} install -e {doctor.ROOT}"),
        (broken_vovnet, "cannot import name VoVNet", f"--no-deps -e {doctor.ROOT}"),
    ],
)
def test_faults_that_prevent_training(
    environment: Environment, break_it: Callable[[Environment], None], cause: str, remedy: str
) -> None:
    break_it(environment)
    result = environment.diagnose()
    assert result.returncode == 1, result.stdout + result.stderr
    _, problems = result.stdout.split("Prevents training")
    assert cause in problems
    assert remedy in problems
    assert problems.endswith("cannot train yet: see above.\n")


def setuptools_81(environment: Environment) -> None:
    environment.distribution("setuptools", "82.0.1")


def no_setuptools(environment: Environment) -> None:
    environment.remove_distribution("setuptools")


def no_omegaconf(environment: Environment) -> None:
    environment.remove_distribution("omegaconf")


def new_iopath(environment: Environment) -> None:
    environment.distribution("iopath", "0.1.10")


def new_omegaconf(environment: Environment) -> None:
    environment.distribution("omegaconf", "2.4.0.dev3")


def old_torch(environment: Environment) -> None:
    environment.distribution("torch", "2.5.1+cu121")


def two_opencvs(environment: Environment) -> None:
    environment.distribution("opencv-python", "5.0.0.93")


def opencv_without_libgl(environment: Environment) -> None:
    environment.remove_distribution("opencv-python-headless")
    environment.distribution("opencv-python", "5.0.0.93")
    environment.module(
        "cv2", "raise ImportError('libGL.so.1: cannot open shared object file: No such file')"
    )


def no_opencv(environment: Environment) -> None:
    environment.remove_distribution("opencv-python-headless")
    environment.remove_module("cv2")


def no_compiled_part(environment: Environment) -> None:
    environment.remove_module("detectron2/_C")


def compiled_for_another_torch(environment: Environment) -> None:
    environment.module("detectron2/_C", "raise ImportError('_C.so: undefined symbol: _ZN2at4_ops')")


def gpu_but_cpu_torch(environment: Environment) -> None:
    environment.program("nvidia-smi", "echo NVIDIA T4")


def gpu_but_old_driver(environment: Environment) -> None:
    environment.module("torch", TORCH.replace("cuda = None", "cuda = '13.2'"))
    environment.program("nvidia-smi", "echo NVIDIA T4")


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        (setuptools_81, "pkg_resources", "install 'setuptools<81"),
        (no_setuptools, "pkg_resources", "install 'setuptools<81"),
        (
            new_iopath,
            "and 0.1.10 is installed",
            "install 'iopath<0.1.10,>=0.1.7'",
        ),
        (new_omegaconf, "and 2.4.0.dev3 is installed", "install 'omegaconf<2.4,>=2.1'"),
        (no_omegaconf, "and none is installed", "install 'omegaconf<2.4,>=2.1'"),
        (old_torch, "and 2.5.1+cu121 is installed", "install 'torch>=2.6'"),
        (
            two_opencvs,
            "opencv-python-headless and opencv-python overwrite each other",
            "uninstall -y opencv-python-headless opencv-python && ",
        ),
        (opencv_without_libgl, "libGL.so.1", "install opencv-python-headless"),
        (no_opencv, "OpenCV is not installed", "install opencv-python-headless"),
        (no_compiled_part, "no rotated boxes", f"{doctor.REINSTALL_DETECTRON2} --source git"),
        (compiled_for_another_torch, "undefined symbol", "--source git"),
        (gpu_but_cpu_torch, "NVIDIA T4 is there, but this torch is built", doctor.INSTALL_PAIR),
        (gpu_but_old_driver, "driver is too old for CUDA 13.2", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_note_names_a_cause_and_its_remedy(
    environment: Environment, change: Callable[[Environment], None], cause: str, remedy: str
) -> None:
    change(environment)
    result = environment.diagnose()
    assert result.returncode == 0, result.stdout + result.stderr
    _, notes = result.stdout.split("Worth knowing")
    assert cause in notes
    assert remedy in notes
    assert notes.count("  - ") == 1


def test_an_empty_environment_is_diagnosed_to_the_end(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-S", str(DOCTOR)], env={}, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 1
    assert result.stderr == ""
    assert "torch is not installed" in result.stdout
    assert result.stdout.endswith("cannot train yet: see above.\n")


def test_an_old_python_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 4))
    assert doctor.main() == 1
    assert "needs 3.10 or newer" in capsys.readouterr().out


@pytest.mark.slow
def test_this_environment_can_train() -> None:
    result = subprocess.run([sys.executable, str(DOCTOR)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("torch", "torchvision", "detectron2"):
        assert importlib.metadata.version(name) in result.stdout
