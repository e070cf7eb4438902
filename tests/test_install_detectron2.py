# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import base64
import contextlib
import csv
import email
import hashlib
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import install_detectron2
import pytest
import torch
from packaging.requirements import Requirement

TOOL = Path(install_detectron2.__file__)


@pytest.fixture
def labgym(tmp_path: Path) -> Path:
    """Build a wheel like that of LabGym, with Detectron2 inside a package of another licence."""
    files = {
        "LabGym/__init__.py": "raise ImportError('GPL: must not be here')",
        "LabGym/detectron2_helper.py": "raise ImportError('GPL: must not be here')",
        "LabGym/detectron2/__init__.py": "from LabGym.detectron2.config import VALUE",
        "LabGym/detectron2/config/__init__.py": "import LabGym.detectron2\nVALUE = 7",
        "LabGym/detectron2/model_zoo/configs/Base.yaml": "MODEL: {}",
        "LabGym-3.1.2.dist-info/METADATA": "Name: LabGym",
    }
    path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_wheel_holds_detectron2_and_nothing_else(labgym: Path, tmp_path: Path) -> None:
    wheel = install_detectron2.build_wheel(labgym, tmp_path / "out")
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    info = {name for name in texts if name.startswith("detectron2-0.6.dist-info/")}
    assert set(texts) - info == {
        "detectron2/__init__.py",
        "detectron2/config/__init__.py",
        "detectron2/model_zoo/configs/Base.yaml",
    }
    assert not any("LabGym" in texts[name] for name in set(texts) - info)


