# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Say what is installed, what is missing or does not fit together, and which command mends it.

Exit status 0 where a detector can be trained, else 1. Nothing but the standard library is imported
at module level, and the syntax is that of Python 3.8: this file has to run where all else fails.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import operator
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

MIN_PYTHON = (3, 10)
LIST = re.compile(r"^([\w-]+) = (\[[^{}]*?\])$", flags=re.MULTILINE)  # of strings, in TOML
ROOT = Path(__file__).resolve().parents[1]
PYTHON = shlex.quote(sys.executable)
PIP = f"{PYTHON} -m pip"
INSTALL_PAIR = f"{PIP} install --force-reinstall torch torchvision"
INSTALL_DETECTRON2 = f"{PYTHON} {shlex.quote(str(ROOT / 'tools/install_detectron2.py'))}"
REINSTALL_DETECTRON2 = f"{PIP} uninstall -y detectron2 && {INSTALL_DETECTRON2}"

TRAINING_MODULES = ("engine", "data", "modeling", "evaluation", "checkpoint")
# Where a module's name is not the distribution's.
DISTRIBUTION_OF = {"PIL": "Pillow", "yaml": "PyYAML", "hydra": "hydra-core"}
# They all hold the one module cv2, so one stands in for another and two overwrite each other.
OPENCV_WHEELS = (
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python-headless",
    "opencv-contrib-python",
)


class DataSet(NamedTuple):
    paths: tuple[str, ...]  # below DETECTRON2_DATASETS, as Detectron2 registers them
    evaluator: str = ""  # the module that evaluation needs beyond Detectron2's requirements
    requirement: str = ""  # what pip installs it from


def _coco(split: str) -> tuple[str, ...]:
    return f"coco/{split}2017", f"coco/annotations/instances_{split}2017.json"


def _coco_panoptic(split: str) -> tuple[str, ...]:
    return (
        f"coco/annotations/panoptic_{split}2017.json",
        f"coco/panoptic_{split}2017",
        f"coco/panoptic_stuff_{split}2017",
    )


def _voc(year: int) -> tuple[str, ...]:
    return tuple(f"VOC{year}/{folder}" for folder in ("Annotations", "ImageSets", "JPEGImages"))


DATA_SETS = {
    "digits": DataSet(
        (
            "vovnet_d2_digits/annotations/instances_train.json",
            "vovnet_d2_digits/annotations/instances_val.json",
            "vovnet_d2_digits/train",
            "vovnet_d2_digits/val",
        )
    ),
    "COCO 2017": DataSet(_coco("train") + _coco("val")),
    "COCO 2017 panoptic": DataSet(
        _coco_panoptic("train") + _coco_panoptic("val"),
        "panopticapi",
        "git+https://github.com/cocodataset/panopticapi.git",
    ),
    "PASCAL VOC 2007": DataSet(_voc(2007)),
    "PASCAL VOC 2012": DataSet(_voc(2012)),
    "LVIS v1": DataSet(("lvis/lvis_v1_train.json", "lvis/lvis_v1_val.json"), "lvis", "lvis"),
    "Cityscapes": DataSet(
        ("cityscapes/leftImg8bit", "cityscapes/gtFine"), "cityscapesscripts", "cityscapesscripts"
    ),
}


