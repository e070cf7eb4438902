# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Annotations are repaired: their ids and references, boxes, masks and keypoints."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .conventions import boxes_agree
from .masks import TOLERANCE, is_empty_mask, mask_area, mask_box, repair_mask
from .problems import Findings
from .values import Numbering, are_numbers, as_id, is_box, is_number, is_whole

Record = dict[str, Any]
Linked = tuple[str, Record, Record]
"""A description of an annotation for messages, the annotation, and its image."""

# Detectron2's filter_empty_instances drops boxes with a side up to this length.
_EMPTY = 1e-5
# The stride of the finest feature map of a detector with an FPN.
_TINY = 4


def repair_annotations(
    annotations: list[Record],
    images: Mapping[int | str, Record | None],
    categories: Mapping[int | str, Record],
    resize: tuple[int, int],
    findings: Findings,
    *,
    masks: bool,
) -> list[Record]:
    """Repair annotations, and leave out the annotations that cannot be trained on.

    Args:
        annotations: the annotations as the file has them.
        images: the repaired images by their ids in the file; None for an image that is dropped.
        categories: the repaired categories by their ids in the file.
        resize: ``INPUT.MIN_SIZE_TRAIN`` and ``INPUT.MAX_SIZE_TRAIN``.
        findings: gets the problems.
        masks: True for a network that learns masks. Then objects without a mask are dropped.

    Returns:
        the annotations that can be trained on, with the ids of ``images`` and ``categories``.
    """
    found = [
        (where, annotation, image)
        for where, annotation, image in link_annotations(annotations, images, categories, findings)
        if _repair_segmentation(annotation, image, where, findings) or not masks
    ]
    found = list(_complete_masks(found, findings, masks=masks))
    found = [entry for entry in found if _repair_box(*entry, findings)]
    for where, annotation, image in found:
        _repair_area(annotation, image, where, findings)
        _note_tiny_box(annotation, image, resize, where, findings)
    _repair_keypoints(found, {c["id"]: c for c in categories.values()}, findings)
    repair_ids(found, findings)
    return list(_without_repetitions(found, findings))


# References


def link_annotations(
    annotations: list[Record],
    images: Mapping[int | str, Record | None],
    categories: Mapping[int | str, Record],
    findings: Findings,
) -> list[Linked]:
    """Find the image and the category of each annotation, and repair its "iscrowd". For the
    arguments see :func:`repair_annotations`.

    Returns:
        copies of the annotations whose image and category can be used, with the repaired ids of the
        image and the category.
    """
    found = []
    for where, annotation, image in _with_images(annotations, images, findings):
        category = _find(annotation, "category_id", categories, where, findings)
        if category is None:
            findings.add("unknown_category", f"{where}: {annotation.get('category_id')!r:.40}")
            continue
        annotation |= {"image_id": image["id"], "category_id": category["id"]}
        _repair_flags(annotation, where, findings)
        found.append((where, annotation, image))
    return found


def _with_images(
    annotations: list[Record], images: Mapping[int | str, Record | None], findings: Findings
) -> Iterator[Linked]:
    for index, original in enumerate(annotations):
        where = f"annotation {original.get('id', f'at position {index}')!r:.40}"
        key = as_id(original.get("image_id"))
        if key is None or key not in images:
            problem = "no_image_id" if key is None else "unknown_image"
            findings.add(problem, f"{where}: image {original.get('image_id')!r:.40}")
            continue
        image = _find(original, "image_id", images, where, findings)
        if image is None:
            findings.add("lost_with_image", f"{where}: image {original.get('image_id')!r:.40}")
        else:
            yield f"{where} of {image['file_name']}", dict(original), image


def _find(
    annotation: Record,
    key: str,
    records: Mapping[int | str, Any],
    where: str,
    findings: Findings,
) -> Record | None:
    raw = annotation.get(key)
    meant = as_id(raw)
    if meant is None or meant not in records:
        return None
    found = records[meant]
    as_text = found is not None and isinstance(found["id"], str)
    if isinstance(raw, str) != as_text and isinstance(meant, int) and found is not None:
        findings.add("reference_type", f"{where}: {key} is {raw!r}")
    return found


