# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Custom keypoints: their names in annotation files, and the pairs that a mirrored image swaps."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)
from engine_runs import TINY, data_flags, quick, read_log
from PIL import Image

from vovnet_d2.data.keypoints import derive_flips, parse_flips
from vovnet_d2.data.mapper import build_mapper
from vovnet_d2.data.own import register_own_data
from vovnet_d2.engine import argument_parser, lazy, load_config, run
from vovnet_d2.engine.registered_data import register_data

pytest_plugins = ["engine_fixtures"]

CONFIG = "COCO-Keypoints/keypoint_rcnn_V_39_eSE_FPN_1x.yaml"
NAMES = ["nose", "left_ear", "right_ear", "tail"]
SIGMAS = ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1, 0.1]"]


# Pairs of keypoints


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["left_eye", "nose", "right_eye"], [("left_eye", "right_eye")]),
        (["REye", "LEye"], [("REye", "LEye")]),
        (["l_hip", "r_hip", "hip_R", "hip_L"], [("l_hip", "r_hip"), ("hip_R", "hip_L")]),
        (["leftEye", "rightEye", "Left Ear", "Right Ear"], [("leftEye", "rightEye"),
                                                            ("Left Ear", "Right Ear")]),
        (["LEFT-KNEE", "RIGHT-KNEE"], [("LEFT-KNEE", "RIGHT-KNEE")]),
        (["lefteye", "righteye", "eyeleft", "eyeright"], [("lefteye", "righteye"),
                                                          ("eyeleft", "eyeright")]),
        (["finger1_l", "finger1_r", "finger2_l", "finger2_r"],
         [("finger1_l", "finger1_r"), ("finger2_l", "finger2_r")]),
        (["l1", "r1", "l2"], [("l1", "r1")]),
        # These have no side: an "l" without a counterpart, and words that contain a name of a side.
        (["l", "neck", "upright", "leftover", "tail"], []),
    ],
)  # fmt: skip
def test_pairs_follow_from_the_names(names: list[str], pairs: list[tuple[str, str]]) -> None:
    assert list(derive_flips(names, mirrored=True)) == pairs


def test_pairs_of_coco_follow_from_its_names() -> None:
    found = derive_flips(COCO_PERSON_KEYPOINT_NAMES, mirrored=True)
    assert set(found) == set(COCO_PERSON_KEYPOINT_FLIP_MAP)


def test_a_side_without_a_counterpart() -> None:
    with pytest.raises(ValueError, match=r"'left_ear' has no counterpart .*--keypoint-flips"):
        derive_flips(["left_ear", "nose"], mirrored=True)
    assert derive_flips(["left_ear", "nose"], mirrored=False) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", ()),
        ("a:b", (("a", "b"),)),
        (" a : b , c:d", (("a", "b"), ("c", "d"))),
        ("a", "has 'a', which is not a pair"),
        ("a:b:c", "has 'a:b:c', which is not a pair"),
        ("a:b,c:aa", r"names 'aa', which is not a keypoint of the data\. Close to it: 'a'\."),
        ("a:b,b:c", "names 'b' twice"),
        ("a:a", "names 'a' twice"),
    ],
)
def test_pairs_of_a_command_line(text: str, expected: Any) -> None:
    names = ["a", "b", "c", "d"]
    if isinstance(expected, tuple):
        assert parse_flips(text, names) == expected
        return
    with pytest.raises(ValueError, match=expected):
        parse_flips(text, names)


# Files


