#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Say what is installed, what is missing or does not fit together, and which command fixes it.

Exit status 0 where a detector can be trained, else 1. Nothing but the standard library is imported
at module level, and the syntax is that of Python 3.8: this file has to run where all else fails.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

MIN_PYTHON = (3, 10)
ROOT = Path(__file__).resolve().parents[1]
PYTHON = shlex.quote(sys.executable)
PIP = f"{PYTHON} -m pip"
INSTALL_PAIR = f"{PIP} install --force-reinstall torch torchvision"
INSTALLER = Path(__file__).resolve().with_name("install_detectron2.py")
INSTALL_DETECTRON2 = f"{PYTHON} {shlex.quote(str(INSTALLER))}"
# In an installed wheel, this folder has another name.
OURS = f"-e {shlex.quote(str(ROOT))}" if INSTALLER.parent.name == "tools" else "vovnet_d2-*.whl"
REINSTALL_DETECTRON2 = f"{PIP} uninstall -y detectron2 && {INSTALL_DETECTRON2}"

TRAINING_MODULES = ("engine", "data", "modeling", "evaluation", "checkpoint")
# Modules whose distributions have other names.
DISTRIBUTION_OF = {"PIL": "Pillow", "yaml": "PyYAML", "hydra": "hydra-core"}
# They all hold the one module cv2, so one stands in for another and two overwrite each other.
OPENCV_WHEELS = (
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python-headless",
    "opencv-contrib-python",
)


class Report:
    """Prints what is found at once, and the problems with their remedies at the end."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []
        self.notes: list[tuple[str, str]] = []

    def row(self, name: str, value: str) -> None:
        print(f"  {name:<26} {value}", flush=True)

    def problem(self, what: str, remedy: str) -> None:
        """Add a fault that makes training impossible."""
        self.problems.append((what, remedy))

    def note(self, what: str, remedy: str) -> None:
        """Add a fault that costs a feature or speed, or that causes trouble later."""
        self.notes.append((what, remedy))

    def conclude(self) -> int:
        for title, entries in (("Prevents training", self.problems), ("Worth knowing", self.notes)):
            if entries:
                print(f"\n{title}")
            for what, remedy in entries:
                print(f"  - {what}\n      {remedy}")
        verdict = "cannot train yet: see above" if self.problems else "can train"
        print(f"\nThis environment {verdict}.")
        return 1 if self.problems else 0


def main() -> int:
    if sys.version_info < MIN_PYTHON:
        print(
            f"This is Python {platform.python_version()} ({sys.executable}); "
            f"vovnet_d2 needs {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer:\n"
            f"      make setup PYTHON=python{MIN_PYTHON[0]}.{MIN_PYTHON[1]}"
        )
        return 1
    warnings.simplefilter("ignore")
    report = Report()
    report.row("Python", f"{platform.python_version()} ({sys.executable})")
    report.row("platform", f"{platform.platform()}, {os.cpu_count()} cores")
    torch = check_torch(report)
    check_opencv(report)
    # Both import torch: without it, their errors would only repeat its own.
    if torch is not None and check_detectron2(report, torch):
        check_vovnet(report)
    check_versions(report)
    return report.conclude()


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_there(module: str) -> bool:
    """Return whether a module can be found. A mere folder of that name, a namespace, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def last_line(error: BaseException) -> str:
    """Say an error in one line; long ones, such as a linker's, have what matters at the end."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}".rstrip(": .")


def check_torch(report: Report) -> ModuleType | None:
    """Return torch where it can be imported and torchvision's operators work with it."""
    for name in ("torch", "torchvision"):
        if not is_there(name):
            report.row(name, "missing")
            report.problem(f"{name} is not installed.", INSTALL_PAIR)
            return None
    try:
        import torch
    except Exception as error:
        report.row("torch", "cannot be imported")
        report.problem(f"torch cannot be imported ({last_line(error)}).", INSTALL_PAIR)
        return None
    report.row("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}")
    try:
        import torchvision

        # One compiled operator on each kind of device that training would use.
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
            torchvision.ops.nms(boxes, torch.tensor([1.0], device=device), 0.5)
    except Exception as error:
        version = installed_version("torchvision")
        report.row("torchvision", "its operators do not work")
        report.problem(
            f"torchvision {version} does not work with torch {torch.__version__} "
            f"({last_line(error)}): both must come from the same index, as a matching pair.",
            INSTALL_PAIR,
        )
        return None
    report.row("torchvision", torchvision.__version__)
    check_gpus(report, torch)
    return torch


