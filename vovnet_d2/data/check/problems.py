# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The problems that a data set can have, and those that were found in one."""

from collections import Counter, defaultdict
from enum import Enum
from functools import partial
from typing import NamedTuple

from .crowding import DEFAULT_LIMIT

_MAX_EXAMPLES = 5


class Severity(str, Enum):
    """The severity of a problem.

    An error stops training or evaluation, or makes the result silently wrong. A warning means that
    training silently loses or alters the record. A note is harmless.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    def __str__(self) -> str:  # a StrEnum, which Python 3.10 lacks
        return self.value


class Problem(NamedTuple):
    """A kind of problem: its severity, its title, and what the corrected copy does about it."""

    severity: Severity
    title: str
    repair: str = ""


_error = partial(Problem, Severity.ERROR)
_warning = partial(Problem, Severity.WARNING)
_note = partial(Problem, Severity.NOTE)

PROBLEMS: dict[str, Problem] = {
    # the file
    "json": _error("the annotation file cannot be read"),
    "encoding": _warning(
        "the annotation file is not plain UTF-8: the tools here take it, but Detectron2's loader "
        "and pycocotools stop at it",
        "written as UTF-8",
    ),
    "section": _error("lists of the file that are missing or not lists", "taken as empty"),
    "record": _error("entries that are not objects", "dropped"),
    "empty": _error("nothing to train on"),
    "foreign_file": _error(
        "annotation files of other data than the name says: give such data by "
        "--train-annotations and --train-images, or --val-annotations and --val-images"
    ),
    # categories
    "category_id": _error("categories without an id", "dropped"),
    "category_id_type": _error(
        "category ids that are not whole numbers of up to 63 bits, or not all text", "numbered"
    ),
    "category_ids_text": _note(
        "category ids that are text: fine here, but other tools may need numbers"
    ),
    "large_id": _note("ids of more than 53 bits: fine here, but other tools may round them"),
    "duplicate_category_id": _error(
        "categories that share an id", "the last kept, as pycocotools does"
    ),
    "category_name": _error("categories without a name that can be written", "named by their ids"),
    "duplicate_category_name": _warning("categories that share a name", "the id added to the name"),
    "category_gaps": _note("category ids are not 1, 2, 3, ...: fine, Detectron2 maps them"),
    "unused_category": _note("categories without annotations"),
    "unused_supercategory": _warning(
        "categories without annotations that are the supercategory of others: each takes a class "
        "of the network",
        "dropped",
    ),
    # images
    "image_id": _error("images without an id", "dropped"),
    "image_id_type": _error(
        "image ids that are not whole numbers of up to 63 bits, or not all text", "numbered"
    ),
    "image_ids_text": _note("image ids that are text: fine here, but other tools may need numbers"),
    "duplicate_image_id": _error(
        "different images that share an id, so that annotations cannot be assigned", "dropped"
    ),
    "repeated_image": _error("images that are listed twice with the same id", "one kept"),
    "duplicate_file_name": _warning("images that share a file under several ids", "made one"),
    "file_name": _error("images without a file name", "dropped"),
    "path_outside": _error("paths that leave the image folder", "dropped"),
    "near_name": _error(
        "file names that differ from the files' in slashes, case, suffix, Unicode form, or the "
        "folder or address before them",
        "the files' names taken",
    ),
    "missing_file": _error("image files that are missing", "dropped"),
    "unreadable_file": _error("image files that cannot be read", "dropped"),
    "no_size": _error("images without a whole width and height above 0", "taken from the file"),
    "image_size": _error("sizes that differ from the file's", "taken from the file"),
    "annotations_turned": _error(
        "annotations of the stored pictures, which EXIF turns before training sees them",
        "turned with the pictures",
    ),
    "turn_unclear": _warning(
        "pictures that EXIF turns, and whose annotations may be of the picture as it is stored: "
        "neither the sizes nor the boxes show it (look with tools/visualize_data.py; to train on "
        "the stored pictures, remove their EXIF orientation)"
    ),
    "resized": _error(
        "annotations for another size of the pictures, which were resized later", "scaled"
    ),
    "deep_pixels": _note("images of 16 bits: reading takes the upper 8"),
    "dark_pixels": _warning(
        "images of 16 bits that use only the lower 12, so the upper 8 are almost black: spread "
        "the values to 0 to 65535, or write 8 bits"
    ),
    "same_content": _note("image files that equal another of the set"),
    "no_annotations": _note(
        "images without annotations: left out of training unless "
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
    ),
    # annotations
    "annotation_id": _error("annotation ids that are missing or not whole numbers", "numbered"),
    "duplicate_annotation_id": _error("annotations that share an id", "numbered anew"),
    "annotation_id_zero": _warning(
        "annotation ids of 0, which pycocotools takes for no match", "numbered anew"
    ),
    "no_image_id": _error("annotations without the id of an image", "dropped"),
    "unknown_image": _warning("annotations of images that are not listed", "dropped"),
    "lost_with_image": _note("annotations of images that cannot be used; they are dropped too"),
    "unknown_category": _error("annotations of categories that are not listed", "dropped"),
    "reference_type": _error(
        "references to ids that are text where the ids are numbers, or numbers where they are text",
        "made what the ids are",
    ),
    "ignore": _error('annotations with "ignore", which Detectron2 refuses', "made crowds"),
    "iscrowd": _error('"iscrowd" missing (evaluation stops) or neither 0 nor 1', "0"),
    "crowd": _note("crowds: training leaves them out, and evaluation ignores detections there"),
    "repeated_annotation": _warning("annotations that repeat another", "dropped"),
    # all annotations together
    "box_convention": _error(
        "boxes that are not x, y, width, height in pixels, all for one reason", "rewritten"
    ),
    "box_convention_unclear": _error(
        "boxes that are not x, y, width, height in pixels, and may be several other things"
    ),
    "polygon_convention": _error(
        "polygons that are not x, y, ... in pixels, all for one reason", "rewritten"
    ),
    "systematic": _error(
        "one problem with most of the annotations, so they have one cause: fix the program that "
        "writes the file, and not each annotation"
    ),
    # boxes
    "box": _error(
        "boxes that are missing or not four numbers", "taken from the mask, or else dropped"
    ),
    "degenerate_box": _warning(
        "boxes without width and height above 0", "taken from the mask, or else dropped"
    ),
    "box_outside": _warning("boxes that reach beyond the image", "clipped"),
    "box_beyond": _warning("boxes wholly beyond the image", "dropped"),
    "box_and_mask": _warning("boxes that do not fit their mask", "taken from the mask"),
    "tiny_box": _note("boxes with a side below 4 pixels after the resize of training"),
    "area": _error("areas that are missing (evaluation stops) or not above 0", "computed"),
    # masks
    "segmentation": _error("masks that are neither polygons nor RLE", "dropped"),
    "flat_polygon": _error("polygons that are not in a list of polygons", "put in one"),
    "polygon": _warning(
        "polygons of an odd count of numbers or of fewer than three points", "dropped"
    ),
    "polygon_numbers": _error("polygons with a value that is not a number", "dropped"),
    "polygon_outside": _warning("polygons that reach beyond the image", "clipped"),
    "rle": _error("RLE that is malformed", "dropped"),
    "rle_size": _error("RLE of another size than the image", "dropped"),
    "empty_mask": _warning("masks without a pixel", "dropped"),
    "missing_mask": _warning("annotations without a mask", "dropped"),
    "box_without_mask": _note(
        "objects without a mask, where others have one: kept with their boxes. For a network that "
        "learns masks check with --masks"
    ),
    "box_masks": _warning(
        "masks that are all rectangles, no more than their boxes: a network that learns masks from "
        "them learns to draw boxes (polygons or RLE along the objects are needed, or a config of "
        "Faster R-CNN or RetinaNet)"
    ),
    "box_masks_unused": _note(
        "masks that are all rectangles, no more than their boxes: fine for a network that learns "
        "boxes. For one that learns masks check with --masks"
    ),
    "rle_masks": _note("RLE masks of objects: for Mask R-CNN set INPUT.MASK_FORMAT bitmask"),
    # keypoints
    "keypoints": _error(
        "keypoints that are missing, not numbers, or of the wrong length", "marked as not labelled"
    ),
    "keypoint_outside": _warning("keypoints beyond the image", "marked as not labelled"),
    "num_keypoints": _error('"num_keypoints" missing or wrong', "counted"),
    # images
    "crowded": _note(
        f"images with more objects than the {DEFAULT_LIMIT} detections that a network gives and an "
        "evaluation counts by default"
    ),
    # between two sets
    "leaked_file": _error("image files that are also in another set", "dropped from the first set"),
    "near_duplicate": _note(
        "images of the second set that look like one of the first: look at these pairs"
    ),
    "all_alike": _note(
        "images of the second set that look like one of the first. The images of the first set "
        "also look like each other, as from a fixed camera, so that looks do not show copies. Make "
        "sure that the sets are of other times or places; an evaluation says nothing about other "
        "cameras"
    ),
    "same_name": _note("file names that are also in another set, for other pictures"),
    "categories_differ": _error("categories of names that another set does not have"),
    "category_ids_differ": _warning(
        "categories with the names of another set, but under other ids or not all of them",
        "the categories of the first set taken",
    ),
}
"""All problems that the check looks for. A problem without a repair must be fixed by hand. Notes do
not count as problems."""


class Findings:
    """Counts the problems that were found, with the first examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, problem: str, where: str, count: int = 1) -> None:
        """Count a problem, a key of :data:`PROBLEMS`; ``where`` tells where it is, in words."""
        self.counts[problem] += count
        examples = self.examples[problem]
        if len(examples) < _MAX_EXAMPLES:
            examples.append(where)

    def found(self, *severities: Severity) -> list[str]:
        """Return the problems of these severities that were found, in the table's order."""
        return [
            name
            for name, problem in PROBLEMS.items()
            if self.counts[name] and problem.severity in severities
        ]