def make_content(split: str) -> dict[str, Any]:
    """Return annotations of two kinds of animals. Only one kind has keypoints."""
    rng = np.random.default_rng(0)
    annotations = []
    for index in range(8):
        x, y = 4 * index, 3 * index
        points = [[x + 4 + 6 * i, y + int(rng.integers(2, 24)), 1 + i % 2] for i in range(4)]
        shared = {"id": index + 1, "image_id": index // 2 + 1, "bbox": [x, y, 30, 26]}
        shared |= {"area": 780, "iscrowd": 0, "category_id": 1 + index % 2}
        if index % 2:
            shared |= {"keypoints": [n for point in points for n in point], "num_keypoints": 4}
        annotations.append(shared)
    categories = [{"id": 1, "name": "snail"}, {"id": 2, "name": "dog", "keypoints": NAMES}]
    images = [
        {"id": i, "file_name": f"{split}{i}.png", "height": 64, "width": 80} for i in range(1, 5)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def dogs(catalogs: None, tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for split in ("train", "val"):
        content = make_content(split)
        for image in content["images"]:
            pixels = np.random.default_rng(image["id"]).integers(0, 255, (64, 80, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / image["file_name"])
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    return tmp_path


def flags(root: Path, *splits: str) -> list[str]:
    return data_flags(root, "images", *splits)


def setup(words: list[str], *options: str, config: str = CONFIG) -> CfgNode:
    args = argument_parser().parse_args(["--config-file", config, *words, *options])
    cfg = load_config(config, args.opts)
    register_data(cfg, args, training=True)
    return cfg


def test_a_run_with_custom_keypoints(dogs: Path, fresh_logging: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [*TINY, *SIGMAS, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(out)]
    options += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"]
    options += ["MODEL.VOVNET.CONV_BODY", "V-19-slim-eSE", "MODEL.WEIGHTS", ""]
    words = ["--config-file", CONFIG, *flags(dogs, "train", "val"), *options]
    results = run(argument_parser().parse_args(words))
    assert "AP" in results["keypoints"]
    assert (
        "Keypoints that are swapped in a mirrored picture (by their names; --keypoint-flips "
        "overrules this): left_ear and right_ear. Those that stay: nose, tail." in read_log(out)
    )
    # The saved config has the keypoints, without files on the command line.
    cfg = load_config(str(out / "config.yaml"))
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 4
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    register_own_data(cfg.DATASETS.OWN)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        assert metadata.keypoint_names == NAMES
        assert metadata.keypoint_flip_map == [("left_ear", "right_ear")]
    words = ["--config-file", str(out / "config.yaml"), "--eval-only"]
    words += ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    with quick():
        again = run(argument_parser().parse_args([*words, "OUTPUT_DIR", str(tmp_path / "again")]))
    assert str(again) == str(results)


@pytest.mark.parametrize(
    ("flips", "order"),
    [(None, [0, 2, 1, 3]), ("none", [0, 1, 2, 3]), ("nose:tail", [3, 1, 2, 0])],
)
def test_keypoints_of_a_mirrored_picture_are_right(
    dogs: Path, flips: str | None, order: list[int]
) -> None:
    words = flags(dogs, "train") + (["--keypoint-flips", flips] if flips else [])
    cfg = setup(words, "INPUT.MIN_SIZE_TRAIN", "(64,)")
    record = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[0]
    points = np.reshape([a["keypoints"] for a in record["annotations"]], (2, 4, 3))
    assert (points[0] == 0).all()  # a snail has no keypoints
    mapper = build_mapper(cfg, is_train=True)
    mirrored = []
    for _ in range(20):
        found = mapper(copy.deepcopy(record))["instances"]
        if found.gt_boxes.tensor[1, 0] != record["annotations"][1]["bbox"][0]:
            mirrored.append(found.gt_keypoints.tensor[1].numpy())
    expected = points[1][order]
    expected[:, 0] = 80 - expected[:, 0]
    assert mirrored
    np.testing.assert_allclose(mirrored[0], expected)


def set_names(*names: Any) -> Callable[[dict], None]:
    return lambda content: content["categories"][1].update(keypoints=list(names))


SPOILT: dict[str, tuple[Callable[[dict], object], str]] = {
    "no names": (
        lambda c: c["categories"][1].pop("keypoints"),
        "no category names its keypoints",
    ),
    "other names": (
        lambda c: c["categories"][0].update(keypoints=["shell"]),
        "categories 'snail' and 'dog' have different keypoints",
    ),
    "names twice": (set_names("a", "b", "a", "c"), "'dog' has the keypoint 'a' twice"),
    "numbers for names": (set_names(1, 2, 3, 4), "keypoints of category 'dog' are not names"),
    "too few numbers": (
        lambda c: c["annotations"][1].update(keypoints=[1, 2, 2]),
        r"annotations\[1\] has 3 numbers for its keypoints, which are 4 x 3",
    ),
    "no numbers": (
        lambda c: c["annotations"][3].update(keypoints=["a"] * 12),
        r"annotations\[3\] has 12 numbers|annotations\[3\] has .* for its keypoints",
    ),
    "visibility": (
        lambda c: c["annotations"][1]["keypoints"].__setitem__(2, 3),
        r"annotations\[1\] has a visibility that is not 0, 1 or 2",
    ),
    "none labelled": (
        lambda c: [a.pop("keypoints", None) for a in c["annotations"]],
        "no object has a keypoint that is labelled",
    ),
    "labelled nowhere": (
        lambda c: [a.update(keypoints=[9, 9, 0] * 4) for a in c["annotations"][1::2]],
        "no object has a keypoint that is labelled",
    ),
    "one side": (set_names("nose", "left_ear", "ear", "tail"), "'left_ear' has no counterpart"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_files_that_cannot_be_used(dogs: Path, name: str) -> None:
    spoil, message = SPOILT[name]
    content = make_content("train")
    spoil(content)
    (dogs / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"train.json.*{message}"):
        setup(flags(dogs, "train"))
    # Keypoints do not matter for a network of boxes.
    setup(flags(dogs, "train"), config="COCO-Detection/faster_rcnn_V_39_eSE_FPN_1x.yaml")


def test_a_side_without_a_counterpart_if_nothing_is_mirrored(dogs: Path) -> None:
    content = make_content("train")
    set_names("nose", "left_ear", "ear", "tail")(content)
    (dogs / "train.json").write_text(json.dumps(content))
    setup(flags(dogs, "train"), "INPUT.RANDOM_FLIP", "none")
    setup([*flags(dogs, "train"), "--keypoint-flips", "left_ear:ear"])


def test_names_without_sides_are_a_warning(dogs: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = make_content("train")
    set_names("k1", "k2", "k3", "k4")(content)
    (dogs / "train.json").write_text(json.dumps(content))
    setup([*flags(dogs, "train"), "--keypoint-flips", "none"])
    said = "No keypoints are swapped in a mirrored picture"
    assert not [r for r in caplog.records if said in r.message and r.levelname == "WARNING"]
    setup(flags(dogs, "train"))
    (warning,) = (r for r in caplog.records if said in r.message and r.levelname == "WARNING")
    assert "(by their names; --keypoint-flips overrules this): all 4 stay, k1, " in warning.message


def test_other_keypoints_to_evaluate_on(dogs: Path) -> None:
    content = make_content("val")
    set_names("nose", "right_ear", "left_ear", "tail")(content)
    (dogs / "val.json").write_text(json.dumps(content))
    message = "val.json has the keypoints nose, right_ear, .* trained on nose, left_ear, right_ear"
    with pytest.raises(ValueError, match=message):
        setup(flags(dogs, "train", "val"))


@pytest.mark.parametrize(
    ("config", "splits", "options", "message"),
    [
        (
            CONFIG,
            ["train"],
            ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "4"],
            "NUM_KEYPOINTS follows",
        ),
        (CONFIG, ["val"], [], "goes with annotations to train on"),
        (CONFIG, ["train"], [], "'lefd_ear', which is not a keypoint .* Close to it: 'left_ear'"),
        ("COCO-Detection/faster_rcnn_V_39_eSE_FPN_1x.yaml", ["train"], [], "needs a config with"),
    ],
)
def test_flips_that_are_refused(
    dogs: Path, config: str, splits: list[str], options: list[str], message: str
) -> None:
    words = [*flags(dogs, *splits), "--keypoint-flips", "lefd_ear:tail"]
    with pytest.raises(ValueError, match=message):
        setup(words, *options, config=config)


def test_a_lazy_config_has_its_own_flips(dogs: Path) -> None:
    """Check that the flips of a LazyConfig are used for its mapper."""
    cfg = load_config(CONFIG)
    args = lazy.lazy_argument_parser().parse_args(["--config-file", "x.py", *flags(dogs, "train")])
    with pytest.raises(ValueError, match=r"keypoint_hflip_indices.*tools/train_net\.py"):
        lazy.LazyTask(args)._register_data(cfg)
