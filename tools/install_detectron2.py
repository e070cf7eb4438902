# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Install Detectron2, which is not on PyPI, from wherever it can be had.

A Detectron2 that is already there is kept. Otherwise there are three ways, which are tried in this
order:

1. git: upstream's repository at a pinned commit is built. This needs git and a C++ compiler.
2. wheel: a prebuilt wheel is taken that fits the installed torch, its CUDA and this Python. Others
   build such wheels from upstream's commits: https://github.com/MiroPsota/torch_packages_builder
3. pypi: the wheel of LabGym carries Detectron2's Python files, with another import prefix.
   Only these files (Apache-2.0) are taken; the rest of that wheel is GPL-3.0 and is neither
   installed nor imported. This way lacks the compiled ``detectron2._C``: deformable convolution,
   rotated boxes and the fast COCO evaluation.

The script needs nothing but the standard library and pip.
"""

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

UPSTREAM_URL = "https://github.com/facebookresearch/detectron2.git"
UPSTREAM_COMMIT = "02b5c4e2"
REACH_TIMEOUT = 10  # seconds

WHEEL_INDEX = "https://miropsota.github.io/torch_packages_builder"

LABGYM_REQUIREMENT = "labgym==3.1.2"
LABGYM_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
LABGYM_FOLDER = "LabGym/detectron2/"

VERSION = "0.6"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
# detectron2.model_zoo imports pkg_resources, which setuptools 81 dropped.
SETUPTOOLS = "setuptools<81"
REQUIREMENTS = (
    "iopath>=0.1.7,<0.1.10",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "fvcore>=0.1.5,<0.1.6",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "matplotlib",
    "Pillow>=7.1",
    "packaging",
    "black",
    SETUPTOOLS,
)
PROVENANCE = (
    f"Detectron2's Python files as {LABGYM_REQUIREMENT} on PyPI carries them under "
    f"{LABGYM_FOLDER.rstrip('/')}, the import prefix LabGym.detectron2 renamed back to detectron2, "
    "which makes them upstream's files of January 2024 again; without the compiled detectron2._C. "
    "Nothing else of LabGym is contained."
)


class InstallError(Exception):
    """A failure: its message says in one sentence what went wrong and the way out."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"{reason}: {way_out}.")
        self.reason = reason


REQUIREMENTS_FAILED = InstallError(
    "pip could not install Detectron2's requirements", "read its lines above"
)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print(install(args.source, args.wheel_dir, args.find_links))
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Install Detectron2. One that is already installed is kept."
    )
    parser.add_argument(
        "--source",
        choices=("auto", *WAYS),
        default="auto",
        help="git: build upstream's pinned commit; wheel: take a prebuilt wheel that fits torch; "
        "pypi: take the Python files alone, without compiled operators; auto: the first of these "
        "three that works (default: %(default)s)",
    )
    parser.add_argument(
        "--wheel-dir",
        type=Path,
        metavar="DIR",
        help="write the wheel into DIR, for another machine, instead of installing it",
    )
    parser.add_argument(
        "--find-links",
        metavar="URL",
        help="look for prebuilt wheels in this folder or page, such as a mirror's, instead of "
        f"{WHEEL_INDEX}",
    )
    return parser.parse_args(argv)


def install(source: str, wheel_dir: Path | None = None, find_links: str | None = None) -> str:
    """Do what the command line asks and return the sentence that says what happened."""
    if wheel_dir is None and (found := find_detectron2()):
        return f"Kept the Detectron2 that is already installed in {found}."
    if importlib.util.find_spec("pip") is None:
        raise InstallError(f"{sys.executable} has no pip", f"run '{sys.executable} -m ensurepip'")
    if source != "auto":
        return WAYS[source](wheel_dir, find_links)
    *ways, last = WAYS.items()
    for name, way in ways:
        try:
            return way(wheel_dir, find_links)
        except InstallError as error:
            say(f"Way '{name}' does not work here: {error.reason}.")
    return last[1](wheel_dir, find_links)


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def find_detectron2() -> str | None:
    """Return the folder of the installed package. A mere folder of that name (no ``__init__``) does
    not count.
    """
    spec = importlib.util.find_spec("detectron2")
    return str(Path(spec.origin).parent) if spec and spec.origin else None


# Upstream's repository ---------------------------------------------------------------------------