def _repair_flags(annotation: Record, where: str, findings: Findings) -> None:
    crowd = annotation.get("iscrowd")
    if crowd not in (0, 1):
        findings.add("iscrowd", f"{where}: {crowd!r:.40}")
        crowd = 0
    if ignore := annotation.pop("ignore", 0):
        findings.add("ignore", f"{where}: {ignore!r:.40}")
        crowd = 1
    annotation["iscrowd"] = int(crowd)
    if crowd:
        findings.add("crowd", where)


# Masks


def _repair_segmentation(annotation: Record, image: Record, where: str, findings: Findings) -> bool:
    """Repair the mask, or remove it; return False if a mask was removed."""
    value = annotation.pop("segmentation", None)
    if is_empty_mask(value):
        return True
    mask = repair_mask(value, image["height"], image["width"], where, findings)
    if mask is None:
        return False
    annotation["segmentation"] = mask
    if isinstance(mask, dict) and not annotation["iscrowd"]:
        findings.add("rle_masks", where)
    return True


def _complete_masks(found: list[Linked], findings: Findings, *, masks: bool) -> Iterator[Linked]:
    """Report or drop objects without masks. Mask R-CNN stops at a batch in which only some objects
    have masks."""
    any_masks = any("segmentation" in annotation for _, annotation, _ in found)
    for entry in found:
        missing = (masks or any_masks) and "segmentation" not in entry[1]
        if missing:
            findings.add("missing_mask" if masks else "box_without_mask", entry[0])
        if not (missing and masks):
            yield entry


# Boxes


def _repair_box(where: str, annotation: Record, image: Record, findings: Findings) -> bool:
    """Bring the box into the image and around the mask; return False if the annotation is
    dropped."""
    height, width = image["height"], image["width"]
    mask = annotation.get("segmentation")
    around = mask_box(mask, height, width) if mask else None
    box = annotation.get("bbox")
    if not is_box(box):
        findings.add("box", f"{where}: {box!r:.60}")
        box = around
    elif not min(box[2:]) > 0:
        findings.add("degenerate_box", f"{where}: {box}")
        box = around
    if box is None:
        return False
    clipped = _clip(box, height, width)
    if min(clipped[2:]) <= _EMPTY:
        problem = "box_beyond" if max(map(abs, clipped)) < max(map(abs, box)) else "degenerate_box"
        findings.add(problem, f"{where}: {box} in an image of {width} x {height}")
        return False
    if max(abs(a - b) for a, b in zip(_corners(box), _corners(clipped), strict=True)) > TOLERANCE:
        findings.add("box_outside", f"{where}: {box} in an image of {width} x {height}")
        box = clipped
    if around and not boxes_agree(np.array(around), np.array(box)):
        findings.add("box_and_mask", f"{where}: {box}, the mask {around}")
        box = around
    annotation["bbox"] = box
    return True


