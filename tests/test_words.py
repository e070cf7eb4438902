# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the functions that write words of messages."""

from pathlib import Path

import pytest

from vovnet_d2.words import counted, listed, suggest, suggest_path


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


def test_close_paths_are_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "train.txt").touch()
    for missing, close in {
        "dat": "data",
        "data/images/trian.txt": "data/images/train.txt",
        "data/image/train.txt": "data/images/train.txt",  # the folder has the wrong name
        "data/image/other.txt": "data/images",
        "./data/../dataa/": "data/../data",
        str(tmp_path / "datas"): str(tmp_path / "data"),
    }.items():
        assert suggest_path(missing) == f" Close to it: {close!r}."
    for missing in ("xyz", "data/images/labels.csv", "", "/xyz-is-not-there"):
        assert suggest_path(missing) == ""


def test_a_path_of_another_kind_is_not_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask for a file where a folder is, for a folder where a file is, and for a broken link."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.json").touch()
    (tmp_path / "link").symlink_to("gone.json")
    for path, sentence in {
        "folder": "'folder' is a folder.",
        "folder/": "'folder' is a folder.",
        "file.json": "'file.json' is a file.",
        "file.json/": "'file.json' is a file.",
        "file.json/images": "'file.json' is a file.",
        str(tmp_path / "file.json"): f"'{tmp_path / 'file.json'}' is a file.",
        "link": "'link' is a link to 'gone.json', which does not exist.",
        "link/images": "'link' is a link to 'gone.json', which does not exist.",
    }.items():
        assert suggest_path(path) == f" {sentence}"
    for path in (".", "/"):  # no part of these paths is missing
        assert suggest_path(path) == ""


def test_names_in_very_large_folders_are_not_compared(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"{number:06d}.jpg").touch()
    assert "'{}'".format(tmp_path / "000700.jpg") in suggest_path(tmp_path / "000700.jpeg")
    (tmp_path / "one more").touch()
    assert suggest_path(tmp_path / "000700.jpeg") == ""