def from_git(wheel_dir: Path | None, find_links: str | None) -> str:
    check_git_way()
    say(f"Building Detectron2 from upstream's commit {UPSTREAM_COMMIT}, some two minutes ...")
    failure = InstallError(
        f"building upstream's commit {UPSTREAM_COMMIT} failed",
        "read pip's lines above, or use --source pypi",
    )
    source = f"git+{UPSTREAM_URL}@{UPSTREAM_COMMIT}"
    # Its setup.py imports torch, hence no build isolation, hence setuptools and wheel beforehand.
    run_pip("install", SETUPTOOLS, "wheel", failure=failure)
    if wheel_dir is None:
        run_pip("install", "--no-build-isolation", source, failure=failure)
        return f"Installed Detectron2 {VERSION} from upstream's commit {UPSTREAM_COMMIT}."
    run_pip("wheel", "--no-deps", "--no-build-isolation", f"-w{wheel_dir}", source, failure=failure)
    return f"Wrote the wheel of upstream's commit {UPSTREAM_COMMIT} into {wheel_dir}."


def check_git_way() -> None:
    """Raises InstallError where upstream cannot be built, before anything is downloaded."""
    if importlib.util.find_spec("torch") is None:
        raise InstallError(
            "building Detectron2 needs torch",
            "run 'pip install torch torchvision' first, or use --source pypi",
        )
    if shutil.which("git") is None:
        raise InstallError("git is not installed", "install it, or use --source pypi")
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        raise InstallError(
            "no C++ compiler was found", "install g++ or set CXX, or use --source pypi"
        )
    if not is_upstream_reachable():
        raise InstallError(
            f"{UPSTREAM_URL} cannot be reached",
            "check the network or proxy, or use --source pypi",
        )