class Report:
    """Prints what is found at once, and the problems with their remedies at the end."""

    def __init__(self) -> None:
        self.fatal: list[tuple[str, str]] = []
        self.notes: list[tuple[str, str]] = []

    def section(self, title: str) -> None:
        print(f"\n{title}")

    def row(self, name: str, value: str) -> None:
        print(f"  {name:<26} {value}", flush=True)

    def problem(self, what: str, remedy: str) -> None:
        """Something without which training is impossible."""
        self.fatal.append((what, remedy))

    def note(self, what: str, remedy: str) -> None:
        """Something that costs a feature, speed, or trouble later."""
        self.notes.append((what, remedy))

    def conclude(self) -> int:
        for title, entries in (
            ("Prevents training", self.fatal),
            ("Worth knowing", self.notes),
        ):
            if entries:
                self.section(title)
                for what, remedy in entries:
                    print(f"  - {what}\n      {remedy}")
        verdict = "cannot train yet: see above" if self.fatal else "can train"
        print(f"\nThis environment {verdict}.")
        return 1 if self.fatal else 0


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
    report.section("System")
    report.row("Python", f"{platform.python_version()} ({sys.executable})")
    report.row("platform", platform.platform())
    check_packages(report)
    torch = check_torch(report)
    check_opencv(report)
    # Both import torch: without it, their errors would only repeat its own.
    if torch is not None:
        check_devices(report, torch)
        if check_detectron2(report, torch):
            check_vovnet(report)
    check_data_sets(report)
    return report.conclude()


# Packages ----------------------------------------------------------------------------------------


def check_packages(report: Report) -> None:
    """Versions of all that the project and Detectron2 require, held against their bounds."""
    report.section("Packages")
    missing: dict[str, list[str]] = {}
    for name, (bounds, askers) in sorted(requirements().items(), key=lambda item: item[0].lower()):
        version = installed_version(name)
        report.row(name, version or "missing")
        if version is None:
            missing.setdefault(askers, []).append(name + bounds)
        elif not satisfies(version, bounds):
            report.note(
                f"{name} {version} is not {bounds}, as needed by {askers}{reason(name)}.",
                f"{PIP} install {shlex.quote(name + bounds)}",
            )
    for askers, listed in missing.items():
        names = [split_requirement(requirement)[0] for requirement in listed]
        report.note(
            f"Missing for {askers}: {', '.join(names)}{''.join(map(reason, names))}.",
            f"{PIP} install {' '.join(map(shlex.quote, listed))}",
        )


def reason(name: str) -> str:
    if name == "setuptools":
        return " (detectron2.model_zoo imports pkg_resources, which setuptools 81 dropped)"
    return ""


def requirements() -> dict[str, tuple[str, str]]:
    """What should be installed: name -> (bounds of all who ask for it, who they are)."""
    from install_detectron2 import REQUIREMENTS

    dependencies, extras = project_requirements()
    asked = {"vovnet_d2": dependencies, "Detectron2": REQUIREMENTS}
    for extra, listed in extras.items():
        asked[f"vovnet_d2[{extra}]"] = listed

    bounds_of: dict[str, list[str]] = {}
    askers_of: dict[str, list[str]] = {}
    for asker, listed in asked.items():
        for name, bounds in map(split_requirement, listed):
            if name == "vovnet_d2" or name in OPENCV_WHEELS:
                continue  # they have checks of their own
            bounds_of.setdefault(name, []).extend(filter(None, bounds.split(",")))
            askers_of.setdefault(name, []).append(asker)
    return {
        name: (",".join(dict.fromkeys(bounds)), " and ".join(askers_of[name]))
        for name, bounds in bounds_of.items()
    }


def project_requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Return the dependencies of pyproject.toml, and those of its extras.

    Python 3.10 reads no TOML; but lists of strings are written as Python's are.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    sections = re.split(r"^\[(.+)\]$", text, flags=re.MULTILINE)
    tables = {
        section: {name: ast.literal_eval(value) for name, value in LIST.findall(body)}
        for section, body in zip(sections[1::2], sections[2::2], strict=True)
        if section.startswith("project")
    }
    return tables["project"]["dependencies"], tables["project.optional-dependencies"]


def split_requirement(requirement: str) -> tuple[str, str]:
    """``"omegaconf>=2.1,<2.4"`` -> ``("omegaconf", ">=2.1,<2.4")``; extras are dropped."""
    return re.split(r"[<>=[]", requirement)[0], re.sub(r"^[^<>=]*", "", requirement)


