# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of detectors other than Faster R-CNN, Mask R-CNN and RetinaNet."""

import json
from pathlib import Path

import pytest
from coco_tasks import NUM_KEYPOINTS, add_tasks
from coco_tree import write_coco_tree
from detectron2.data.datasets.builtin import register_all_coco
from engine_runs import MASK_RCNN, TINY, launch, read_log

pytest_plugins = ["engine_fixtures"]

CASCADE = "COCO-InstanceSegmentation/cascade_mask_rcnn_V_39_eSE_FPN_1x.yaml"
FCOS = "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml"
GFL = "COCO-Detection/gfl_V_39_eSE_FPN_1x.yaml"
KEYPOINT = "COCO-Keypoints/keypoint_rcnn_V_39_eSE_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_V_39_eSE_1x.yaml"
SEMANTIC = "COCO-SemanticSegmentation/semantic_V_39_eSE_FPN_1x.yaml"

RCNN_LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
CASCADE_LOSSES = {f"loss_{name}_stage{i}" for name in ("cls", "box_reg") for i in range(3)}
# The losses and the evaluated tasks of each config. If there is only one loss, Detectron2 only
# logs the total loss.
DETECTORS = {
    CASCADE: (CASCADE_LOSSES | {"loss_rpn_cls", "loss_rpn_loc", "loss_mask"}, {"bbox", "segm"}),
    FCOS: ({"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}, {"bbox"}),
    GFL: ({"loss_gfl_cls", "loss_gfl_loc", "loss_gfl_dfl"}, {"bbox"}),
    KEYPOINT: (RCNN_LOSSES | {"loss_keypoint"}, {"bbox", "keypoints"}),
    PANOPTIC: (RCNN_LOSSES | {"loss_mask", "loss_sem_seg"}, {"bbox", "segm", "sem_seg"}),
    SEMANTIC: (set(), {"sem_seg"}),
}
OPTIONS = [
    *TINY,
    *["MODEL.WEIGHTS", ""],  # without weights of timm
    *["MODEL.FCOS.INFERENCE_TH_TEST", "0.0", "MODEL.FCOS.PRE_NMS_TOPK_TEST", "50"],
    *["MODEL.FCOS.NORM", "BN", "MODEL.FCOS.NUM_CONVS", "1", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"],
    *["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"],
]


@pytest.fixture(scope="session")
def tasks_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_coco_tree(tmp_path_factory.mktemp("tasks"))
    add_tasks(root)
    return root


@pytest.fixture
def tasks(catalogs: None, fresh_logging: None, tasks_root: Path) -> Path:
    register_all_coco(str(tasks_root))
    return tasks_root


def read_losses(out: Path, iteration: int) -> dict[str, float]:
    lines = map(json.loads, (out / "metrics.json").read_text().splitlines())
    (line,) = (line for line in lines if line["iteration"] == iteration and "total_loss" in line)
    return {name: value for name, value in line.items() if "loss" in name}


def mark(config: str) -> object:
    fast = config in (GFL, KEYPOINT)
    return pytest.param(config, marks=[] if fast else pytest.mark.slow, id=config.split("/")[1])


@pytest.mark.parametrize("config", [mark(config) for config in DETECTORS])
def test_trains_resumes_evaluates(tasks: Path, tmp_path: Path, config: str) -> None:
    """Train for two iterations, resume for one more, and evaluate again with the same results."""
    launch(config, tmp_path, "SOLVER.MAX_ITER", "2", options=OPTIONS)
    trained = launch(config, tmp_path, "--resume", options=OPTIONS, pictures=True)
    assert "2 of 3 iterations are done." in read_log(tmp_path)
    losses, evaluations = DETECTORS[config]
    logged = read_losses(tmp_path, iteration=2)
    assert logged.keys() == losses | {"total_loss"}
    assert all(0 < value < 1000 for value in logged.values())
    assert trained.keys() == evaluations

    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    evaluated = launch(config, tmp_path, "--eval-only", *weights, options=OPTIONS)
    assert str(evaluated) == str(trained)  # compared as text, because NaN is not equal to NaN
    assert (tmp_path / "predictions.png").is_file()
    if "keypoints" in evaluations:
        path = tmp_path / "inference" / "coco_instances_results.json"
        lengths = {len(p["keypoints"]) for p in json.loads(path.read_text())}
        assert lengths == {3 * NUM_KEYPOINTS}


@pytest.mark.slow
def test_masks_of_people(tasks: Path, tmp_path: Path) -> None:
    """Train masks on COCO's keypoint annotations, which also have polygons."""
    splits = {"TRAIN": "train", "TEST": "val"}
    data = {f"DATASETS.{key}": f"('keypoints_coco_2017_{split}',)" for key, split in splits.items()}
    words = [word for pair in data.items() for word in pair]
    results = launch(MASK_RCNN, tmp_path, *words, "MODEL.ROI_HEADS.NUM_CLASSES", "1")
    assert results.keys() == {"bbox", "segm"}
    assert read_losses(tmp_path, iteration=2).keys() >= RCNN_LOSSES | {"loss_mask"}
    found = json.loads((tmp_path / "inference" / "coco_instances_results.json").read_text())
    assert {(f["category_id"], "keypoints" in f) for f in found} == {(1, False)}


def test_fcos_in_mixed_precision(tasks: Path, tmp_path: Path) -> None:
    launch(FCOS, tmp_path, "SOLVER.AMP.ENABLED", "True", "DATASETS.TEST", "()", options=OPTIONS)
    assert read_losses(tmp_path, iteration=2)["total_loss"] < 1000


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (FCOS, ["MODEL.FCOS.NUM_CLASSES", "3"], "set MODEL.FCOS.NUM_CLASSES 80"),
        (FCOS, ["MODEL.FCOS.TOP_LEVELS", "1"], "MODEL.FCOS.IN_FEATURES asks for p7, but"),
        (FCOS, ["MODEL.FCOS.ASSIGNMENT", "a"], "ASSIGNMENT 'a' does not exist: choose from center"),
        (FCOS, ["MODEL.FCOS.LOSSES", "GFL"], "LOSSES 'GFL' does not exist: choose from fcos, gfl"),
        (GFL, ["MODEL.FCOS.REG_MAX", "0"], "MODEL.FCOS.REG_MAX is 0: give 1 or more"),
        (SEMANTIC, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"], "MODEL.SEM_SEG_HEAD.NUM_CLASSES 54"),
        (KEYPOINT, ["MODEL.CHANNELS_LAST", "True"], "needs MODEL.CHANNELS_LAST False"),
        (KEYPOINT, ["TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED False"),
    ],
)
def test_mistakes(tasks: Path, tmp_path: Path, config: str, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(config, tmp_path, *words, options=OPTIONS)


def test_no_predictions_names_the_threshold_of_fcos(tasks: Path, tmp_path: Path) -> None:
    launch(FCOS, tmp_path, "MODEL.FCOS.INFERENCE_TH_TEST", "0.99", options=OPTIONS)
    sentence = "no predictions above the score threshold (MODEL.FCOS.INFERENCE_TH_TEST 0.99)"
    assert sentence in read_log(tmp_path)
