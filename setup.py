# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Metadata lives in pyproject.toml; what it cannot say is where two folders go in the wheel.
from setuptools import find_packages, setup

folders = {"vovnet_d2.configs": "configs", "vovnet_d2_tools": "tools"}
setup(packages=[*find_packages(include=["vovnet_d2*"]), *folders], package_dir=folders)