def satisfies(version: str, bounds: str) -> bool:
    compare = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
    for bound in filter(None, bounds.split(",")):
        limit = bound.lstrip("<>=")
        if not compare[bound[: -len(limit)]](release(version), release(limit)):
            return False
    return True


def release(version: str) -> tuple[int, ...]:
    """The leading numbers, without zeros at the end: 2.10.0+cu130 -> (2, 10)."""
    leading = re.split(r"[^\d.]", version)[0]
    numbers = [int(number) for number in leading.split(".") if number]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_there(module: str) -> bool:
    """Whether a module can be found; a mere folder of that name, a namespace, does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def last_line(error: BaseException) -> str:
    """An exception in one line; long ones, such as a linker's, have what matters at the end."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}".rstrip(": .")


# torch and torchvision ---------------------------------------------------------------------------


def check_torch(report: Report) -> ModuleType | None:
    """Returns torch where it can be imported and torchvision's operators work with it."""
    report.section("torch")
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
    report.row("torch", torch.__version__)
    report.row("CUDA that it is built for", torch.version.cuda or "none")
    report.row("cuDNN", str(torch.backends.cudnn.version() or "none"))
    try:
        import torchvision

        report.row("torchvision", torchvision.__version__)
        run_nms(torch, torchvision)
    except Exception as error:
        version = installed_version("torchvision")
        report.row("torchvision operators", "do not work")
        report.problem(
            f"torchvision {version} does not work with torch {torch.__version__} "
            f"({last_line(error)}): both must come from the same index, as a matching pair.",
            INSTALL_PAIR,
        )
        return None
    report.row("torchvision operators", "work")
    return torch


def run_nms(torch: ModuleType, torchvision: ModuleType) -> None:
    """Runs one compiled operator on each kind of device that training would use."""
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
        torchvision.ops.nms(boxes, torch.tensor([1.0], device=device), 0.5)


# Devices -----------------------------------------------------------------------------------------


