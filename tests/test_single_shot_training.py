# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training, resume, evaluation and export of RefineDet and DSOD."""

from pathlib import Path

import pytest
import torch
from engine_runs import launch, read_log
from export_models import pictures
from test_export_detectors import assert_same_detections
from test_single_shot_models import build_tiny

from vovnet_d2 import Predictor
from vovnet_d2.export import export, load, select_target

pytest_plugins = ["engine_fixtures"]

REFINEDET = "COCO-Detection/refinedet320_V_39_400k.yaml"
DSOD = "PascalVOC-Detection/dsod300_V_27_slim_100k.yaml"
COCO = [
    *["DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "('coco_2017_val',)"],
    *["MODEL.SINGLE_SHOT.NUM_CLASSES", "80", "INPUT.FIXED_SIZE", "128", "SEED", "1"],
    *["MODEL.SINGLE_SHOT.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "20"],
    *["MODEL.SINGLE_SHOT.EXTRA_CHANNELS", "[16, 16, 16]", "MODEL.REFINEDET.EXTRA_CHANNELS", "16"],
    *["MODEL.REFINEDET.TCB_CHANNELS", "16", "MODEL.REFINEDET.HEAD_CHANNELS", "16"],
    *["MODEL.VOVNET.STEM_CHANNELS", "(8, 8, 8)", "MODEL.VOVNET.LAYERS_PER_BLOCK", "1"],
    *["MODEL.VOVNET.STAGE_MID_CHANNELS", "(8, 8, 8, 8)"],
    *["MODEL.VOVNET.STAGE_OUT_CHANNELS", "(8, 8, 8, 8)"],
    *["SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.002", "SOLVER.STEPS", "()"],
    *["SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "0"],
]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model_final.pth", weights_only=False)["model"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [REFINEDET, DSOD])
def test_training_resuming_and_evaluating(coco: Path, tmp_path: Path, config: str) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    results = launch(config, whole, options=COCO, pictures=True)
    assert set(results["bbox"]) >= {"AP", "AP50"}
    log = read_log(whole)
    assert "SamplerCrop" in log
    assert "Resize" in log
    # The options include SSD's augmentation, whose random numbers depend on the iteration only.
    launch(config, halves, "SOLVER.MAX_ITER", "2", options=COCO)
    launch(config, halves, "--resume", options=COCO)
    first, second = weights(whole), weights(halves)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = launch(
        config, tmp_path / "eval", "--eval-only", "MODEL.WEIGHTS", str(whole / "model_final.pth"),
        options=COCO,
    )  # fmt: skip
    assert again["bbox"]["AP"] == pytest.approx(results["bbox"]["AP"], nan_ok=True)
    assert (whole / "predictions.png").exists()

    # The predictor finds the same as the model in the resized image.
    image = next((coco / "coco" / "val2017").iterdir())
    predictor = Predictor(whole / "config.yaml", weights=whole / "model_final.pth", device="cpu")
    found = predictor(str(image))["instances"]
    assert 0 < len(found) <= 20
    assert found.image_size == (64, 80)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
@pytest.mark.parametrize("kind", ["refinedet", "dsod"])
def test_exported(tmp_path: Path, kind: str, format: str) -> None:
    options = {"MODEL__SINGLE_SHOT__SCORE_THRESH_TEST": 0.5, "TEST__DETECTIONS_PER_IMAGE": 5000}
    model = build_tiny(kind, **options).eval()
    for name, parameter in model.head.named_parameters():
        if "logits" in name and parameter.dim() > 1:
            # Scores differ, so that rounding does not decide which boxes are kept.
            parameter.data *= {"refinedet": 4000, "dsod": 4}[kind]
    target = select_target(model, "detector")
    program = load(format, export(target, format, tmp_path / "detector").path)
    for picture in pictures():
        image, size = picture[0], (300, 200)
        with torch.no_grad():
            expected = model([{"image": image, "height": 300, "width": 200}])[0]["instances"]
        outputs = program(image, *map(torch.tensor, size))
        actual = dict(zip(target.output_names, outputs, strict=True))
        assert len(expected) > 5
        assert_same_detections(actual, expected)
