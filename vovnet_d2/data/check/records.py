# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Categories and images are repaired: ids, names, files and sizes."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from ..image_file import read_header
from .files import ImageFile, inspect_files, resolve_inside
from .names import NearNames
from .problems import Findings
from .values import Numbering, as_id, is_id, is_number, is_text, is_whole

Record = dict[str, Any]


def _group_by_id(
    records: list[Record], kind: str, findings: Findings
) -> dict[int | str, list[Record]]:
    """Group records by the ids that are meant, see :func:`as_id`. Each record gets a whole number
    as its id. If all records have text as ids, they keep it."""
    groups: defaultdict[int | str, list[Record]] = defaultdict(list)
    numbering = Numbering(as_id(record.get("id")) for record in records)
    raw_ids = [record.get("id") for record in records]
    all_text = all(isinstance(raw, str) and raw.strip() for raw in raw_ids)
    if all_text and records:
        findings.add(f"{kind}_ids_text", f"for example {raw_ids[0]!r:.40}", len(records))
    for index, (record, raw) in enumerate(zip(records, raw_ids, strict=True)):
        meant = as_id(raw)
        if meant is None:
            findings.add(f"{kind}_id", f"{kind} at position {index}: {raw!r:.40}")
            continue
        if not is_whole(raw) and not all_text:
            findings.add("large_id" if is_id(raw) else f"{kind}_id_type", f"{kind} {raw!r:.40}")
        groups[meant].append(record | {"id": raw if all_text else numbering.of(meant)})
    return dict(groups)


# Categories


def repair_categories(records: list[Record], findings: Findings) -> dict[int | str, Record]:
    """Repair the ids and the names of the categories, and note their problems. Return them by their
    ids in the file. Each category has a unique id and a unique name."""
    found: dict[int | str, Record] = {}
    for meant, group in _group_by_id(records, "category", findings).items():
        if len(group) > 1:
            names = ", ".join(f"{category.get('name')!r:.40}" for category in group)
            findings.add("duplicate_category_id", f"category {meant!r}: {names}")
        found[meant] = group[-1]
    for category in found.values():
        if is_number(category.get("name")):  # training takes names as text
            category["name"] = str(category["name"])
        if not is_text(category.get("name")):
            findings.add("category_name", f"category {category['id']}: {category.get('name')!r}")
            category["name"] = f"category {category['id']}"
    _repair_names(list(found.values()), findings)
    ids = sorted(category["id"] for category in found.values())
    if ids and is_id(ids[0]) and ids != list(range(1, len(ids) + 1)):
        findings.add("category_gaps", f"{len(ids)} categories with ids from {ids[0]} to {ids[-1]}")
    return found


def _repair_names(categories: list[Record], findings: Findings) -> None:
    counts = Counter(category["name"] for category in categories)
    taken = set(counts)
    for category in categories:
        name = category["name"]
        if counts[name] < 2:
            continue
        findings.add("duplicate_category_name", f"category {category['id']}: {name!r}")
        while category["name"] in taken:
            category["name"] += f" ({category['id']})"
        taken.add(category["name"])


def find_unused_supercategories(records: list[Record], used: Container[Any]) -> list[Record]:
    """Return the categories that others name as their supercategory and whose ids are not in
    ``used``."""
    pairs = [(record.get("supercategory"), record["name"]) for record in records]
    above = {name for name, own in pairs if isinstance(name, str) and name != own}
    return [r for r in records if r["id"] not in used and r["name"] in above]


# Images


def repair_images(
    records: list[Record], root: Path, title: str, findings: Findings
) -> tuple[dict[int | str, Record | None], dict[int, ImageFile]]:
    """Repair the records of the images, and note the problems of the records and the files. A
    progress bar has the title.

    Returns:
        the images by their ids in the file, with None for an image that cannot be used; and the
        image files by the repaired ids. Each file belongs to one image.
    """
    found = unique_images(records, findings)
    names = NearNames(root)
    _drop_unless(found, lambda image: _find_path(image, root, names, findings))
    _merge_by_file(found, root, findings)
    paths = {i["id"]: resolve_inside(root, i["file_name"]) for i in found.values() if i}
    inspected = inspect_files(paths.values(), title)
    files = {key: inspected[path] for key, path in paths.items()}
    _drop_unless(found, lambda image: _repair_size(image, files[image["id"]], findings))
    kept = {image["id"]: files[image["id"]] for image in found.values() if image}
    return found, kept