def check_devices(report: Report, torch: ModuleType) -> None:
    report.section("Devices")
    report.row("CPU", f"{os.cpu_count()} cores, {cpu_bfloat16()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bfloat16 = "with" if properties.major >= 8 else "without"
            report.row(
                f"GPU {index}",
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
                f"{properties.major}.{properties.minor}, {bfloat16} bfloat16",
            )
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


def cpu_bfloat16() -> str:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return f"{platform.machine()}, bfloat16 support unknown"
    found = sorted(flags & {"amx_bf16", "avx512_bf16", "bf16", "svebf16"})
    if found:
        return f"{platform.machine()}, bfloat16 in hardware ({', '.join(found)})"
    return f"{platform.machine()}, no bfloat16 in hardware (mixed precision would be slower)"


def nvidia_gpus() -> str:
    """What the driver lists, whether or not torch can use it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(answer.stdout.split("\n")).strip(", ") if answer.returncode == 0 else ""


# OpenCV ------------------------------------------------------------------------------------------


def check_opencv(report: Report) -> None:
    report.section("OpenCV")
    wheels = [name for name in OPENCV_WHEELS if installed_version(name)]
    mend = f"{PIP} uninstall -y {' '.join(wheels)} && {PIP} install opencv-python-headless"
    for name in wheels:
        report.row(name, str(installed_version(name)))
    if not is_there("cv2"):
        report.row("cv2", "missing")
        report.note(
            "OpenCV is not installed: no pictures of predictions.",
            f"{PIP} install opencv-python-headless",
        )
        return
    if len(wheels) > 1:
        report.note(f"{' and '.join(wheels)} overwrite each other's files: keep one.", mend)
    try:
        import cv2

        report.row("cv2", cv2.__version__)
    except Exception as error:
        report.row("cv2", "cannot be imported")
        report.note(
            f"OpenCV cannot be imported ({last_line(error)}): opencv-python needs a desktop's "
            "libraries (libgl1, libglib2.0-0), the headless wheel does not.",
            mend,
        )


# Detectron2 and vovnet_d2 ------------------------------------------------------------------------


def check_detectron2(report: Report, torch: ModuleType) -> bool:
    """Whether all of Detectron2 that training uses can be imported."""
    report.section("Detectron2")
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
        report.problem(
            f"Detectron2 cannot be imported ({last_line(error)}).", detectron2_remedy(error)
        )
        return False
    report.row("detectron2", f"{detectron2.__version__}, {origin('detectron2')}")
    report.row("detectron2._C", compiled_part(report, torch))
    return True


def detectron2_remedy(error: Exception) -> str:
    module = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    package = module.partition(".")[0]
    if package in ("", "detectron2"):
        return REINSTALL_DETECTRON2
    return f"{PIP} install {DISTRIBUTION_OF.get(package, package)}"


def compiled_part(report: Report, torch: ModuleType) -> str:
    rebuild = f"{REINSTALL_DETECTRON2} --source git"
    lacks = (
        "no deformable convolution of Detectron2's own, no rotated boxes, and COCO evaluation in "
        "Python rather than C++; RoIAlign and NMS are torchvision's"
    )
    if not is_there("detectron2._C"):
        report.note(
            f"Detectron2 is here without its compiled part: {lacks}. "
            "To build it takes a C++ compiler and upstream's repository.",
            rebuild,
        )
        return "not there"
    try:
        compiled = importlib.import_module("detectron2._C")
    except Exception as error:
        report.note(
            f"detectron2._C does not load ({last_line(error)}), as when it was built for another "
            f"torch: {lacks}.",
            rebuild,
        )
        return "does not load"
    if torch.cuda.is_available() and not compiled.has_cuda():
        report.note(
            "detectron2._C was built without CUDA: its operators run on the CPU only. "
            "To build it with CUDA takes nvcc of torch's CUDA version, in CUDA_HOME.",
            rebuild,
        )
        return "there, without CUDA"
    return "there"


def origin(name: str) -> str:
    """Where pip got a package from."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed by pip"
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "vcs_info" in source:
        return f"built from {source['url']} at {source['vcs_info']['commit_id'][:8]}"
    if "dir_info" in source:
        kind = "editable from" if source["dir_info"].get("editable") else "built from"
        return f"{kind} {source['url']}"
    if "install_detectron2" in (distribution.read_text("WHEEL") or ""):
        return "Python files from PyPI by tools/install_detectron2.py"
    return f"from the wheel of version {distribution.version}"


def check_vovnet(report: Report) -> None:
    report.section("vovnet_d2")
    if not is_there("vovnet_d2"):
        report.row("vovnet_d2", "missing")
        report.problem("vovnet_d2 is not installed.", f"{PIP} install -e {shlex.quote(str(ROOT))}")
        return
    try:
        package = importlib.import_module("vovnet_d2")
    except Exception as error:
        report.row("vovnet_d2", "cannot be imported")
        report.problem(
            f"vovnet_d2 cannot be imported ({last_line(error)}).",
            f"{PIP} install --force-reinstall --no-deps -e {shlex.quote(str(ROOT))}",
        )
        return
    report.row("vovnet_d2", f"{package.__version__} in {package.__path__[0]}")


# Data sets ---------------------------------------------------------------------------------------


def check_data_sets(report: Report) -> None:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    report.section(f"Data sets in {root.resolve()} (DETECTRON2_DATASETS)")
    for name, data_set in DATA_SETS.items():
        lacking = [path for path in data_set.paths if not (root / path).exists()]
        if len(lacking) == len(data_set.paths):
            report.row(name, "built on demand" if name == "digits" else "not there")
        elif lacking:
            report.row(name, f"not complete, lacks {', '.join(lacking)}")
        else:
            report.row(name, "there")
            if data_set.evaluator and not is_there(data_set.evaluator):
                report.note(
                    f"{name} is there; to evaluate on it takes {data_set.evaluator}.",
                    f"{PIP} install {data_set.requirement}",
                )


if __name__ == "__main__":
    sys.exit(main())