def test_wheel_installs_as_detectron2(labgym: Path, tmp_path: Path) -> None:
    wheel = install_detectron2.build_wheel(labgym, tmp_path)
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"--target={site}", wheel],
        check=True,
    )
    (distribution,) = importlib.metadata.distributions(path=[str(site)])
    assert (distribution.name, distribution.version) == ("detectron2", "0.6")
    imported = subprocess.run(
        [sys.executable, "-S", "-c", "import detectron2; print(detectron2.VALUE)"],
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert imported.stdout == "7\n", imported.stderr


def test_metadata_names_version_licence_and_source(labgym: Path, tmp_path: Path) -> None:
    wheel = install_detectron2.build_wheel(labgym, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read("detectron2-0.6.dist-info/METADATA"))
        license_text = archive.read("detectron2-0.6.dist-info/licenses/LICENSE").decode()
    assert metadata["License"] == "Apache-2.0"
    assert "Apache License" in license_text
    assert "labgym==3.1.2" in metadata.get_payload()
    # Without these bounds Detectron2 fails.
    required = {
        r.name: str(r.specifier) for r in map(Requirement, metadata.get_all("Requires-Dist"))
    }
    assert required["setuptools"] == "<81"
    assert Requirement("x" + required["iopath"]).specifier.contains("0.1.9")
    assert not Requirement("x" + required["iopath"]).specifier.contains("0.1.10")
    assert not Requirement("x" + required["omegaconf"]).specifier.contains("2.4.0")
    assert not Requirement("x" + required["fvcore"]).specifier.contains("0.1.6")


def test_record_lists_every_file_with_its_hash(labgym: Path, tmp_path: Path) -> None:
    wheel = install_detectron2.build_wheel(labgym, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        record = archive.read("detectron2-0.6.dist-info/RECORD").decode()
        rows = {name: (digest, size) for name, digest, size in csv.reader(record.splitlines())}
        assert list(rows) == archive.namelist()
        assert rows.pop("detectron2-0.6.dist-info/RECORD") == ("", "")
        for name, (digest, size) in rows.items():
            content = archive.read(name)
            algorithm, _, value = digest.partition("=")
            padded = value + "=" * (-len(value) % 4)
            assert base64.urlsafe_b64decode(padded) == hashlib.new(algorithm, content).digest()
            assert int(size) == len(content)


def test_wheel_has_the_same_bytes_every_time(labgym: Path, tmp_path: Path) -> None:
    first = install_detectron2.build_wheel(labgym, tmp_path / "first")
    os.utime(labgym, (0, 0))
    time.sleep(2.1)  # times in a zip archive have steps of two seconds
    second = install_detectron2.build_wheel(labgym, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


def test_wheel_is_refused_when_its_checksum_differs(
    labgym: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def download(*args: str, failure: Exception) -> None:
        (destination,) = (arg.removeprefix("--dest=") for arg in args if arg.startswith("--dest="))
        Path(destination, labgym.name).write_bytes(labgym.read_bytes())

    monkeypatch.setattr(install_detectron2, "run_pip", download)
    out = tmp_path / "out"
    assert install_detectron2.main(["--source", "pypi", "--wheel-dir", str(out)]) == 1
    message = capsys.readouterr().err
    assert hashlib.sha256(labgym.read_bytes()).hexdigest() in message
    assert "PIP_INDEX_URL" in message
    assert "--source git" in message
    assert not out.exists()


def test_installed_detectron2_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    (kept,) = (
        file for file in importlib.metadata.files("detectron2") or [] if file.name == "env.py"
    )
    before = kept.locate().stat().st_mtime_ns
    for source in ("auto", *install_detectron2.WAYS):
        assert install_detectron2.main(["--source", source]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("Kept the Detectron2 that is already installed") for line in lines)
    assert kept.locate().stat().st_mtime_ns == before


def run_tool(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *args],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_network_the_error_names_the_way_out(tmp_path: Path) -> None:
    result = run_tool(
        *("--source", "pypi", "--wheel-dir", str(tmp_path)), PIP_NO_INDEX="1", PIP_FIND_LINKS=""
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("install_detectron2: labgym==3.1.2 could not be downloaded: check the")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("modules", "cause"),
    [((), "has no pip: run"), (("pip",), "needs torch: run 'pip install torch torchvision' first")],
)
def test_git_needs_pip_and_torch(tmp_path: Path, modules: tuple[str, ...], cause: str) -> None:
    for name in modules:
        (tmp_path / f"{name}.py").touch()
    result = subprocess.run(
        [sys.executable, "-S", str(TOOL), "--source", "git"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert cause in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("programs", "cause"), [((), "git is not installed"), (("git",), "no C++ compiler was found")]
)
def test_git_needs_git_and_a_compiler(
    programs: tuple[str, ...], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in programs:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(install_detectron2.InstallError, match=re.escape(cause)):
        install_detectron2.check_git_way()


@contextlib.contextmanager
def mute_server() -> Iterator[int]:
    """Start a server that accepts connections and never answers, like some firewalls."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_unreachable_upstream_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_detectron2, "REACH_TIMEOUT", 1)
    with mute_server() as port:
        monkeypatch.setattr(install_detectron2, "UPSTREAM_URL", f"git://127.0.0.1:{port}/x.git")
        start = time.monotonic()
        assert not install_detectron2.is_upstream_reachable()
        assert time.monotonic() - start < 5


def test_git_asks_for_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "git"
    program.write_text('#!/bin/sh\ntest "$GIT_TERMINAL_PROMPT" = 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_detectron2.is_upstream_reachable()


def git(repository: Path, *args: str) -> str:
    author = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(repository), *author, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository that stands for upstream. Its setup.py also imports torch."""
    repository = tmp_path / "upstream"
    package = repository / "detectron2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("ORIGIN = 'git'")
    (repository / "setup.py").write_text(
        "import importlib.util\n"
        "from setuptools import setup\n"
        "assert importlib.util.find_spec('torch'), 'built in isolation'\n"
        "setup(name='detectron2', version='0.6', packages=['detectron2'])\n"
    )
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message=pinned")
    commit = git(repository, "rev-parse", "HEAD")
    monkeypatch.setattr(install_detectron2, "UPSTREAM_URL", repository.as_uri())
    monkeypatch.setattr(install_detectron2, "UPSTREAM_COMMIT", commit[:8])
    return repository


@pytest.mark.slow
def test_upstream_is_built_at_the_pinned_commit(
    upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (upstream / "detectron2" / "__init__.py").write_text("ORIGIN = 'later'")
    git(upstream, "commit", "--quiet", "--all", "--message=after the pin")
    out = tmp_path / "out"
    assert install_detectron2.main(["--wheel-dir", str(out)]) == 0
    (wheel,) = out.glob("detectron2-0.6-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("detectron2/__init__.py") == b"ORIGIN = 'git'"
    commit = install_detectron2.UPSTREAM_COMMIT
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"Wrote the wheel of upstream's commit {commit} into {out}."


def fail(*words: str, failure: Exception) -> None:
    raise failure


def test_each_way_is_tried_and_logged(
    upstream: Path,
    labgym: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(install_detectron2, "run_pip", fail)
    monkeypatch.setattr(install_detectron2, "UPSTREAM_COMMIT", "0" * 8)
    monkeypatch.setattr(install_detectron2, "download_labgym", lambda folder: labgym)
    out, wheels = tmp_path / "out", tmp_path / "wheels"
    wheels.mkdir()
    options = ["--wheel-dir", str(out), "--find-links", str(wheels)]
    assert install_detectron2.main(options) == 0
    told = capsys.readouterr()
    assert (out / "detectron2-0.6-py3-none-any.whl").exists()
    assert "without compiled operators" in told.out
    build = install_detectron2.torch_build()
    assert told.err.splitlines() == [
        "Building Detectron2 from upstream's commit 00000000, some two minutes ...",
        "Way 'git' does not work here: building upstream's commit 00000000 failed.",
        f"Looking for a prebuilt wheel for {build} in {wheels} ...",
        f"Way 'wheel' does not work here: no wheel of Detectron2 for {build} and this Python was "
        f"found in {wheels}.",
        "Taking Detectron2's Python files out of labgym==3.1.2 ...",
    ]
    assert install_detectron2.main([*options, "--source", "git"]) == 1
    assert "or use --source pypi" in capsys.readouterr().err


def write_wheel(folder: Path, version: str, tag: str = "py3-none-any") -> None:
    info = f"detectron2-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}\n"
    files = {
        "detectron2/__init__.py": f"ORIGIN = {version!r}",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"detectron2-{version}-{tag}.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_the_prebuilt_wheel_fits_torch_and_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, wheels, out = install_detectron2.torch_build(), tmp_path / "wheels", tmp_path / "out"
    write_wheel(wheels, f"0.6+fd27788{build}")
    write_wheel(wheels, "0.6+fd27788pt2.1.0cpu")
    write_wheel(wheels, "0.6+zzzzzzzpt99.0.0cu999")
    write_wheel(wheels, f"0.6+zzzzzzz{build}0")  # such as cu1280 if cu128 is installed
    write_wheel(wheels, f"0.6+zzzzzzz{build}", tag="cp27-none-win32")
    options = ["--source", "wheel", "--wheel-dir", str(out), "--find-links", str(wheels)]
    assert install_detectron2.main(options) == 0
    assert [file.name for file in out.iterdir()] == [
        f"detectron2-0.6+fd27788{build}-py3-none-any.whl"
    ]
    assert f"detectron2==0.6+fd27788{build}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "cuda", "build"),
    [
        ("2.9.1+cu128", "12.8", "pt2.9.1cu128"),
        ("2.15.0", "13.2", "pt2.15.0cu132"),
        ("2.6.0+cpu", None, "pt2.6.0cpu"),
    ],
)
def test_the_build_of_torch(
    monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, build: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert install_detectron2.torch_build() == build


@pytest.mark.slow  # needs a package index
def test_wheel_from_pypi_is_the_one_that_was_tested(tmp_path: Path) -> None:
    """Compare with the recorded hash over all files of the tested wheel."""
    result = run_tool("--source", "pypi", "--wheel-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"Wrote {tmp_path / install_detectron2.WHEEL_NAME}")
    digest = hashlib.sha256()
    with zipfile.ZipFile(tmp_path / install_detectron2.WHEEL_NAME) as archive:
        names = [name for name in archive.namelist() if name.startswith("detectron2/")]
        for name in names:
            content = archive.read(name)
            digest.update(name.encode() + content)
            if name.endswith(".py"):
                compile(content, name, "exec")
    assert len(names) == 306
    assert digest.hexdigest() == "a0218c7d5cac4164b81000879c8b24455ae790997e6106ba69cd2e21ea63ca30"
