# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The findings are reported as text and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...words import counted
from .check import CheckedSet
from .problems import PROBLEMS, Findings, Severity

Between = Mapping[tuple[str, str], Findings]


def count_problems(checked: Sequence[CheckedSet], between: Between) -> int:
    """Count all errors and warnings that were found. Notes are not counted."""
    return sum(
        found.counts[problem]
        for found in (*(s.findings for s in checked), *between.values())
        for problem in found.found(Severity.ERROR, Severity.WARNING)
    )


def format_report(checked: Sequence[CheckedSet], between: Between, *, fixing: bool = False) -> str:
    """Return the text of the report. With ``fixing``, it says what the corrected copy changes."""
    lines = []
    for one in checked:
        counts = ", ".join(counted(count, what) for what, count in one.counts.items())
        lines += [f"{one.source.name}: {one.source.json_file}", f"  {counts or 'not readable'}"]
        lines += _format(one.findings, fixing)
    for (name, other), findings in between.items():
        if +findings.counts:
            lines += [f"{name} against {other}:", *_format(findings, fixing)]
    problems = count_problems(checked, between)
    return "\n".join([*lines, f"{counted(problems, 'problems')}." if problems else "No problems."])


def _format(findings: Findings, fixing: bool) -> list[str]:
    lines = []
    for name in findings.found(*Severity):
        problem, count = PROBLEMS[name], findings.counts[name]
        lines.append(f"  {problem.severity:<8}{count:>7}  {problem.title}")
        if fixing and problem.severity != Severity.NOTE:
            repair = problem.repair or "to be fixed by hand"
            lines.append(f"{'':17}-> {repair}")
        examples = [_printable(example) for example in findings.examples[name]]
        lines += [f"{'':19}{example}" for example in examples]
        if count > len(examples):
            lines.append(f"{'':19}...")
    return lines


def _printable(text: str) -> str:
    """Escape characters that would move the cursor or break a line. File names may have any
    characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def report_to_json(checked: Sequence[CheckedSet], between: Between) -> dict[str, Any]:
    return {
        "problems": count_problems(checked, between),
        "data_sets": [
            {
                "name": one.source.name,
                "json_file": str(one.source.json_file),
                "image_root": str(one.source.image_root),
                "counts": one.counts,
                "findings": _to_json(one.findings),
            }
            for one in checked
        ],
        "between": [
            {"data_sets": list(names), "findings": _to_json(findings)}
            for names, findings in between.items()
        ],
    }


def _to_json(findings: Findings) -> list[dict[str, Any]]:
    return [
        {"problem": name, "count": findings.counts[name], "examples": findings.examples[name]}
        | PROBLEMS[name]._asdict()
        for name in findings.found(*Severity)
    ]
