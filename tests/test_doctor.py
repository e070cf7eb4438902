# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The doctor in environments that are broken in one way each.

They are made of stubs: a folder of modules and distributions that stands in for site-packages, and
an interpreter that sees nothing else.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import doctor
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_voc_instances
from packaging.requirements import Requirement
from packaging.version import Version

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
    """A stand-in for site-packages, healthy at first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "site-packages"
        self.data = folder / "datasets"
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
        for name, (bounds, _) in doctor.requirements().items():
            self.distribution(name, healthy_version(name + bounds))
        self.distribution("opencv-python-headless", "5.0.0")

    def module(self, name: str, source: str) -> None:
        module = self.folder / name
        module.mkdir(exist_ok=True)
        (module / "__init__.py").write_text(source)

    def remove_module(self, name: str) -> None:
        shutil.rmtree(self.folder / name)

    def distribution(self, name: str, version: str) -> None:
        self.remove_distribution(name)
        metadata = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")

    def remove_distribution(self, name: str) -> None:
        for metadata in self.folder.glob(f"{name.replace('-', '_')}-*.dist-info"):
            shutil.rmtree(metadata)

    def program(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def diagnose(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            # -S: without the site-packages that this test itself runs in.
            [sys.executable, "-S", str(DOCTOR)],
            env={
                "PATH": str(self.bin),
                "PYTHONPATH": str(self.folder),
                "DETECTRON2_DATASETS": str(self.data),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )


def healthy_version(requirement: str) -> str:
    """A version that packaging, the reference for such bounds, accepts."""
    candidates = {"0", "80"} | {bound.version for bound in Requirement(requirement).specifier}
    candidates |= {f"{bound.version}.1" for bound in Requirement(requirement).specifier}
    return max(filter(Requirement(requirement).specifier.contains, candidates), key=Version)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_nothing_to_say_of_a_healthy_environment(environment: Environment) -> None:
    result = environment.diagnose()
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("This environment can train.\n")
    assert "Prevents training" not in result.stdout
    assert "Worth knowing" not in result.stdout
    assert result.stderr == ""


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
    """Fails only with tensors on the GPU; the stubbed tensor is the name of its device."""
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
    """An unpacked clone of the repository beside the program, which Python takes for a package."""
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
def test_what_prevents_training(
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


def lvis_without_its_api(environment: Environment) -> None:
    for path in doctor.DATA_SETS["LVIS v1"].paths:
        (environment.data / path).parent.mkdir(parents=True, exist_ok=True)
        (environment.data / path).touch()


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        (setuptools_81, "pkg_resources", "install 'setuptools<81"),
        (no_setuptools, "pkg_resources", "install 'setuptools<81"),
        (new_iopath, "iopath 0.1.10 is not >=0.1.7,<0.1.10", "install 'iopath>=0.1.7,<0.1.10'"),
        (new_omegaconf, "omegaconf 2.4.0.dev3 is not", "install 'omegaconf>=2.1,<2.4'"),
        (old_torch, "torch 2.5.1+cu121 is not >=2.6", "install 'torch>=2.6'"),
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
        (lvis_without_its_api, "LVIS v1 is there; to evaluate", "install lvis"),
    ],
)
def test_what_is_worth_knowing(
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


def test_an_old_python_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 4))
    assert doctor.main() == 1
    assert "needs 3.10 or newer" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["0.1.10", "0.1.9", "0.1.5.post20221221", "2.10.0+cu130", "81"])
@pytest.mark.parametrize(
    "bounds", ["", ">=0.1.7,<0.1.10", ">=0.1.5,<0.1.6", ">=2.11", ">2.9", "<81", ">=81.0", "<=81.0"]
)
def test_bounds_mean_what_they_mean_to_pip(name: str, bounds: str) -> None:
    assert doctor.satisfies(name, bounds) == Requirement(f"x{bounds}").specifier.contains(name)


PATH_FIELDS = {
    *("image_root", "json_file", "panoptic_root", "panoptic_json", "sem_seg_root"),
    *("image_dir", "gt_dir"),
}


@pytest.mark.parametrize(
    ("name", "registered"),
    [
        ("COCO 2017", ("coco_2017_train", "coco_2017_val")),
        (
            "COCO 2017 panoptic",
            ("coco_2017_train_panoptic_separated", "coco_2017_val_panoptic_separated"),
        ),
        ("LVIS v1", ("lvis_v1_train", "lvis_v1_val")),
        ("Cityscapes", ("cityscapes_fine_instance_seg_train", "cityscapes_fine_sem_seg_val")),
    ],
)
def test_data_sets_lie_where_detectron2_looks(name: str, registered: tuple[str, ...]) -> None:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    looked_at = set()
    for entry in registered:
        assert entry in DatasetCatalog
        fields = MetadataCatalog.get(entry).as_dict()
        paths = {Path(fields[key]).relative_to(root) for key in PATH_FIELDS & fields.keys()}
        looked_at |= paths | {parent for path in paths for parent in path.parents}
    assert {Path(path) for path in doctor.DATA_SETS[name].paths} <= looked_at


@pytest.mark.parametrize("name", ["PASCAL VOC 2007", "PASCAL VOC 2012"])
def test_voc_lies_where_detectron2_looks(name: str, tmp_path: Path) -> None:
    annotations, image_sets, images = (tmp_path / path for path in doctor.DATA_SETS[name].paths)
    annotations.mkdir(parents=True)
    for image in ("1", "2"):
        (annotations / f"{image}.xml").write_text(
            "<annotation><size><width>4</width><height>3</height></size></annotation>"
        )
    (image_sets / "Main").mkdir(parents=True)
    (image_sets / "Main" / "val.txt").write_text("1\n2\n")
    registered = MetadataCatalog.get(f"voc_{name[-4:]}_val").dirname
    records = load_voc_instances(str(tmp_path / Path(registered).name), "val", ())
    files = [Path(record["file_name"]) for record in records]
    assert files == [images / "1.jpg", images / "2.jpg"]


def test_data_sets_are_told_apart(environment: Environment) -> None:
    coco = doctor.DATA_SETS["COCO 2017"].paths
    for path in doctor.DATA_SETS["PASCAL VOC 2007"].paths + coco[:2]:
        (environment.data / path).mkdir(parents=True)
    rows = [line.split("  ") for line in environment.diagnose().stdout.splitlines()]
    state = {row[1]: row[-1].strip() for row in rows if len(row) > 2}
    assert state["PASCAL VOC 2007"] == "there"
    assert state["COCO 2017"] == f"not complete, lacks {', '.join(coco[2:])}"
    assert state["PASCAL VOC 2012"] == "not there"
    assert state["digits"] == "built on demand"


def test_this_environment_can_train() -> None:
    result = subprocess.run([sys.executable, str(DOCTOR)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("torch", "torchvision", "detectron2", "fvcore", "numpy", "pycocotools", "timm"):
        assert importlib.metadata.version(name) in result.stdout