def unique_images(records: list[Record], findings: Findings) -> dict[int | str, Record | None]:
    """Return the images by their ids in the file, with None for an id that different images
    have."""
    groups = _group_by_id(records, "image", findings)
    return {meant: _choose(group, findings) for meant, group in groups.items()}


def _drop_unless(found: dict[int | str, Record | None], keep: Callable[[Record], bool]) -> None:
    for meant, image in found.items():
        if image and not keep(image):
            found[meant] = None


def _choose(group: list[Record], findings: Findings) -> Record | None:
    if len(group) == 1:
        return group[0]
    names = [image.get("file_name") for image in group]
    where = f"image {group[0]['id']}: {', '.join(f'{name!r:.40}' for name in names)}"
    if all(name == names[0] for name in names):
        findings.add("repeated_image", where)
        return group[0]
    findings.add("duplicate_image_id", where)
    return None


def has_file_name(image: Record, findings: Findings) -> bool:
    name = image.get("file_name")
    if isinstance(name, str) and name.strip():
        return True
    findings.add("file_name", f"image {image['id']}: {name!r:.40}")
    return False


def _find_path(image: Record, root: Path, names: NearNames, findings: Findings) -> bool:
    """Find the file of an image, and give the image its name; return False if there is none."""
    if not has_file_name(image, findings):
        return False
    name, where = image["file_name"], f"image {image['id']}"
    try:
        path = resolve_inside(root, name)
    except ValueError as error:
        if _rename(image, root, names, findings):
            return True
        findings.add("path_outside", f"{where}: {error}")
        return False
    if not os.path.isfile(path):
        if not os.path.isdir(path) and _rename(image, root, names, findings):
            return True
        what = "a folder" if os.path.isdir(path) else "missing"
        findings.add("missing_file", f"{where}: {name!r:.100} is {what}")
        return False
    return True


def _rename(image: Record, root: Path, names: NearNames, findings: Findings) -> bool:
    """Give the image the name of the only file that can be meant; return False if there is none."""
    near = names.find(image["file_name"])
    if near is None:
        return False
    try:
        header = read_header(resolve_inside(root, near))
    except (FileNotFoundError, ValueError):  # outside the folder, or no picture
        return False
    if (given := size_of(image)) and given not in (header.size, header.stored_size):
        return False  # a file of that name, but another picture
    where = f"image {image['id']}: {image['file_name']!r:.100} is {near!r:.100}"
    findings.add("near_name", where)
    image["file_name"] = near
    return True


def _merge_by_file(found: dict[int | str, Record | None], root: Path, findings: Findings) -> None:
    first: dict[str, Record] = {}
    for meant, image in found.items():
        if image is None:
            continue
        path = resolve_inside(root, image["file_name"])
        if path in first:
            where = f"images {first[path]['id']} and {image['id']}: {image['file_name']}"
            findings.add("duplicate_file_name", where)
        found[meant] = first.setdefault(path, image)


def _repair_size(image: Record, file: ImageFile, findings: Findings) -> bool:
    """Give the image the size of its file; return False if the file cannot be read."""
    if file.problem:
        findings.add("unreadable_file", f"{image['file_name']}: {file.problem:.200}")
        return False
    given = size_of(image) if has_size(image, findings) else None
    # frames.py handles a size from before the rotation that EXIF asks for.
    if given and given not in (file.size, file.stored_size):
        sizes = " and ".join(f"{w} x {h}" for w, h in (given, file.size))
        where = f"{image['file_name']}: {sizes}, in the JSON file and the image"
        findings.add("image_size", where)
    image["width"], image["height"] = file.size
    return True


def has_size(image: Record, findings: Findings) -> bool:
    if size_of(image):
        return True
    width, height = image.get("width"), image.get("height")
    findings.add("no_size", f"image {image['id']}: {width!r:.20} x {height!r:.20}")
    return False


def size_of(image: Record) -> tuple[int, int] | None:
    """Return width and height of an image; None if these are not whole numbers above 0."""
    width, height = image.get("width"), image.get("height")
    if is_whole(width) and is_whole(height) and width > 0 and height > 0:
        return width, height
    return None


def note_contents(
    images: Mapping[int, Record], files: Mapping[int, ImageFile], findings: Findings
) -> None:
    """Note files with deep or dark pixels, and files with the same content."""
    first: dict[str, str] = {}
    for key, file in files.items():
        name = images[key]["file_name"]
        if file.bits > 8:
            findings.add("deep_pixels", name)
        if file.dark:
            findings.add("dark_pixels", name)
        if file.digest in first:
            findings.add("same_content", f"{name} equals {first[file.digest]}")
        first.setdefault(file.digest, name)
