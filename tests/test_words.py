# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the functions that write words of messages."""

from vovnet_d2.words import counted, listed, suggest


def test_a_number_and_its_noun() -> None:
    assert counted(2667, "problems") == "2,667 problems"
    assert counted(0, "boxes") == "0 boxes"
    singular = {"categories": "category", "boxes": "box", "classes": "class", "images": "image"}
    for plural, noun in singular.items():
        assert counted(1, plural) == f"1 {noun}"
        assert counted(2, plural) == f"2 {plural}"


def test_the_first_names_in_quotation_marks() -> None:
    assert listed(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert listed(["a", "b", "c", "d"]) == "'a', 'b', 'c', ..."
    assert listed([1, 2], most=1) == "1, ..."


def test_close_names_are_suggested() -> None:
    assert suggest("stage22", ["stage2", "stem"]) == " Close to it: 'stage2'."
    assert suggest("xyz", ["stage2", "stem"]) == ""
