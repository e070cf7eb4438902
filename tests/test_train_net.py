# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The launcher from its command line to its report, on the miniature COCO."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from coco_tree import COLORS, THINGS
from detectron2.modeling import build_model
from detectron2.utils import comm
from engine_runs import (
    FASTER_RCNN,
    MASK_RCNN,
    RETINANET,
    SHORT,
    TINY,
    launch,
    note_evaluated,
    read_log,
    tiny_config,
)
from PIL import Image

from vovnet_d2 import get_config_file
from vovnet_d2.engine import Trainer, argument_parser, load_config, main, run
from vovnet_d2.engine.gpu_memory import GpuMemoryError, explain_lack_of_memory

pytest_plugins = ["engine_fixtures"]

TOOL = Path(__file__).parents[1] / "tools" / "train_net.py"
KEEP_ALL = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]


def read_predictions(out: Path) -> list[dict]:
    return json.loads((out / "inference" / "coco_instances_results.json").read_text())


def train_resume_evaluate(config: str, out: Path, options: list[str]) -> None:
    """Train for two iterations, resume for one more, and evaluate again with the same results."""
    first = ["SOLVER.MAX_ITER", "2"]
    launch(config, out, *first, options=options)
    trained = launch(config, out, "--resume", options=options, pictures=True)
    predictions = read_predictions(out)
    assert f"Resumed from {out}/model_final.pth." in read_log(out)
    assert "2 of 3 iterations are done." in read_log(out)
    assert {p["category_id"] for p in predictions} <= {c["id"] for c in THINGS}
    assert len({p["category_id"] for p in predictions}) > 1

    weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    flags = ["--eval-only", "--auto-scale-lr"]
    evaluated = launch(config, out, *flags, *weights, options=options, pictures=True)
    assert str(evaluated) == str(trained)  # compared as text, because NaN is not equal to NaN
    assert read_predictions(out / "evaluation") == predictions
    trained_report = json.loads((out / "results.json").read_text())
    assert trained_report["run"]["kind"] == "training, 3 iterations, 1.2 epochs"
    report = json.loads((out / "evaluation" / "results.json").read_text())
    assert report["run"]["kind"] == "evaluation"
    assert report["run"]["config"] == config
    assert report["results"]["coco_2017_val"]["bbox"]["AP"] == evaluated["bbox"]["AP"]
    for name in ("loss_curve.png", "predictions.png", "evaluation/predictions.png"):
        Image.open(out / name).verify()


def test_a_thin_network(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_resume_evaluate(MASK_RCNN, tmp_path, TINY)
    start = "Starting training from iteration 0"
    shown, started, _ = capsys.readouterr().out.partition(start)
    assert started
    assert len(shown.splitlines()) <= 40
    # The log file has the whole texts, and the terminal shows their first lines.
    written = read_log(tmp_path).partition(start)[0]
    for title, content in (
        ("Running with full config", "BIAS_LR_FACTOR"),
        ("Model", "ConvNormAct("),
    ):
        assert re.search(rf"{title}: \(\d+ lines in {tmp_path}/log.txt\)\n", shown)
        assert content not in shown
        assert content in written


def test_the_fast_network_is_evaluated(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(RETINANET, tmp_path, options=TINY)
    expected = read_predictions(tmp_path)
    evaluated = note_evaluated(monkeypatch)
    options = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), "TEST.OPTIMIZE", "True"]
    options += ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 200.0, 1.0]]"]
    with pytest.raises(SystemExit, match="1"):
        launch(RETINANET, tmp_path, "--eval-only", *options, options=TINY)
    assert "Result verification failed!" in read_log(tmp_path / "evaluation")
    (model,) = evaluated
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.backbone.modules())
    found = read_predictions(tmp_path / "evaluation")
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["category_id"] == other["category_id"]
        assert one["score"] == pytest.approx(other["score"], rel=1e-5)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config", [MASK_RCNN, RETINANET])
