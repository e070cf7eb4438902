# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Metadata lives in pyproject.toml; what it cannot say is that configs/ ships inside the package.
from setuptools import find_packages, setup

packages = [*find_packages(include=["vovnet_d2*"]), "vovnet_d2.configs"]
setup(packages=packages, package_dir={"vovnet_d2.configs": "configs"})
