# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import doctor
import install_detectron2
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest requires it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

PAGE = ROOT / "docs" / "install.md"
TOOLS = sorted(file.stem for file in (ROOT / "tools").glob("*.py"))

CONSTRAINTS = {
    canonicalize_name(constraint.name): constraint
    for constraint in map(
        Requirement,
        re.findall(r"^[^#\s].*", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE),
    )
}
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    requirement
    for requirement in map(
        Requirement,
        [
            *PROJECT["dependencies"],
            *(text for listed in EXTRAS.values() for text in listed),
            *install_detectron2.REQUIREMENTS,
        ],
    )
    if requirement.name != PROJECT["name"]
]


PYTHON_FILES = [
    file.relative_to(ROOT)
    for folder in ("vovnet_d2", "configs", "tools", "tests", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
]


def test_constraints_fit_the_requirements() -> None:
    for requirement in REQUIREMENTS:
        constraint = CONSTRAINTS.get(canonicalize_name(requirement.name))
        if constraint is None:
            # Only packages without bounds may be unpinned.
            assert not requirement.specifier, requirement
            continue
        (pin,) = constraint.specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


def test_each_tool_is_a_command() -> None:
    """Import the tools from tools/, which setup.py puts into the wheel as vovnet_d2_tools."""
    assert PROJECT["scripts"] == {
        f"vovnet-{tool.replace('_', '-')}": f"vovnet_d2_tools.{tool}:main" for tool in TOOLS
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_a_command_takes_its_arguments_from_the_command_line(tool: str) -> None:
    main = importlib.import_module(tool).main
    assert inspect.signature(main).bind().arguments == {}


def test_commands_are_documented() -> None:
    rows = re.findall(r"^\| `(\w+)\.py` \| `([\w-]+)` \| ", PAGE.read_text(), flags=re.MULTILINE)
    assert {command: f"vovnet_d2_tools.{tool}:main" for tool, command in rows} == PROJECT["scripts"]


@pytest.mark.slow
def test_commands_of_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    install = ["install", "--quiet", "--no-deps", f"--target={tmp_path}", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    for command in ("vovnet-train-net", "vovnet-install-detectron2"):
        finished = subprocess.run(
            [tmp_path / "bin" / command, "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert finished.stdout.startswith(f"usage: {command} "), finished.stderr


def test_the_doctor_needs_the_same_python() -> None:
    assert PROJECT["requires-python"] == ">={}.{}".format(*doctor.MIN_PYTHON)


def test_constraints_are_about_requirements_only() -> None:
    assert set(CONSTRAINTS) <= {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}


def test_files_begin_with_copyright_and_licence() -> None:
    header = "# Copyright (c) the vovnet_d2 authors.\n# SPDX-License-Identifier: Apache-2.0\n"
    texts = {file: re.sub(r"\A#!.*\n", "", (ROOT / file).read_text()) for file in PYTHON_FILES}
    assert [file for file, text in texts.items() if not text.startswith(header)] == []


def test_all_imported_packages_are_declared() -> None:
    ours = {"vovnet_d2", "detectron2", "tomllib", "tomli", *(file.stem for file in PYTHON_FILES)}
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    distributions = distributions_of_modules()
    undeclared = {
        (str(file), module)
        for file in PYTHON_FILES
        for module in imported_modules(ROOT / file) - ours - sys.stdlib_module_names
        if declared.isdisjoint(distributions.get(module, [canonicalize_name(module)]))
    }
    assert undeclared == set()


def distributions_of_modules() -> dict[str, set[str]]:
    """Return what importlib.metadata.packages_distributions should return.

    In Python 3.10 this function misses most wheels.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        for file in distribution.files or ():
            found[file.parts[0].partition(".")[0]].add(name)
    return found


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the project, because a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    for package in ("vovnet_d2", "configs", "tools"):
        shutil.copytree(
            ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([sys.executable, "-m", "pip", *build, str(copy)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_package_configs_and_licence(wheel: Path) -> None:
    expected = {
        file.relative_to(ROOT)
        for suffix in ("*.py", "py.typed", "*.html", "*.css")
        for file in (ROOT / "vovnet_d2").rglob(suffix)
    }
    expected |= {
        Path("vovnet_d2") / file.relative_to(ROOT)
        for suffix in ("*.yaml", "*.py")
        for file in (ROOT / "configs").rglob(suffix)
    }
    expected |= {Path("vovnet_d2_tools", f"{tool}.py") for tool in TOOLS}
    with zipfile.ZipFile(wheel) as archive:
        names = set(map(Path, archive.namelist()))
    metadata = {name for name in names if name.parts[0].endswith(".dist-info")}
    assert names - metadata == expected
    assert Path("vovnet_d2/py.typed") in expected
    assert any(name.name == "LICENSE" for name in metadata)


@pytest.mark.slow
def test_installed_wheel_finds_its_configs(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = ["install", "--quiet", "--no-deps", f"--target={site}", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    (config, *_) = sorted((ROOT / "configs").rglob("*_*.yaml"))
    name = str(config.relative_to(ROOT / "configs"))
    found = subprocess.run(
        [sys.executable, "-c", f"import vovnet_d2; print(vovnet_d2.get_config_file({name!r}))"],
        env={"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(site / "vovnet_d2" / "configs" / name), found.stderr