def check_gpus(report: Report, torch: ModuleType) -> None:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            report.row(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
        return
    report.row("GPU", "none that torch can use; training runs on the CPU")
    gpus = nvidia_gpus()
    if gpus and torch.version.cuda is None:
        report.note(f"{gpus} is there, but this torch is built without CUDA.", INSTALL_PAIR)
    elif gpus:
        report.note(
            f"{gpus} is there, but torch cannot use it: the driver is too old for CUDA "
            f"{torch.version.cuda}, or CUDA_VISIBLE_DEVICES hides it.",
            f"unset CUDA_VISIBLE_DEVICES && {PYTHON} -c 'import torch; torch.cuda.init()'",
        )


def nvidia_gpus() -> str:
    """List what the driver knows, whether or not torch can use it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(answer.stdout.split("\n")).strip(", ") if answer.returncode == 0 else ""


def check_opencv(report: Report) -> None:
    wheels = [name for name in OPENCV_WHEELS if installed_version(name)]
    mend = f"{PIP} uninstall -y {' '.join(wheels)} && {PIP} install opencv-python-headless"
    if not is_there("cv2"):
        report.row("OpenCV", "missing")
        report.note(
            "OpenCV is not installed: no pictures of predictions.",
            f"{PIP} install opencv-python-headless",
        )
        return
    if len(wheels) > 1:
        report.note(f"{' and '.join(wheels)} overwrite each other's files: keep one.", mend)
    try:
        import cv2

        report.row("OpenCV", f"{cv2.__version__}, {' and '.join(wheels)}")
    except Exception as error:
        report.row("OpenCV", "cannot be imported")
        report.note(
            f"OpenCV cannot be imported ({last_line(error)}): opencv-python needs a desktop's "
            "libraries (libgl1, libglib2.0-0), the headless wheel does not.",
            mend,
        )


def check_detectron2(report: Report, torch: ModuleType) -> bool:
    """Return whether all of Detectron2 that training uses can be imported."""
    if not is_there("detectron2"):
        report.row("detectron2", "missing")
        report.problem("Detectron2 is not installed.", INSTALL_DETECTRON2)
        return False
    try:
        detectron2 = importlib.import_module("detectron2")
        for name in TRAINING_MODULES:
            importlib.import_module(f"detectron2.{name}")
    except Exception as error:
        report.row("detectron2", "cannot be imported")
        package = (getattr(error, "name", None) or "").partition(".")[0]
        remedy = REINSTALL_DETECTRON2
        if isinstance(error, ModuleNotFoundError) and package not in ("", "detectron2"):
            remedy = f"{PIP} install {DISTRIBUTION_OF.get(package, package)}"
        report.problem(f"Detectron2 cannot be imported ({last_line(error)}).", remedy)
        return False
    report.row("detectron2", f"{detectron2.__version__}, {origin('detectron2')}")
    check_compiled_part(report, torch)
    return True


def check_compiled_part(report: Report, torch: ModuleType) -> None:
    rebuild = f"{REINSTALL_DETECTRON2} --source git"
    state = "there"
    if not is_there("detectron2._C"):
        state = "not there"
    else:
        try:
            compiled = importlib.import_module("detectron2._C")
        except Exception as error:
            state = f"does not load ({last_line(error)})"
        else:
            if torch.cuda.is_available() and not compiled.has_cuda():
                state = "built without CUDA"
    report.row("detectron2._C", state)
    if state != "there":
        report.note(
            f"Detectron2's compiled part is {state}: no deformable convolution of Detectron2's "
            "own, no rotated boxes, and COCO evaluation in Python. RoIAlign and NMS are "
            "torchvision's. A build needs git, a C++ compiler and, for CUDA, nvcc in CUDA_HOME.",
            rebuild,
        )


def origin(name: str) -> str:
    """Say where pip got a package from."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed by pip"
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "install_detectron2" in (distribution.read_text("WHEEL") or ""):
        return "Python files from PyPI by tools/install_detectron2.py"
    if source:
        commit = source.get("vcs_info", {}).get("commit_id", "")[:8]
        return f"from {source['url']}" + (f" at {commit}" if commit else "")
    return f"from the wheel of version {distribution.version}"


def check_vovnet(report: Report) -> None:
    if not is_there("vovnet_d2"):
        report.row("vovnet_d2", "missing")
        report.problem("vovnet_d2 is not installed.", f"{PIP} install {OURS}")
        return
    try:
        package = importlib.import_module("vovnet_d2")
    except Exception as error:
        report.row("vovnet_d2", "cannot be imported")
        report.problem(
            f"vovnet_d2 cannot be imported ({last_line(error)}).",
            f"{PIP} install --force-reinstall --no-deps {OURS}",
        )
        return
    report.row("vovnet_d2", f"{package.__version__} in {package.__path__[0]}")


def check_versions(report: Report) -> None:
    """Compare what vovnet_d2 and Detectron2 require with what is installed."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        report.note(
            "packaging is not installed: versions are not compared.", f"{PIP} install packaging"
        )
        return
    for package in ("vovnet_d2", "detectron2"):
        if installed_version(package) is None:
            continue
        for text in importlib.metadata.requires(package) or ():
            required = Requirement(text)
            if required.marker and not required.marker.evaluate({"extra": ""}):
                continue
            version = installed_version(required.name)
            if version is None or not required.specifier.contains(version, prereleases=True):
                wanted = required.name + str(required.specifier)
                # detectron2.model_zoo imports pkg_resources, which setuptools 81 dropped.
                why = " for its pkg_resources" if required.name == "setuptools" else ""
                report.note(
                    f"{package} requires {wanted}{why}, and {version or 'none'} is installed.",
                    f"{PIP} install {shlex.quote(wanted)}",
                )


if __name__ == "__main__":
    sys.exit(main())
