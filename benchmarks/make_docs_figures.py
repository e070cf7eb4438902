#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Make the figures of the pages in docs/, by the commands that the pages name beside them.

What needs a GPU is left as it is where there is none; a network that is trained already is not
trained again. Run it from the repository's root, on a machine that does nothing else: some of the
figures are of times.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import torch

DOCS = Path("docs")


FIGURES = f"--output {DOCS}/figures"
TRAININGS = "OUTPUT_DIR output/docs"


def commands(page: Path, *kinds: str) -> list[str]:
    """Return the commands of a page that contain one of ``kinds``; by default those of figures."""
    lines = (line.strip() for line in page.read_text(encoding="utf-8").splitlines())
    return [
        line
        for line in lines
        if line.startswith("python tools/") and any(kind in line for kind in kinds or [FIGURES])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the commands that contain this text")
    args = parser.parse_args()
    failed = []
    for page in sorted(DOCS.glob("*.md")):
        for command in commands(page, TRAININGS, FIGURES):
            if args.only not in command:
                continue
            print(f"\n{command}", flush=True)
            if "cuda" in command and not torch.cuda.is_available():
                print("Left as it is: there is no GPU.")
            elif subprocess.run([sys.executable, *shlex.split(command)[1:]]).returncode:
                failed.append(command)
    if failed:
        print("\nFailed:", *failed, sep="\n  ", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