def _corners(box: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _clip(box: list[float], height: int, width: int) -> list[float]:
    x1, y1, x2, y2 = _corners(box)
    x1, x2 = (min(max(x, 0), width) for x in (x1, x2))
    y1, y2 = (min(max(y, 0), height) for y in (y1, y2))
    return [x1, y1, x2 - x1, y2 - y1]


def _note_tiny_box(
    annotation: Record, image: Record, resize: tuple[int, int], where: str, findings: Findings
) -> None:
    shorter, longer = sorted((image["height"], image["width"]))
    scale = min(resize[0] / shorter, resize[1] / longer)
    if scale * min(annotation["bbox"][2:]) < _TINY:
        findings.add("tiny_box", f"{where}: {annotation['bbox']}")


def _repair_area(annotation: Record, image: Record, where: str, findings: Findings) -> None:
    area = annotation.get("area")
    if is_number(area) and area > 0:
        return
    findings.add("area", f"{where}: {area!r:.40}")
    box_area = annotation["bbox"][2] * annotation["bbox"][3]
    mask = annotation.get("segmentation")
    # A very thin polygon may not cover the centre of any pixel.
    pixels = mask_area(mask, image["height"], image["width"]) if mask else 0
    annotation["area"] = pixels or box_area


# Keypoints


def _repair_keypoints(
    found: list[Linked], categories: Mapping[int, Record], findings: Findings
) -> None:
    declared = {
        key: 3 * len(category["keypoints"])
        for key, category in categories.items()
        if isinstance(category.get("keypoints"), list)
    }
    lengths = Counter(len(a["keypoints"]) for _, a, _ in found if _are_keypoints(a))
    usual = lengths.most_common(1)[0][0] if lengths else 0
    for where, annotation, image in found:
        length = declared.get(annotation["category_id"], 0)
        if not length and "keypoints" in annotation:
            length = usual
        if length:
            _repair_points(annotation, image, length, where, findings)
        elif "keypoints" in annotation:
            findings.add("keypoints", f"{where}: {annotation.pop('keypoints')!r:.40}")


def _are_keypoints(annotation: Record) -> bool:
    points = annotation.get("keypoints")
    if not are_numbers(points) or not points or len(points) % 3:
        return False
    return all(visibility in (0, 1, 2) for visibility in points[2::3])


def _repair_points(
    annotation: Record, image: Record, length: int, where: str, findings: Findings
) -> None:
    if not _are_keypoints(annotation) or len(annotation["keypoints"]) != length:
        points = annotation.get("keypoints")
        what = f"{len(points)} numbers" if isinstance(points, list) else f"{points!r:.40}"
        findings.add("keypoints", f"{where}: {what}, not {length}")
        annotation["keypoints"] = [0] * length
    points = list(annotation["keypoints"])
    for index in range(0, length, 3):
        x, y, visibility = points[index : index + 3]
        inside = 0 <= x <= image["width"] and 0 <= y <= image["height"]
        if visibility and not inside:
            findings.add("keypoint_outside", f"{where}: {x}, {y}")
            points[index : index + 3] = [0, 0, 0]
    labelled = sum(visibility > 0 for visibility in points[2::3])
    if not is_whole(annotation.get("num_keypoints")) or annotation["num_keypoints"] != labelled:
        findings.add(
            "num_keypoints", f"{where}: {annotation.get('num_keypoints')!r:.40} for {labelled}"
        )
    annotation |= {"keypoints": points, "num_keypoints": labelled}


# Ids


def repair_ids(found: list[Linked], findings: Findings) -> None:
    """Give each annotation a unique whole number as its id."""
    numbering = Numbering(as_id(annotation.get("id")) for _, annotation, _ in found)
    seen: set[int] = set()
    for where, annotation, _ in found:
        raw = annotation.get("id")
        number = as_id(raw)
        if not is_whole(raw):
            findings.add("annotation_id", f"{where}: {raw!r:.40}")
        if isinstance(number, int) and number in seen:
            findings.add("duplicate_annotation_id", where)
        elif number == 0:
            findings.add("annotation_id_zero", where)
        if not isinstance(number, int) or number == 0 or number in seen:
            number = numbering.new()
        seen.add(number)
        annotation["id"] = number


def _without_repetitions(found: list[Linked], findings: Findings) -> Iterator[Record]:
    known: defaultdict[tuple[Any, ...], set[str]] = defaultdict(set)
    for where, annotation, _ in found:
        mask = json.dumps(annotation.get("segmentation"))
        key = (annotation["image_id"], annotation["category_id"], *annotation["bbox"])
        others = known[key]
        if mask in others:
            findings.add("repeated_annotation", where)
            continue
        others.add(mask)
        yield annotation