def test_shipped_configs(coco: Path, tmp_path: Path, config: str) -> None:
    """Train and evaluate shipped configs with smaller sizes, fewer iterations and another norm.

    The score threshold is lower, because no prediction reaches it after three iterations. Few
    predictions are kept, because each one gets a mask."""
    options = [*SHORT, *KEEP_ALL, "TEST.DETECTIONS_PER_IMAGE", "20"]
    train_resume_evaluate(config, tmp_path, options)


def test_no_predictions(coco: Path, tmp_path: Path) -> None:
    launch(MASK_RCNN, tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.99")
    sentence = "no predictions above the score threshold (MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.99)"
    assert sentence in (tmp_path / "results.md").read_text()
    assert sentence in read_log(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["results"]["coco_2017_val"]


def test_auto_scaling(coco: Path, tmp_path: Path) -> None:
    options = [word for word in TINY if word not in ("SOLVER.BASE_LR", "0.002")]
    options += ["DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"]
    launch(FASTER_RCNN, tmp_path, "--auto-scale-lr", options=options)
    log = read_log(tmp_path)
    assert "--auto-scale-lr, for a batch of 2 instead of 16" in log
    assert "BASE_LR: 0.0025" in (tmp_path / "config.yaml").read_text()


def test_weights_of_another_variant_are_refused(coco: Path, tmp_path: Path) -> None:
    launch(FASTER_RCNN, tmp_path, "DATASETS.TEST", "()")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    wider = ["MODEL.VOVNET.STAGE_OUT_CHANNELS", "(8, 8, 8, 16)"]
    with pytest.raises(ValueError, match="--allow-partial"):
        launch(FASTER_RCNN, tmp_path / "b", *weights, *wider)
    launch(FASTER_RCNN, tmp_path / "c", "--allow-partial", *weights, *wider, "DATASETS.TEST", "()")


# The command line


def call(*words: str) -> None:
    main(["--config-file", FASTER_RCNN, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.BASE_LRR", "1"], "Non-existent config key: SOLVER.BASE_LRR"),
        (["MODEL.VOVNET.CONV_BODY", "V-39-ese"], "Close to it: 'V-39-eSE'"),
        (["MODEL.VOVNET.NORM", "BM"], "BM"),
        (["MODEL.VOVNET.OUT_FEATURES", "['stage6']"], "stage6"),
        (
            ["MODEL.VOVNET.NORM", "FrozenBN"],
            "MODEL.WEIGHTS is empty and parts of the backbone are frozen",
        ),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "3"], "set MODEL.ROI_HEADS.NUM_CLASSES 80"),
        (["DATASETS.TRAIN", "('coco',)"], "Data set 'coco' of DATASETS.TRAIN is not registered"),
        (["DATASETS.TEST", "('mine',)"], "Data set 'mine' of DATASETS.TEST is not registered"),
        (["MODEL.WEIGHTS", "gone.pth"], "gone.pth"),
        (
            ["MODEL.DEVICE", "gpu"],
            "MODEL.DEVICE 'gpu' is no device that torch can use here: choose cuda or cpu.",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    coco: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        call(*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), *words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    sentence = error.splitlines()[-1]  # there may be a warning of torch before
    assert sentence.startswith("error: ")
    assert message in sentence
    assert "Traceback" not in error


@pytest.mark.parametrize("words", [[], ["--train-json", "a.json", "--train-images", "images"]])
def test_a_missing_config_is_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"give --config-file, .*COCO-Detection/") as caught:
        run(argument_parser().parse_args([*words, "SOLVER.MAX_ITER", "1"]))
    assert ("--train-annotations" in str(caught.value)) == bool(words)
    assert list(tmp_path.iterdir()) == []
    assert Path(get_config_file(re.search(r"COCO-Detection/\S+\.yaml", str(caught.value))[0]))


def test_a_full_gpu_is_one_sentence(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*args: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB."
        )

    monkeypatch.setattr(Trainer, "run_step", run_out)
    options = [*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "()"]
    saving = ["SOLVER.AMP.ENABLED True", "MODEL.VOVNET.CHECKPOINT_BLOCKS True"]
    saving += ["SOLVER.COMPILE.ENABLED True SOLVER.COMPILE.MEMORY_BUDGET 0.5"]
    for used in (False, True):
        with pytest.raises(SystemExit) as caught:
            call(*options, *(" ".join(saving).split() if used else []))
        assert caught.value.code == 1
        error = capsys.readouterr().err
        sentence = error.splitlines()[-1]
        assert sentence.startswith("error: CUDA out of memory. These need less memory: ")
        assert "SOLVER.IMS_PER_BATCH below 2, with --auto-scale-lr" in sentence
        assert [word in sentence for word in saving] == [not used] * 3
        assert "Traceback" not in error + read_log(tmp_path)


@pytest.mark.parametrize(("batch", "parts"), [(4, 2), (6, 0), (2, 0)])
def test_advice_for_a_full_gpu_of_several(
    batch: int, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the advice for two processes, whose half batches can be split into more parts."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    cfg = tiny_config(FASTER_RCNN, tmp_path, "SOLVER.IMS_PER_BATCH", str(batch))
    full = pytest.raises(GpuMemoryError)
    with full as caught, explain_lack_of_memory(cfg, training=True):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    told = re.findall(r"in more parts \(SOLVER\.ACCUMULATE (\d)\)", str(caught.value))
    assert told == ([str(parts)] if parts else [])


def test_evaluating_random_heads_is_refused(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]
    backbone = build_model(load_config(FASTER_RCNN, options)).backbone.bottom_up
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    options += ["MODEL.WEIGHTS", str(tmp_path / "backbone.pth")]
    with pytest.raises(SystemExit) as caught:
        call("--eval-only", *options)
    assert caught.value.code == 2
    assert (
        "outside the backbone, for example backbone.fpn_lateral2.weight" in capsys.readouterr().err
    )
    call("--eval-only", "--allow-partial", *options)


def test_a_bug_keeps_its_traceback(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer) -> None:
        int("no number")

    monkeypatch.setattr(Trainer, "run_step", fail)
    with pytest.raises(ValueError, match="invalid literal"):
        call(*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path))


def test_divergence_is_status_1(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "SOLVER.BASE_LR", "1e15", "MODEL.DEVICE", "cpu"]
    with pytest.raises(SystemExit) as caught:
        call(*options, "OUTPUT_DIR", str(tmp_path))
    assert caught.value.code == 1
    assert "error: Training diverged at iteration 1. " in capsys.readouterr().err


def test_more_gpus_than_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="2"):
        call("--num-gpus", "8")
    assert "--num-gpus is 8, but torch finds 1" in capsys.readouterr().err


def run_tool(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DETECTRON2_DATASETS": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), "--config-file", FASTER_RCNN, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_tool_itself(coco_root: Path, tmp_path: Path) -> None:
    options = ["DATALOADER.NUM_WORKERS", str((os.cpu_count() or 1) + 1)]
    done = run_tool(coco_root, *TINY, *options, "OUTPUT_DIR", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "| coco_2017_val | bbox" in done.stdout
    lines = (done.stdout + done.stderr).splitlines()
    assert len([line for line in lines if "Using training sampler" in line]) == 1
    assert [
        line for line in lines if re.search(r"UserWarning|FutureWarning|is_fx_trac", line)
    ] == []
    report = (tmp_path / "results.md").read_text()
    assert f"tools/train_net.py --config-file {FASTER_RCNN} MODEL.VOVNET.NORM BN" in report


def test_progress_bar_instead_of_the_log(
    coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    words = ["--progress", *TINY, "SOLVER.MAX_ITER", "8", "OUTPUT_DIR", str(tmp_path)]
    words += ["MODEL.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", str((os.cpu_count() or 1) + 1)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tools/train_net.py", "--config-file", FASTER_RCNN, *words])
    main()
    shown = capfd.readouterr()
    lines = shown.out.splitlines()
    first, *others = [line for line in lines if not line.startswith("WARNING")]
    assert first.startswith("This takes about ")
    assert "on this machine (cpu): " in first
    assert "torch finds no GPU" not in shown.out
    assert "Training:" in shown.err
    assert "| coco_2017_val | bbox" in shown.out
    own = [line for line in others if line.startswith("[")]
    assert [line for line in own if "vovnet_d2.engine.report" not in line] == []
    assert not re.search(r"UserWarning|FutureWarning|is_fx_trac", shown.out + shown.err)
    assert [w for w in recwarn if issubclass(w.category, (UserWarning, FutureWarning))] == []
    report = (tmp_path / "results.md").read_text()
    command = f"tools/train_net.py --config-file {FASTER_RCNN} --progress MODEL.VOVNET.NORM BN"
    assert command in report
    log = read_log(tmp_path)
    assert len([line for line in log.splitlines() if "Using training sampler" in line]) == 1
    assert "torch finds no GPU: MODEL.DEVICE is set to cpu" in log
    assert "DEVICE: cpu" in (tmp_path / "config.yaml").read_text()
    assert "Starting training from iteration 0" in log
    assert "| coco_2017_val | bbox" in log


@pytest.mark.parametrize(
    "name",
    ["train_net", "lazyconfig_train_net", "pretrain_net", "demo", "report", "visualize_data"],
)
def test_waiting_threads_sleep_unless_the_user_sets_another_policy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, expected in ((None, "passive"), ("active", "active")):
        with monkeypatch.context() as patch:
            patch.setenv("OMP_WAIT_POLICY", given or "")
            if given is None:
                patch.delenv("OMP_WAIT_POLICY")
            runpy.run_path(str(TOOL.with_name(f"{name}.py")))
            assert os.environ["OMP_WAIT_POLICY"] == expected


@pytest.mark.slow
def test_two_processes_without_gpus(
    coco_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Start two processes that see no GPU, with the default device, and read their output."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(coco_root))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # An earlier test may have used a GPU in this process, which then does not read the variable.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["--num-gpus", "2", "--dist-url", "auto", *TINY, "OUTPUT_DIR", str(tmp_path)]
    call(*words)
    shown = capfd.readouterr().out
    assert "torch finds no GPU: MODEL.DEVICE is set to cpu" in shown
    assert "World size: 2" in shown
    assert "| coco_2017_val | bbox" in shown
    with pytest.raises(SystemExit) as caught:
        call(*words, "SOLVER.IMS_PER_BATCH", "3")
    assert caught.value.code == 2
    assert "error: SOLVER.IMS_PER_BATCH is 3: it must be a multiple" in capfd.readouterr().err


@pytest.mark.slow
def test_it_learns(coco: Path, tmp_path: Path) -> None:
    """Train until three kinds of coloured rectangles are recognised under the ids of COCO."""
    options = [*TINY, "SOLVER.MAX_ITER", "300", "SOLVER.STEPS", "(250,)"]
    options += ["SOLVER.BASE_LR", "0.02", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"]
    options += ["MODEL.VOVNET.STAGE_OUT_CHANNELS", "(32, 32, 32, 32)", "MODEL.FPN.NORM", "BN"]
    options += ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"]
    options += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"]
    results = launch(
        FASTER_RCNN, tmp_path, "DATASETS.TEST", "('coco_2017_train',)", options=options
    )
    assert results["bbox"]["AP50"] > 60
    sure = {p["category_id"] for p in read_predictions(tmp_path) if p["score"] > 0.5}
    assert sure == set(COLORS)
