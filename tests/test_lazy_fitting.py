# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""LazyConfigs with custom data get the same schedule and anchors as YAML files."""

import json
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from typing import Any

import engine_runs
import pytest
import test_own_data
import torch
import yaml
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.solver import build_lr_scheduler
from test_lazyconfig import MASK_RCNN, RETINANET, TINY, launch, twin
from test_own_data import BOTH, MISSING, NAMES, flags

from vovnet_d2 import Predictor
from vovnet_d2.engine import lazy_fitting, load_config
from vovnet_d2.engine.anchors import read_anchors
from vovnet_d2.engine.lazy import LazyTrainer, lazy_argument_parser, run
from vovnet_d2.engine.lazy_config import instantiate, load_lazy_config, to_cfg
from vovnet_d2.engine.schedule import SCHEDULE_KEYS, fit_schedule
from vovnet_d2.engine.written import find_written

pytest_plugins = ["engine_fixtures"]
digits = test_own_data.digits


def fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, *overrides: str, **options: Any
) -> tuple[Any, Any]:
    """Return a LazyConfig that is fitted to 205 images, and the config that the engine reads."""
    words = [*overrides, f"train.output_dir={tmp_path}"]
    config = load_lazy_config(file, words)
    cfg = to_cfg(config)
    monkeypatch.setattr(lazy_fitting, "_load_records", lambda config: [{}] * 205)
    chosen = {"epochs": None, "fit_anchors": False, "allow_unsafe_yaml": False} | options
    args = Namespace(config_file=file, opts=words, **chosen)
    lazy_fitting.fit_lazy_config(config, cfg, args, resuming=False)
    return config, cfg


