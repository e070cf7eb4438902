#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Break changed files of the package, one expression at a time; list faults that no test notices.

    python tests/mutants/mutate_changes.py --minutes 10
    python tests/mutants/mutate_changes.py --tests tests/test_engine_scaling.py -- \\
        vovnet_d2/engine/scaling.py

mutmut (`pip install .[mutants]`) breaks the code and runs the tests that reach it. This script
chooses the files and the tests. By default these are the files that differ from a branch, and the
tests that import one of these files. mutmut works in a copy of the tree, build/mutants, and keeps
its verdicts there. So the same command continues when the time was up. mutmut breaks the bodies of
functions, but not the constants of modules and classes.
"""

import argparse
import ast
import configparser
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/mutants"
LOG = FOLDER.with_name("mutmut.log")

# Texts of messages are not broken, because tests name the part of a message that matters.
TEXTS = (r"^\s*[rf]*\"", r"logger\.", r"raise ", r"help=", r"headers=", r"__all__")


def git(*words: str) -> list[str]:
    return subprocess.check_output(["git", *words], cwd=ROOT, text=True).splitlines()


def changed_files(base: str) -> list[str]:
    """Return the changed and new files since this branch left ``base``."""
    (fork,) = git("merge-base", base, "HEAD")
    changed = git("diff", "--name-only", "--diff-filter=d", fork)
    return sorted({*changed, *git("ls-files", "--others", "--exclude-standard")})


@cache
def imported_modules(file: Path) -> set[str]:
    """Return the dotted names in the imports of a file. An imported name may be a module, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tests_of(files: list[str]) -> list[str]:
    modules = {file.removesuffix(".py").replace("/", ".") for file in files}
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{test.name}" for test in tests if modules & imported_modules(test)]


def prepare(files: list[str], tests: list[str]) -> None:
    """Update the copy of the tree, and write the configuration of mutmut into it."""
    for name in git("ls-files", "--cached", "--others", "--exclude-standard"):
        source, target = ROOT / name, FOLDER / name
        if source.is_file() and (
            not target.exists() or source.stat().st_mtime > target.stat().st_mtime
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    copied = [path.name for path in FOLDER.iterdir() if path.name not in ("mutants", "vovnet_d2")]
    lists = {
        "source_paths": ["vovnet_d2"],
        "only_mutate": files,
        "do_not_mutate_patterns": TEXTS,
        "also_copy": copied,
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-m", "not slow and not gpu"],
        "pytest_add_cli_args_test_selection": tests,
    }
    config = configparser.RawConfigParser()
    # A separate process imports torch once, and forks the processes that run tests.
    config["mutmut"] = {"process_isolation": "forkserver", "timeout_constant": "30"}
    for key, values in lists.items():
        config["mutmut"][key] = "\n".join(["", *values])
    with open(FOLDER / "setup.cfg", "w", encoding="utf-8") as file:
        config.write(file)


def mutmut(*words: str) -> list[str]:
    return [sys.executable, "-m", "mutmut", *words]


def run(minutes: float, processes: int) -> int | None:
    """Run mutmut, and return its exit status, or None if the time was up.

    Without a terminal, the output goes to a file, because mutmut prints a line for each turn of its
    wheel.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = mutmut("run", "--max-children", str(processes))
    with open(LOG, "w", encoding="utf-8") as log:
        output = None if sys.stdout.isatty() else log
        process = subprocess.Popen(
            command, cwd=FOLDER, env=environment, stdout=output, start_new_session=True
        )
    try:
        return process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def read_verdicts() -> dict[str, str]:
    lines = subprocess.check_output(mutmut("results", "--all", "True"), cwd=FOLDER, text=True)
    return dict(line.strip().rsplit(": ", 1) for line in lines.splitlines() if ": " in line)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="files of vovnet_d2 (default: those that changed)")
    parser.add_argument("--base", default="main", help="branch to compare with (default: main)")
    parser.add_argument("--tests", nargs="+", help="test files (default: those that import them)")
    parser.add_argument("--minutes", type=float, default=10, help="when to stop (default: 10)")
    parser.add_argument("--processes", type=int, default=2, help="tests at a time (default: 2)")
    args = parser.parse_args()
    changed = args.files or changed_files(args.base)
    files = [file for file in changed if file.startswith("vovnet_d2/") and file.endswith(".py")]
    tests = args.tests or tests_of(files)
    if not files or not tests:
        what = "test imports what" if files else "file of vovnet_d2"
        print(f"Nothing to break: no {what} differs from {args.base}.")
        return 0
    print("Breaks", *files, "\nand runs", *tests, sep="\n  ")
    prepare(files, tests)
    status = run(args.minutes, args.processes)
    if status:
        print(f"mutmut ended with status {status}: see above, or {LOG}.")
        return status
    if status is None:
        print(f"The {args.minutes:g} minutes are up: the same command goes on from here.")
    verdicts = read_verdicts()
    counts = Counter(verdicts.values())
    for name in (name for name, verdict in verdicts.items() if verdict == "survived"):
        shown = subprocess.check_output(mutmut("show", name), cwd=FOLDER, text=True)
        lines = [line for line in shown.splitlines() if line.startswith(("+", "-", "@@"))]
        print(f"\nNoticed by no test: {name}", *lines[2:], sep="\n")
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) + ".")
    return 0


if __name__ == "__main__":
    sys.exit(main())
