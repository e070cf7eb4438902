# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Export to files, with a report of the differences between each file and the model."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

from ..atomic import write_text
from ..made import note_made, refuse_foreign
from ..timing import describe_environment, package_version, ratios, time_interleaved
from .formats import FORMATS, ExportedFile, Program, export, load
from .parity import DetectionDifference, Difference, MapDifference, compare
from .targets import ExportTarget

WARMUP, REPEATS = 2, 5

Inputs = tuple[torch.Tensor, ...]


def export_and_check(
    target: ExportTarget,
    formats: Sequence[str],
    folder: Path,
    name: str,
    images: Sequence[torch.Tensor],
    *,
    about: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Export to one file per format, run each on some images, and compare it with the model.

    Args:
        formats: keys of ``FORMATS``.
        folder: gets the files, ``<name>.<suffix>``, and the report, ``<name>.json`` and ``.md``.
        images: batches of several sizes for :meth:`ExportTarget.inputs_from`.
        about: more lines for the report.

    Returns:
        the content of the JSON file.

    Raises:
        ModuleNotFoundError: see :func:`export`.
        ValueError: see :func:`export`; or one of the files exists, and this package did not make
            it.
    """
    paths = {format: folder / (name + FORMATS[format].suffix) for format in formats}
    json_path, markdown = folder / f"{name}.json", folder / f"{name}.md"
    refuse_foreign([*paths.values(), json_path, markdown])
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [target.inputs_from(batch) for batch in images]
    device = images[0].device
    results = []
    for format, path in paths.items():
        file = export(target, format, path)
        note_made(path)
        results.append(_check(target, format, file, inputs, device))
    report = {
        "target": target.description,
        "inputs": list(target.input_names),
        "outputs": list(target.output_names),
        **(about or {}),
        "environment": _environment(device, formats),
        "exports": results,
    }
    for path, text in (
        (json_path, json.dumps(report, indent=2) + "\n"),
        (markdown, to_markdown(report)),
    ):
        write_text(path, text)
    return report


def _environment(device: torch.device, formats: Sequence[str]) -> dict[str, str]:
    return {
        **describe_environment(device),
        **{
            package: package_version(package)
            for name in formats
            for package in FORMATS[name].packages
        },
        "dtype": "float32",
        "timing": f"{WARMUP} rounds of warm-up, median of {REPEATS}, interleaved with eager",
    }


def _check(
    target: ExportTarget,
    format: str,
    file: ExportedFile,
    inputs: Sequence[Inputs],
    device: torch.device,
) -> dict[str, Any]:
    program = load(format, file.path, device)
    checks = [_check_one(target, program, one, device) for one in inputs]
    return {
        "format": format,
        "file": file.path.name,
        "megabytes": round(file.path.stat().st_size / 1e6, 1),
        "exporter": file.exporter,
        "opset": file.opset,
        "nodes": file.operators.total(),
        "operators": dict(file.operators.most_common()),
        "checks": checks,
        "agrees": all(check["agrees"] for check in checks),
    }


def _check_one(
    target: ExportTarget, program: Program, inputs: Inputs, device: torch.device
) -> dict[str, Any]:
    expected, actual = (
        {name: x.cpu() for name, x in zip(target.output_names, run(*inputs), strict=True)}
        for run in (target.eager, program)
    )
    differences = compare(actual, expected)
    times = time_interleaved(
        {"eager": lambda: target.eager(*inputs), "exported": lambda: program(*inputs)},
        device=device,
        warmup=WARMUP,
        repeats=REPEATS,
    )
    return {
        "input": "×".join(map(str, inputs[0].shape)),
        "differences": {name: asdict(difference) for name, difference in differences.items()},
        "summary": _summarise(differences),
        "agrees": all(difference.agrees for difference in differences.values()),
        "eager_ms": 1e3 * median(times["eager"]),
        "exported_ms": 1e3 * median(times["exported"]),
        "time_ratio": median(ratios(times["exported"], times["eager"])),
    }


def _summarise(differences: dict[str, Difference]) -> str:
    """Describe the differences of detections and the largest difference of all feature maps."""
    parts = []
    maps = [d for d in differences.values() if isinstance(d, MapDifference)]
    if maps:
        absolute, relative = (max(getattr(d, k) for d in maps) for k in ("absolute", "relative"))
        parts.append(f"largest difference {absolute:.1e}, relative {relative:.1e}")
    for d in differences.values():
        if isinstance(d, DetectionDifference):
            parts.append(
                f"{d.matched} detections the same of {d.expected} in eager and {d.found} here: "
                f"IoU ≥ {d.iou:.4f}, boxes within {d.box:.1e} pixels, scores {d.score:.1e}"
            )
            parts += [f"{name} {difference:.1e}" for name, difference in d.fields.items()]
    return ", ".join(parts)


def to_markdown(report: dict[str, Any]) -> str:
    exports = [
        [
            *(export[key] for key in ("format", "file", "megabytes", "exporter", "opset", "nodes")),
            "yes" if export["agrees"] else "NO",
        ]
        for export in report["exports"]
    ]
    checks = [
        [
            export["format"],
            check["input"],
            check["summary"],
            f"{check['eager_ms']:.1f}",
            f"{check['exported_ms']:.1f}",
            f"{check['time_ratio']:.2f}",
        ]
        for export in report["exports"]
        for check in export["checks"]
    ]
    facts = {k: v for k, v in report.items() if isinstance(v, str)} | report["environment"]
    operators = [
        f"- {export['format']}: "
        + ", ".join(f"{name} {number}" for name, number in export["operators"].items())
        for export in report["exports"]
    ]
    return "\n".join(
        [
            "# Export",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            _table(["format", "file", "MB", "exporter", "opset", "nodes", "agrees"], exports),
            "",
            _table(["format", "input", "against eager", "eager ms", "ms", "ms / eager ms"], checks),
            "",
            "Operators of each graph:",
            "",
            *operators,
            "",
        ]
    )


def _table(headers: list[str], rows: list[list[Any]]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