def is_upstream_reachable() -> bool:
    try:
        answer = subprocess.run(
            ["git", "ls-remote", "--exit-code", UPSTREAM_URL, "HEAD"],
            env=os.environ | {"GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=REACH_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0


# Prebuilt wheels ---------------------------------------------------------------------------------


def from_wheel(wheel_dir: Path | None, find_links: str | None) -> str:
    build = torch_build()
    place = find_links or WHEEL_INDEX
    say(f"Looking for a prebuilt wheel for {build} in {place} ...")
    options = ["--no-index", f"--find-links={place}"] if find_links else [f"--index-url={place}"]
    fitting = [version for version in offered_versions(options) if version.endswith(build)]
    if not fitting:
        raise InstallError(
            f"no wheel of Detectron2 for {build} and this Python was found in {place}",
            "use --source git or --source pypi, or name another place by --find-links",
        )
    wheel = f"detectron2=={fitting[0]}"
    failure = InstallError(
        f"{wheel} could not be installed", "read pip's lines above, or use --source pypi"
    )
    if wheel_dir is not None:
        run_pip("download", "--no-deps", *options, f"--dest={wheel_dir}", wheel, failure=failure)
        return f"Wrote the prebuilt wheel {wheel} into {wheel_dir}."
    # Its requirements come from pip's own index: nothing but the wheel is taken from there.
    run_pip("install", "--no-deps", *options, wheel, failure=failure)
    run_pip("install", *REQUIREMENTS, failure=REQUIREMENTS_FAILED)
    return f"Installed the prebuilt wheel {wheel}."


def torch_build() -> str:
    """Return the end of the version of a wheel that fits the installed torch: pt2.9.1cu128."""
    try:
        import torch
    except ImportError as error:
        raise InstallError(
            "prebuilt wheels fit one version of torch each, and there is none",
            "run 'pip install torch torchvision' first, or use --source pypi",
        ) from error
    cuda = torch.version.cuda
    return f"pt{torch.__version__.partition('+')[0]}" + (
        "cpu" if cuda is None else f"cu{cuda.replace('.', '')}"
    )


def offered_versions(options: list[str]) -> list[str]:
    """Return the versions that have a wheel for this Python and system, the newest first."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions"]
    limits = ["--retries=1", f"--timeout={REACH_TIMEOUT}"]
    answer = subprocess.run(
        [*command, "detectron2", *limits, *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    line = re.search(r"^Available versions: (.*)", answer.stdout, flags=re.MULTILINE)
    return line[1].split(", ") if line else []


# PyPI --------------------------------------------------------------------------------------------


def from_pypi(wheel_dir: Path | None, find_links: str | None) -> str:
    say(f"Taking Detectron2's Python files out of {LABGYM_REQUIREMENT} ...")
    with tempfile.TemporaryDirectory() as scratch:
        labgym = download_labgym(Path(scratch))
        wheel = build_wheel(labgym, wheel_dir or Path(scratch))
        if wheel_dir is None:
            run_pip("install", str(wheel), failure=REQUIREMENTS_FAILED)
    if wheel_dir is None:
        return f"Installed Detectron2 {VERSION} from PyPI's files, without compiled operators."
    return f"Wrote {wheel} from PyPI's files, without compiled operators."


def download_labgym(folder: Path) -> Path:
    """Download the wheel that carries Detectron2's files, and verify its checksum."""
    run_pip(
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--ignore-requires-python",
        f"--dest={folder}",
        LABGYM_REQUIREMENT,
        failure=InstallError(
            f"{LABGYM_REQUIREMENT} could not be downloaded",
            "check the network or pip's index, or pip install a wheel that --wheel-dir wrote on "
            "another machine",
        ),
    )
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != LABGYM_SHA256:
        raise InstallError(
            f"{wheel.name} was not used, as its SHA-256 is {digest} instead of {LABGYM_SHA256}",
            "set PIP_INDEX_URL to an index that has the original file, or use --source git",
        )
    return wheel


def build_wheel(labgym: Path, folder: Path) -> Path:
    """Write Detectron2's files out of LabGym's wheel as a wheel of their own, with the same bytes
    each time.

    Returns:
        the path of the wheel, ``folder / WHEEL_NAME``; the folder is made if need be
    """
    with zipfile.ZipFile(labgym) as archive:
        files = {
            name.removeprefix("LabGym/"): archive.read(name).replace(
                b"LabGym.detectron2", b"detectron2"
            )
            for name in sorted(archive.namelist())
            if name.startswith(LABGYM_FOLDER) and not name.endswith("/")
        }
    files[f"{DIST_INFO}/licenses/LICENSE"] = find_licence().read_bytes()
    files[f"{DIST_INFO}/METADATA"] = metadata().encode()
    files[f"{DIST_INFO}/WHEEL"] = (
        b"Wheel-Version: 1.0\n"
        b"Generator: vovnet_d2 install_detectron2\n"
        b"Root-Is-Purelib: true\n"
        b"Tag: py3-none-any\n"
    )
    files[f"{DIST_INFO}/RECORD"] = record(files).encode()

    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(zip_entry(name), content)
    return wheel


def find_licence() -> Path:
    """Return the file of the Apache licence. This package has the same licence."""
    folder = Path(__file__).resolve().parent
    if folder.name == "tools":
        return folder.parent / "LICENSE"
    files = importlib.metadata.files("vovnet_d2") or []  # in an installed wheel
    return next(Path(file.locate()) for file in files if file.name == "LICENSE")


def metadata() -> str:
    return "".join(
        [
            "Metadata-Version: 2.1\n",
            "Name: detectron2\n",
            f"Version: {VERSION}\n",
            "Summary: Detectron2 (Python files only), a platform for object detection\n",
            "Home-page: https://github.com/facebookresearch/detectron2\n",
            "Author: Meta\n",
            "License: Apache-2.0\n",
            "License-File: LICENSE\n",
            "Requires-Python: >=3.7\n",
            *(f"Requires-Dist: {requirement}\n" for requirement in REQUIREMENTS),
            f"\n{PROVENANCE}\n",
        ]
    )


def record(files: dict[str, bytes]) -> str:
    """Return the wheel's table of contents: name, hash and size of each file but itself."""
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}\n")
    return "".join(lines) + f"{DIST_INFO}/RECORD,,\n"


def zip_entry(name: str) -> zipfile.ZipInfo:
    """Return an entry with a fixed date, mode and system, so that the archive does not depend on
    the machine or the time."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    entry.create_system = 3
    return entry


def run_pip(*args: str, failure: InstallError) -> None:
    """Run pip quietly. Its own complaints go to the terminal before ``failure`` is raised."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", args[0], "--quiet"]
    if subprocess.run([*command, *args[1:]], stdin=subprocess.DEVNULL).returncode != 0:
        raise failure


WAYS: dict[str, Callable[[Path | None, str | None], str]] = {
    "git": from_git,
    "wheel": from_wheel,
    "pypi": from_pypi,
}


if __name__ == "__main__":
    sys.exit(main())
