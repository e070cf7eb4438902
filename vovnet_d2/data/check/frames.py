# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Faults that all annotations of a set share are found and corrected: another order or unit of the
numbers, another size of the pictures, or pictures that were turned."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conventions import (
    COCO,
    Convention,
    Sample,
    find_conventions,
    find_polygon_convention,
    polygons_of,
    sample_of,
)
from .files import ImageFile
from .orientation import TurnedFile, compare_readings, judge, turn_annotation
from .problems import Findings
from .values import are_numbers, as_id, is_box, is_number

Record = dict[str, Any]
Size = tuple[int, int]
Array = NDArray[Any]

_RESIZED = 0.05  # a smaller change of size is a mistake in the numbers
_MAX_COMPARED = 200


@dataclass(frozen=True)
class Frame:
    """An image with annotations.

    Attributes:
        name: the ``file_name`` of the image.
        path: the path of the file.
        file: the content of the file.
        given: width and height in the annotation file; None if these are not whole numbers above 0.
    """

    name: str
    path: str
    file: ImageFile
    given: Size | None

    @property
    def size(self) -> Size:
        """Return the width and height to which the numbers of the annotations refer."""
        return self.given or self.file.size


def interpret_annotations(
    annotations: list[Record], frames: Mapping[int | str, Frame], findings: Findings
) -> tuple[list[Record], str]:
    """Convert annotations in unusual conventions to COCO's format.

    Args:
        frames: the images that can be used, by their ids in the file.
        findings: gets what all annotations have in common.

    Returns:
        the annotations in COCO's format for the pictures as they are read, and the reason why no
        corrected copy can be written; the reason is empty if one can.
    """
    pairs = [(a, frames.get(as_id(a.get("image_id")))) for a in annotations]  # type: ignore[arg-type]
    pairs = _interpret_polygons(pairs, findings)
    pairs, refusal = _interpret_boxes(pairs, findings)
    pairs = _fit_to_files(pairs, findings)
    return _turn(pairs, frames, findings), refusal


_Pairs = list[tuple[Record, Frame | None]]


def _each(pairs: _Pairs) -> Iterator[tuple[int, Record, Frame]]:
    return ((i, a, frame) for i, (a, frame) in enumerate(pairs) if frame)


# Order and unit


def _interpret_polygons(pairs: _Pairs, findings: Findings) -> _Pairs:
    convention = find_polygon_convention(
        [s for _, a, frame in _each(pairs) if (s := sample_of(a, frame.size))]
    )
    if not convention:
        return pairs
    found = [p for _, a, _ in _each(pairs) for p in polygons_of(a)]
    findings.add("polygon_convention", f"they are {convention}: {found[0][:6]}", len(found))

    def rewrite(annotation: Record, frame: Frame) -> Record:
        mask = annotation.get("segmentation")
        if not polygons_of(annotation) or not isinstance(mask, list):
            return annotation
        scale = frame.size if convention == "fractions" else (1, 1)
        step = -1 if convention == "y, x" else 1
        rewritten = [_map_points(p, lambda points: (points * scale)[:, ::step]) for p in mask]
        return annotation | {"segmentation": rewritten}

    return [(rewrite(a, frame) if frame else a, frame) for a, frame in pairs]


def _map_points(polygon: Any, change: Callable[[Array], Array]) -> Any:
    """Change the points of a polygon, an array (N, 2). A malformed polygon stays as it is."""
    if not are_numbers(polygon) or len(polygon) % 2:
        return polygon
    return change(np.reshape(polygon, (-1, 2))).reshape(-1).tolist()


def _interpret_boxes(pairs: _Pairs, findings: Findings) -> tuple[_Pairs, str]:
    samples = {i: s for i, a, frame in _each(pairs) if (s := sample_of(a, frame.size))}
    readings = find_conventions(list(samples.values()))
    if len(readings) > 1:
        readings = _tell_apart(readings, samples, pairs)
    if readings == [COCO]:
        return pairs, ""
    first = next(iter(samples.values()))
    example = f"{list(first.box)} in an image of {first.size[0]} x {first.size[1]}"
    if len(readings) > 1:
        either = "; or ".join(map(str, readings))
        findings.add("box_convention_unclear", f"{either}: {example}", len(samples))
        return pairs, f"its boxes are not x, y, width, height in pixels, but {either}"
    findings.add("box_convention", f"they are {readings[0]}: {example}", len(samples))
    shapes = _to_coco(readings[0], list(samples.values()))
    rewritten = dict(zip(samples, shapes, strict=True))
    return [
        (a | {"bbox": rewritten[i]} if i in rewritten else a, frame)
        for i, (a, frame) in enumerate(pairs)
    ], ""


def _to_coco(reading: Convention, samples: list[Sample]) -> list[list[float]]:
    boxes = np.array([s.box for s in samples], dtype=float).T
    sizes = np.array([s.size for s in samples], dtype=float).T
    shapes = reading.to_coco(boxes, sizes).T.tolist()
    return [[int(n) if n == int(n) else n for n in shape] for shape in shapes]