@pytest.mark.parametrize("name", [MASK_RCNN, RETINANET])
def test_same_schedule_as_the_yaml_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Compare learning rates at many iterations, and the periods."""
    options = ["SOLVER.IMS_PER_BATCH", "2"]
    cfg = load_config(twin(name), options)
    epochs = Fraction(100)
    fit_schedule(cfg, *find_written(twin(name), options), num_images=205, epochs=epochs)
    overrides = ["dataloader.train.total_batch_size=2"]
    config, _ = fit(tmp_path, monkeypatch, name, *overrides, epochs=epochs)
    own = to_cfg(config)  # the config in the config.yaml of the run
    for key in ("MAX_ITER", "IMS_PER_BATCH", "WARMUP_ITERS", "BASE_LR", "CHECKPOINT_PERIOD"):
        assert own.SOLVER[key] == cfg.SOLVER[key], key
    assert own.TEST.EVAL_PERIOD == cfg.TEST.EVAL_PERIOD == 513
    iterations = range(0, cfg.SOLVER.MAX_ITER, 7)
    rates = []
    for build, each in (
        (LazyTrainer.of(config).build_lr_scheduler, own),
        (build_lr_scheduler, cfg),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=each.SOLVER.BASE_LR)
        scheduler = build(each, optimizer)
        rates.append([])
        for scheduler.last_epoch in iterations:
            rates[-1] += scheduler.get_lr()
    differing = [i for i, a, b in zip(iterations, *rates, strict=True) if abs(a - b) > 1e-9]
    # A YAML file rounds a step to an iteration, and a LazyConfig has a share of the training.
    assert [i for i in differing if min(abs(i - s) for s in cfg.SOLVER.STEPS) > 1] == []
    assert len(set(rates[0])) > 100


def test_given_values_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["optimizer.lr=0.7", "train.eval_period=9", "lr_multiplier.warmup_length=0.5"]
    config, cfg = fit(tmp_path, monkeypatch, MASK_RCNN, *overrides, epochs=Fraction(16))
    assert (config.optimizer.lr, config.train.eval_period) == (0.7, 9)
    assert config.train.max_iter == cfg.SOLVER.MAX_ITER == 205
    with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITER both say how long"):
        fit(tmp_path, monkeypatch, MASK_RCNN, "train.max_iter=7", epochs=Fraction(1))
    # Without a custom data set the schedule does not depend on the number of images.
    config, cfg = fit(tmp_path, monkeypatch, MASK_RCNN)
    assert config.train.max_iter == 90000


def test_files_of_users_are_recognised(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from detectron2.config import LazyConfig\nfrom vovnet_d2 import get_config_file\n"
        f"_c = LazyConfig.load(get_config_file({RETINANET!r}))\n"
        "model, dataloader, optimizer = _c.model, _c.dataloader, _c.optimizer\n"
        "lr_multiplier, train = _c.lr_multiplier, _c.train\n"
        "train.eval_period = 77\ndataloader.train.total_batch_size = 4\n"
    )
    args = Namespace(config_file=str(file), opts=["optimizer.lr=1.0"], allow_unsafe_yaml=False)
    base, given = lazy_fitting._find_written(args, {"SOLVER.BASE_LR": "optimizer.lr"})
    assert given == {
        "SOLVER.IMS_PER_BATCH": f"set in {file}",
        "TEST.EVAL_PERIOD": f"set in {file}",
        "SOLVER.BASE_LR": "set on the command line",
    }
    assert (base.SOLVER.IMS_PER_BATCH, base.SOLVER.BASE_LR) == (16, 0.01)
    saved = tmp_path / "config.yaml"
    LazyConfig.save(load_lazy_config(MASK_RCNN), str(saved))
    args = Namespace(config_file=str(saved), opts=[], allow_unsafe_yaml=False)
    _, given = lazy_fitting._find_written(args, {})
    assert given == dict.fromkeys(SCHEDULE_KEYS, f"set in {saved}")


def test_same_anchors_as_the_yaml_file() -> None:
    for name in (MASK_RCNN, RETINANET):
        ours, theirs = (
            lazy_fitting._read_anchors(load_lazy_config(name)),
            read_anchors(load_config(twin(name))),
        )
        assert ours.strides == theirs.strides
        assert ours.ratios == theirs.ratios
        for mine, other in zip(ours.sizes, theirs.sizes, strict=True):
            assert mine == pytest.approx(other)
        assert ours.offset == theirs.offset
    config = load_lazy_config(RETINANET, ["model.anchor_generator.offset=0.25"])
    assert lazy_fitting._read_anchors(config).offset == 0.25
    del config.model.anchor_generator.offset
    generator = instantiate(config, "model.anchor_generator")
    assert lazy_fitting._read_anchors(config).offset == generator.offset


def launch_own(root: Path, out: Path, *words: str, config: str = MASK_RCNN) -> dict[str, Any]:
    more = [word for word in words if "=" in word]
    given = [word for word in words if "=" not in word]
    left_out = ("train.max_iter", "train.eval_period")
    options = [word for word in TINY if not word.startswith(left_out)]
    args = ["--config-file", config, *flags(root, *BOTH), *given, *options, *more]
    return run(lazy_argument_parser().parse_args([*args, f"train.output_dir={out}"]))


@pytest.mark.slow
def test_custom_data_from_training_to_prediction(
    catalogs: None, fresh_logging: None, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    trained = launch_own(digits, out, "--epochs", "0.5", "--fit-anchors")
    log = engine_runs.read_log(out)
    assert "Values fitted to the 12 training images:" in log
    assert "\ntrain.max_iter " in log
    assert "\nmodel.proposal_generator.anchor_generator.sizes " in log
    assert "\nlr_multiplier.warmup_length × train.max_iter " in log
    assert json.loads((out / "results.json").read_text())["run"]["kind"] == (
        "training, 3 iterations, 0.5 epochs"
    )
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["train"]["max_iter"], saved["train"]["eval_period"]) == (3, 3)
    assert saved["model"]["roi_heads"]["num_classes"] == 10
    record = json.loads((out / "fitted.json").read_text())
    config = load_lazy_config(str(out / "config.yaml"))
    generator = instantiate(config, "model.proposal_generator.anchor_generator")
    expected = DefaultAnchorGenerator(
        sizes=record["anchors"]["sizes"],
        aspect_ratios=record["anchors"]["ratios"],
        strides=[4, 8, 16, 32, 64],
        offset=0.0,
    )
    for found, wanted in zip(generator.cell_anchors, expected.cell_anchors, strict=True):
        assert torch.equal(found, wanted)

    # Evaluate without the flags, from the files of the training.
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    args = ["--config-file", str(out / "config.yaml"), "--eval-only"]
    weights = f"train.init_checkpoint={out}/model_final.pth"
    evaluated = run(lazy_argument_parser().parse_args([*args, weights]))
    assert str(evaluated) == str(trained)
    assert f"AP-{MISSING}" in evaluated["segm"]
    predictor = Predictor(str(out / "config.yaml"), str(out / "model_final.pth"))
    assert predictor.metadata.thing_classes == NAMES

    # A resumed training has the same schedule.
    (out / "fitted.json").write_text(json.dumps(record | {"images": 16}))
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    launch_own(digits, out, "--resume", "--epochs", "0.5", "--fit-anchors")
    assert "have 12 images, and had 16 when" in engine_runs.read_log(out)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["train"]["max_iter"] == 4


def test_patience_and_oversampling(coco: Path, tmp_path: Path) -> None:
    words = ["+dataloader.train.repeat_threshold=0.9", "train.patience=2"]
    with pytest.raises(ValueError, match=r"train\.patience is 2, and nothing is evaluated"):
        launch(tmp_path, *words)
    launch(tmp_path, *words, "train.eval_period=1")
    log = engine_runs.read_log(tmp_path)
    assert "classes that occur in less than the share 0.9 of the images are repeated: " in log
