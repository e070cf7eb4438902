# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The fast tests on the versions that are supported, each in an environment of its own.

    pip install nox
    nox --list
    nox -s oldest

Each session downloads several gigabytes. ``upstream`` needs git, a C++ compiler and GitHub. Name
another Python with ``--force-python``, and give arguments for pytest behind ``--``.
"""

import nox

nox.options.sessions = ["oldest", "gpu_machine", "newest"]
nox.options.reuse_existing_virtualenvs = True

# Versions of torch, torchvision and what else is held below its newest.
OLDEST = ["torch==2.6.0", "torchvision==0.21.0", "numpy==1.26.4", "pillow==10.4.0"]
GPU_MACHINE = ["torch==2.11.0", "torchvision==0.26.0"]
NEWEST = ["torch==2.15.0", "torchvision==0.29.2"]


def run_tests(session: nox.Session, versions: list[str], detectron2: str) -> None:
    """Install the versions, a Detectron2 from the given source, and this package; run the tests."""
    session.install("setuptools<81", "wheel")
    session.install(*versions)
    session.run("python", "tools/install_detectron2.py", "--source", detectron2)
    # The versions once more, so that no requirement replaces one of them.
    session.install("--no-build-isolation", "-e", ".[dev]", *versions)
    session.run("python", "tools/doctor.py", success_codes=[0, 1])
    session.run("pytest", "-n", "2", "-m", "not slow and not gpu", *session.posargs)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Python 3.10, torch 2.6, NumPy 1.26, Pillow 10; Detectron2's Python files from PyPI."""
    run_tests(session, OLDEST, "pypi")


@nox.session(python="3.12")
def gpu_machine(session: nox.Session) -> None:
    """Python 3.12, torch 2.11; Detectron2's Python files from PyPI."""
    run_tests(session, GPU_MACHINE, "pypi")


@nox.session(python="3.11")
def newest(session: nox.Session) -> None:
    """Python 3.11, torch 2.15; Detectron2's Python files from PyPI."""
    run_tests(session, NEWEST, "pypi")


@nox.session(python="3.11")
def upstream(session: nox.Session) -> None:
    """Python 3.11, torch 2.15; Detectron2 built from upstream's pinned commit."""
    run_tests(session, NEWEST, "git")


@nox.session(python="3.12")
def prebuilt(session: nox.Session) -> None:
    """Python 3.12, torch 2.9; a prebuilt wheel of Detectron2."""
    run_tests(session, ["torch==2.9.1", "torchvision==0.24.1"], "wheel")
