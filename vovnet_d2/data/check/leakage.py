# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures that two data sets share are found, as a network must not be tested on its training
pictures."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .files import ImageFile
from .problems import Findings

# Bits of 256. Unrelated pictures differ in about 128 bits, with a standard deviation of 8 if the
# bits are independent. A copy at another size or JPEG quality differs in a few.
_NEAR = 16
_ROWS = 256  # compared at a time, so that memory stays small
_NUM_SAMPLES = 500  # images of a set that are compared with the others of the set
_SEVERAL = 3


def compare_files(
    mine: Mapping[str, ImageFile], others: Mapping[str, ImageFile], findings: Findings
) -> set[str]:
    """Return the names of a training set's files whose bytes are also in the validation set, and
    note such problems. Both mappings have the files by their names."""
    by_digest = {file.digest: name for name, file in others.items()}
    leaked = {name for name, file in mine.items() if file.digest in by_digest}
    for name in sorted(leaked):
        findings.add("leaked_file", f"{name} is {by_digest[mine[name].digest]}")
    for name in sorted(mine.keys() & others.keys() - leaked):
        findings.add("same_name", name)
    _add_near_duplicates({n: f for n, f in mine.items() if n not in leaked}, others, findings)
    return leaked


def _add_near_duplicates(
    mine: Mapping[str, ImageFile], others: Mapping[str, ImageFile], findings: Findings
) -> None:
    """Count each image once, even if it looks like several images of the other set."""
    near: defaultdict[str, list[str]] = defaultdict(list)
    for name, other in near_pairs(mine, others):
        near[other].append(name)
    if not near:
        return
    problem = "all_alike" if _look_alike(mine) else "near_duplicate"
    for other, names in sorted(near.items()):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        findings.add(problem, f"{other} and {names[0]}{more}")


def _look_alike(files: Mapping[str, ImageFile]) -> bool:
    """Return True if most images of a set look like several other images of the same set."""
    step = max(1, len(files) // _NUM_SAMPLES)
    sample = dict(list(files.items())[::step])
    counts = Counter(name for name, other in near_pairs(sample, files) if name != other)
    return sum(count >= _SEVERAL for count in counts.values()) >= len(sample) / 2


def near_pairs(
    mine: Mapping[str, ImageFile], others: Mapping[str, ImageFile]
) -> Iterator[tuple[str, str]]:
    """Yield the names of each picture in ``mine`` and each in ``others`` that look alike."""
    names, looks = _looks(mine)
    other_names, other_looks = _looks(others)
    if not names or not other_names:
        return
    for start in range(0, len(names), _ROWS):
        rows = looks[start : start + _ROWS, None]
        distances = _ones(rows ^ other_looks[None]).sum(axis=-1, dtype=np.uint16)
        for row, column in zip(*np.nonzero(distances <= _NEAR), strict=True):
            yield names[start + row], other_names[column]


def _ones(words: np.ndarray) -> np.ndarray:
    """Return numbers whose sum over the last axis is the number of set bits in the words."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    return np.unpackbits(words.view(np.uint8), axis=-1)  # NumPy 1


def _looks(files: Mapping[str, ImageFile]) -> tuple[Sequence[str], np.ndarray]:
    found = {name: file.look for name, file in files.items() if file.look is not None}
    return list(found), np.array(list(found.values()))