def _tell_apart(
    readings: list[Convention], samples: dict[int, Sample], pairs: _Pairs
) -> list[Convention]:
    """Choose the convention whose box edges lie where the pictures change. Only a sample of the
    boxes is compared."""
    chosen = list(samples)[:: max(1, len(samples) // _MAX_COMPARED)]
    by_path: dict[str, list[int]] = {}
    for i in chosen:
        frame = pairs[i][1]
        if frame and frame.size == frame.file.size and frame.file.orientation == 1:
            by_path.setdefault(frame.path, []).append(i)
    files = [
        (path, [_to_coco(reading, [samples[i] for i in found]) for reading in readings])
        for path, found in by_path.items()
    ]
    best = compare_readings(files)  # type: ignore[arg-type]
    return readings if best is None else [readings[best]]


# Size of the pictures


def _fit_to_files(pairs: _Pairs, findings: Findings) -> _Pairs:
    """Scale the annotations of pictures that were resized after they had been annotated."""
    resized = [(i, a, f) for i, a, f in _each(pairs) if _scale_of(f)]
    boxes = [(s.box, f) for _, a, f in resized if (s := sample_of(a, f.size))]
    reaches = [(box[0] + box[2], box[1] + box[3], f) for box, f in boxes]
    in_given = all(x <= f.size[0] + 1 and y <= f.size[1] + 1 for x, y, f in reaches)
    out_of_file = any(x > f.file.size[0] + 1 or y > f.file.size[1] + 1 for x, y, f in reaches)
    smaller_files = any(f.file.size[0] < f.size[0] for _, f in boxes)
    if not boxes or not in_given or not (out_of_file if smaller_files else len(boxes) >= 3):
        return pairs
    rewritten = list(pairs)
    for i, annotation, frame in resized:
        scale = _scale_of(frame)
        assert scale
        rewritten[i] = (_scale(annotation, scale), frame)
        sizes = " to ".join(f"{w} x {h}" for w, h in (frame.size, frame.file.size))
        findings.add("resized", f"{frame.name}: from {sizes}")
    return rewritten


def _scale_of(frame: Frame) -> tuple[float, float] | None:
    """Return the factors from the annotations' size to the file's; None if the picture was not
    resized as a whole."""
    if frame.given is None or frame.given in (frame.file.size, frame.file.stored_size):
        return None
    x, y = (new / old for new, old in zip(frame.file.size, frame.given, strict=True))
    rounding = 1 / min(*frame.given, *frame.file.size)
    if abs(x / y - 1) > 2 * rounding or abs(x - 1) < _RESIZED:
        return None
    return x, y


def _scale(annotation: Record, scale: tuple[float, float]) -> Record:
    scaled = dict(annotation)
    x, y = scale
    if is_box(box := annotation.get("bbox")):
        scaled["bbox"] = [n * s for n, s in zip(box, (x, y, x, y), strict=True)]
    if is_number(area := annotation.get("area")):
        scaled["area"] = area * x * y
    if isinstance(mask := annotation.get("segmentation"), list):
        scaled["segmentation"] = [_map_points(p, lambda points: points * scale) for p in mask]
    points = annotation.get("keypoints")
    if are_numbers(points) and len(points) % 3 == 0:
        triples = np.reshape(points, (-1, 3)) * (x, y, 1)
        scaled["keypoints"] = [
            int(n) if i % 3 == 2 else n for i, n in enumerate(triples.reshape(-1).tolist())
        ]
    return scaled


# Orientation of the pictures


def _turn(pairs: _Pairs, frames: Mapping[int | str, Frame], findings: Findings) -> list[Record]:
    boxes: dict[str, list[Any]] = {}
    for _, annotation, frame in _each(pairs):
        if sample := sample_of(annotation, frame.size):
            boxes.setdefault(frame.path, []).append(sample.box)
    turned = {
        frame.path: TurnedFile(
            frame.file.stored_size,
            frame.file.orientation,
            path=frame.path,
            given_size=frame.given,
            boxes=boxes.get(frame.path, []),
        )
        for frame in frames.values()
        if frame.file.orientation != 1
    }
    verdicts = judge(turned.values())
    for frame in {f.path: f for f in frames.values() if f.path in turned}.values():
        where = f"{frame.name}: orientation {frame.file.orientation}"
        if verdicts[frame.path] == "stored":
            findings.add("annotations_turned", where)
        elif verdicts[frame.path] == "unclear" and boxes.get(frame.path):
            findings.add("turn_unclear", where)
        elif frame.given == frame.file.stored_size != frame.file.size:
            findings.add("image_size", f"{where}: the size is the one before the rotation")
    return [
        turn_annotation(a, turned[f.path]) if f and verdicts.get(f.path) == "stored" else a
        for a, f in pairs
    ]
