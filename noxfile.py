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

OLDEST = ["torch==2.6.0", "torchvision==0.21.0", "numpy==1.26.4", "pillow==10.4.0"]
NEWEST = ["torch==2.15.0", "torchvision==0.29.2"]

# By the name of the session: Python, versions that are held, and where Detectron2 comes from.
CORNERS = {
    "oldest": ("3.10", OLDEST, "pypi"),
    "gpu_machine": ("3.12", ["torch==2.11.0", "torchvision==0.26.0"], "pypi"),
    "newest": ("3.11", NEWEST, "pypi"),
    "upstream": ("3.11", NEWEST, "git"),
    "prebuilt": ("3.12", ["torch==2.9.1", "torchvision==0.24.1"], "wheel"),
}


def run_tests(session: nox.Session) -> None:
    """Install one corner of the supported versions and run the fast tests on it."""
    _, versions, source = CORNERS[session.name.partition("-")[0]]
    session.install("setuptools>=77,<81", "wheel")
    session.install(*versions)
    session.run("python", "tools/install_detectron2.py", "--source", source)
    # The versions once more, so that no requirement replaces one of them.
    session.install("--no-build-isolation", "-e", ".[dev]", *versions)
    session.run("python", "tools/doctor.py", success_codes=[0, 1])
    session.run("pytest", "-n", "2", "-m", "not slow and not gpu", *session.posargs)


for name, (python, _, _) in CORNERS.items():
    nox.session(python=python, name=name)(run_tests)
