# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""LazyConfigs equal the YAML files of the same name. Tests of the tool that runs LazyConfigs."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import demo
import engine_runs
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_coco
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from devices import shapes_alone
from export_models import run_export
from format_writers import WRITERS
from module_facts import differences
from omegaconf import DictConfig
from torch import nn

from vovnet_d2 import VOVNET_SPECS, Predictor, get_config_file
from vovnet_d2.data.formats import Notes
from vovnet_d2.data.stream import TrainingStream
from vovnet_d2.engine import Trainer, load_config
from vovnet_d2.engine.any_config import load_any_config
from vovnet_d2.engine.lazy import LazyTrainer, lazy_argument_parser, main, run
from vovnet_d2.engine.lazy_config import instantiate, load_lazy_config, to_cfg
from vovnet_d2.engine.solver import build_optimizer
from vovnet_d2.report import write_page
from vovnet_d2.report.run_folder import read_run

pytest_plugins = ["engine_fixtures"]

ROOT = Path(get_config_file("Base-VoVNet-COCO.yaml")).parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("lazy/COCO-*/*.py"))
MASK_RCNN = "lazy/COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.py"
RETINANET = "lazy/COCO-Detection/retinanet_V_39_eSE_FPN_1x.py"
SCRATCH = "lazy/COCO-InstanceSegmentation/scratch_mask_rcnn_V_39_FPN_3x_gn.py"


def twin(name: str) -> str:
    """Return the YAML file of the same name."""
    return name.removeprefix("lazy/").replace(".py", ".yaml")


@cache
def lazy(name: str) -> DictConfig:
    return load_lazy_config(name)


@cache
def yaml(name: str) -> CfgNode:
    cfg = load_config(twin(name))
    cfg.MODEL.DEVICE = "meta"
    return cfg


@cache
def lazy_model(name: str) -> nn.Module:
    with shapes_alone():
        return instantiate(lazy(name), "model")


@cache
def yaml_model(name: str) -> nn.Module:
    with shapes_alone():
        return build_model(yaml(name))


# Each LazyConfig and its YAML file -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "retinanet"])
def test_every_detector_has_its_files(kind: str) -> None:
    found = {Path(name).stem for name in FILES if Path(name).stem.startswith(kind)}
    variants, schedules = ("V_39_eSE", "V_57_eSE"), ("1x", "3x")
    expected = {f"{kind}_{v}_FPN_{schedule}" for v in variants for schedule in schedules}
    if kind == "mask_rcnn":  # one example of the recipe
        expected.add("mask_rcnn_V_39_eSE_FPN_adamw_1x")
    assert found == expected


@pytest.mark.parametrize("name", FILES)
def test_same_model(name: str) -> None:
    ours, theirs = lazy_model(name), yaml_model(name)
    shapes = [(key, value.shape) for key, value in ours.state_dict().items()]
    assert shapes == [(key, value.shape) for key, value in theirs.state_dict().items()]
    # Compare thresholds, anchors, matchers, numbers of proposals and so on.
    found = differences(ours, theirs)
    # Detectron2's function for configs does not set this loss weight.
    defaults = {name: (1.0, "nothing") for name in found if name.endswith("loss_weight.loss_cls")}
    assert found == defaults


@pytest.mark.parametrize("name", FILES)
def test_same_optimizer(name: str) -> None:
    groups = []
    for optimizer, model in (
        (LazyTrainer.of(lazy(name)).build_optimizer(to_cfg(lazy(name)), lazy_model(name)),
         lazy_model(name)),
        (build_optimizer(yaml(name), yaml_model(name)), yaml_model(name)),
    ):  # fmt: skip
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        settings = [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        groups.append((type(optimizer).__name__, type(optimizer).__mro__[1], settings))
    assert groups[0] == groups[1]


@pytest.mark.parametrize("name", FILES)
def test_same_schedule(name: str) -> None:
    """Compare the learning rate in every phase, from the first to the last iteration."""
    cfg, own = yaml(name), to_cfg(lazy(name))
    assert own.SOLVER.MAX_ITER == cfg.SOLVER.MAX_ITER
    assert own.SOLVER.WARMUP_ITERS == cfg.SOLVER.WARMUP_ITERS
    edges = {0, 1, 500, cfg.SOLVER.WARMUP_ITERS, *cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER // 2}
    iterations = sorted({max(0, edge + shift) for edge in edges for shift in (-1, 0, 1)})
    iterations.append(cfg.SOLVER.MAX_ITER - 1)
    rates = []
    for build, config, model in (
        (LazyTrainer.of(lazy(name)).build_lr_scheduler, own, lazy_model(name)),
        (build_lr_scheduler, cfg, yaml_model(name)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=config.SOLVER.BASE_LR)
        scheduler = build(config, optimizer)
        found = []
        for scheduler.last_epoch in iterations:
            found += scheduler.get_lr()
        rates.append(found)
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    assert len(set(rates[0])) > 5


@pytest.mark.parametrize("name", FILES)
def test_same_data(name: str) -> None:
    cfg, loaders = yaml(name), lazy(name).dataloader
    own = to_cfg(lazy(name))
    for key in ("TRAIN", "TEST"):
        assert own.DATASETS[key] == cfg.DATASETS[key]
    assert own.SOLVER.IMS_PER_BATCH == cfg.SOLVER.IMS_PER_BATCH
    assert own.DATALOADER.NUM_WORKERS == cfg.DATALOADER.NUM_WORKERS
    assert loaders.test.num_workers == cfg.DATALOADER.NUM_WORKERS
    for split, is_train in (("train", True), ("test", False)):
        mapper = instantiate(lazy(name), f"dataloader.{split}.mapper")
        assert differences(mapper, DatasetMapper(cfg, is_train)) == {}


@pytest.mark.parametrize("name", FILES)
def test_same_run(name: str) -> None:
    """Compare the other keys that the engine reads."""
    own, cfg = to_cfg(lazy(name)), yaml(name)
    keys = ["MODEL.WEIGHTS", "MODEL.META_ARCHITECTURE", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON"]
    keys += ["MODEL.CHANNELS_LAST", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT"]
    keys += ["INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "SEED", "OUTPUT_DIR"]
    keys += ["SOLVER.BASE_LR", "SOLVER.AMP", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINTS_KEPT"]
    keys += [
        "SOLVER.CLIP_GRADIENTS.ENABLED",
        "SOLVER.MAX_SKIPPED_STEPS",
        "TEST.EVAL_PERIOD",
        "TEST.PATIENCE",
    ]
    keys += ["MODEL.BACKBONE.FREEZE_AT", "MODEL.VOVNET.CONV_BODY", "MODEL.VOVNET.NORM"]

    def get(node: Any, key: str) -> Any:
        for part in key.split("."):
            node = node[part]
        return node

    assert {key: get(own, key) for key in keys} == {key: get(cfg, key) for key in keys}


@pytest.mark.parametrize("name", [MASK_RCNN, RETINANET])
def test_same_output(name: str) -> None:
    """Compare detections in an image, with the same weights and a narrower box head."""
    options = ["MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
    theirs = build_model(load_config(twin(name), options)).eval()
    words = ["model.roi_heads.box_head.fc_dims=[32,32]"] if name == MASK_RCNN else []
    ours = instantiate(load_lazy_config(name, words), "model").eval()
    # Random scores give detections; the scores of untrained heads are all equal.
    heads = theirs.roi_heads.box_predictor if hasattr(theirs, "roi_heads") else theirs.head
    nn.init.normal_(heads.cls_score.weight, std=1.0)
    ours.load_state_dict(theirs.state_dict())
    if name == MASK_RCNN:  # masks take long
        for model in (ours, theirs):
            model.roi_heads.box_predictor.test_topk_per_image = 20
    inputs = [{"image": torch.randint(0, 256, (3, 96, 128)), "height": 192, "width": 256}]
    with torch.no_grad():
        found, expected = ours(inputs)[0]["instances"], theirs(inputs)[0]["instances"]
    assert len(expected) > 10
    for field, values in expected.get_fields().items():
        values, own = getattr(values, "tensor", values), found.get(field)
        assert torch.equal(getattr(own, "tensor", own), values)


@pytest.mark.parametrize("name", FILES)
def test_file(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    weights = lazy(name).train.init_checkpoint
    assert lines[2].startswith(f"# Weights: {weights or 'none'}")
    assert len(lines) <= 25, "a config should be a small diff over its imports"


def test_files_work_in_any_folder(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lazy", tmp_path / "elsewhere")
    moved = load_lazy_config(str(tmp_path / "elsewhere" / Path(MASK_RCNN).relative_to("lazy")))
    assert to_cfg(moved) == to_cfg(lazy(MASK_RCNN))


def test_another_variant_by_its_name() -> None:
    config = load_lazy_config(MASK_RCNN, ["model.backbone.bottom_up.spec=V-19-eSE"])
    assert to_cfg(config).MODEL.VOVNET.CONV_BODY == "V-19-eSE"
    with shapes_alone():
        model = instantiate(config, "model")
    assert model.backbone.bottom_up.spec == VOVNET_SPECS["V-19-eSE"]


def test_a_file_of_detectron2_is_read_like_its_yaml_file() -> None:
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
    own = to_cfg(load_lazy_config(model_zoo.get_config_file(f"{name}.py")))
    cfg = load_config(model_zoo.get_config_file(f"{name}.yaml"))
    for key in ("BASE_LR", "MAX_ITER", "IMS_PER_BATCH", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        assert own.SOLVER[key] == cfg.SOLVER[key]
    for key in ("WEIGHTS", "MASK_ON", "PIXEL_MEAN", "META_ARCHITECTURE"):
        assert own.MODEL[key] == cfg.MODEL[key]
    assert (own.DATASETS.TRAIN, own.DATASETS.TEST) == (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)


# The tool -----------------------------------------------------------------------------------------

# Options that let Mask R-CNN and RetinaNet train for three iterations on the miniature COCO.
SHORT = [
    *["model.backbone.bottom_up.norm=BN", "train.init_checkpoint=''", "train.seed=1"],
    *["train.max_iter=3", "train.eval_period=0", "train.device=cpu", "optimizer.lr=0.002"],
    *["lr_multiplier.warmup_length=0.0", "dataloader.train.total_batch_size=2"],
    *["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"],
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
]
TINY = [
    *SHORT,
    *["+model.backbone.bottom_up.spec.stage_mid_channels=[8,8,8,8]"],
    *["+model.backbone.bottom_up.spec.stage_out_channels=[8,8,8,8]"],
    *["+model.backbone.bottom_up.spec.stem_channels=[8,8,8]"],
    *["+model.backbone.bottom_up.spec.layers_per_block=1", "model.backbone.out_channels=16"],
    *["model.proposal_generator.pre_nms_topk=[50,50]"],
    *["model.proposal_generator.post_nms_topk=[20,20]"],
    *["model.roi_heads.batch_size_per_image=16", "model.roi_heads.box_head.fc_dims=[16,16]"],
    *["model.roi_heads.mask_head.conv_dims=[8,8]"],
    *["model.roi_heads.box_predictor.test_score_thresh=0.0"],
    *["+model.roi_heads.box_predictor.test_topk_per_image=10"],
]


def launch(
    out: Path,
    *words: str,
    config: str = MASK_RCNN,
    options: list[str] = TINY,
    pictures: bool = False,
) -> dict:
    flags = [word for word in words if word.startswith("--")]
    more = [word for word in words if not word.startswith("--")]
    options = [*options, f"train.output_dir={out}", *more]
    with engine_runs.quick(pictures=pictures):
        return run(lazy_argument_parser().parse_args(["--config-file", config, *flags, *options]))


def read_predictions(out: Path) -> list[dict]:
    return json.loads((out / "inference" / "coco_instances_results.json").read_text())


def test_trains_resumes_evaluates(coco: Path, tmp_path: Path) -> None:
    """Compare a training that is interrupted after two of three iterations with a whole one."""
    whole = launch(tmp_path / "whole", "train.checkpointer.period=2")
    assert whole.keys() == {"bbox", "segm"}
    out = tmp_path / "parts"
    out.mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000001.pth", out)
    (out / "last_checkpoint").write_text("model_0000001.pth")
    resumed = launch(out, "--resume", pictures=True)
    assert f"Resumed from {out}/model_0000001.pth." in engine_runs.read_log(out)
    assert "2 of 3 iterations are done." in engine_runs.read_log(out)
    assert str(resumed) == str(whole)  # compared as text, because NaN is not equal to NaN
    predictions = read_predictions(out)
    assert predictions == read_predictions(tmp_path / "whole")

    weights = f"train.init_checkpoint={out}/model_final.pth"
    evaluated = launch(out, "--eval-only", weights, pictures=True)
    assert str(evaluated) == str(resumed)
    assert read_predictions(out / "evaluation") == predictions
    trained_report, report = (
        json.loads((folder / "results.json").read_text()) for folder in (out, out / "evaluation")
    )
    assert trained_report["run"]["kind"].startswith("training, 3 iterations, ")
    assert report["run"]["kind"] == "evaluation"
    assert report["run"]["config"] == MASK_RCNN
    for folder in (out, out / "evaluation"):
        assert (folder / "predictions.png").is_file()
    assert (out / "loss_curve.png").is_file()
    saved = LazyConfig.load(str(out / "evaluation" / "config.yaml"))
    assert saved.train.output_dir == str(out / "evaluation")


def test_every_tool_reads_the_files_of_a_training(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Give config.yaml and weights, which the training of a LazyConfig writes, to other tools."""
    out = tmp_path / "out"
    trained = launch(out)
    predictions = read_predictions(out)
    config, weights = str(out / "config.yaml"), str(out / "model_final.pth")
    record = DatasetCatalog.get("coco_2017_val")[0]

    evaluated = launch(
        out, "--eval-only", f"train.init_checkpoint={weights}", config=config, options=[]
    )
    assert str(evaluated) == str(trained)
    assert read_predictions(out) == predictions

    found = Predictor(config, weights)(record["file_name"])["instances"]
    expected = [p["score"] for p in predictions if p["image_id"] == record["image_id"]]
    assert sorted(found.scores.tolist()) == pytest.approx(sorted(expected), abs=1e-4)
    with pytest.raises(ValueError, match=r"For MODEL.WEIGHTS, write train.init_checkpoint=VALUE"):
        load_any_config(config, ["MODEL.WEIGHTS", weights])

    words = ["--config-file", config, "--input", record["file_name"], "--json", f"{out}/demo.json"]
    with pytest.raises(SystemExit) as ended:
        demo.main([*words, "--score-threshold", "0", "--opts", f"train.init_checkpoint={weights}"])
    assert ended.value.code == 0
    scores = [p["score"] for p in json.loads((out / "demo.json").read_text())]
    assert sorted(scores) == pytest.approx(sorted(expected), abs=1e-4)

    words = ["--config-file", config, "--part", "backbone", "--format", "torchscript"]
    words += ["--sizes", "64x64", "--output", str(out / "exported")]
    run_export([*words, "--opts", f"train.init_checkpoint={weights}"])
    assert "All agree with eager" in capsys.readouterr().out

    page = Path(write_page(out, None, score_threshold=0.5)).read_text()
    assert read_run(out).setting("SOLVER.MAX_ITER") == 3
    assert "coco_2017_val" in page


@pytest.mark.parametrize("target", ["os.system", "torch.hub.load", "detectron2.utils.env.seed"])
def test_a_saved_config_calls_no_unknown_function(tmp_path: Path, target: str) -> None:
    file = tmp_path / "config.yaml"
    sections = {key: {} for key in ("dataloader", "optimizer", "lr_multiplier", "train")}
    content = {"model": {"_target_": target, "command": "true"}, **sections}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"calls {target}, which .* add --allow-unsafe-yaml"):
        load_any_config(str(file))


def test_saved_config_describes_the_same_model(coco: Path, tmp_path: Path) -> None:
    launch(tmp_path, "dataloader.test.dataset.names=null")
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    own = load_lazy_config(MASK_RCNN, TINY)
    with shapes_alone():
        assert differences(instantiate(saved, "model"), instantiate(own, "model")) == {}
    assert saved.train.max_iter == 3


def test_losses_equal_those_of_the_yaml_file(coco: Path, tmp_path: Path) -> None:
    """Compare losses, which depend on network, data, augmentation, optimizer and schedule."""
    launch(tmp_path / "lazy")
    # The lazy schedule is shortened in proportion.
    options = ["MODEL.WEIGHTS", "", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "SOLVER.STEPS", "(2,)"]
    engine_runs.launch(twin(MASK_RCNN), tmp_path / "yaml", options=[*engine_runs.TINY, *options])
    assert read_predictions(tmp_path / "lazy") == read_predictions(tmp_path / "yaml")


def test_mixed_precision_without_gpu(coco: Path, tmp_path: Path) -> None:
    launch(tmp_path, "train.amp.enabled=True", "dataloader.test.dataset.names=null")
    lines = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    assert all(line["total_loss"] < 100 for line in lines)


def test_heads_predict_in_float32_in_mixed_precision(coco: Path) -> None:
    for words, has_hooks in (([], False), (["train.amp.enabled=True"], True)):
        config = load_lazy_config(MASK_RCNN, [*TINY, *words])
        model = LazyTrainer.of(config).build_model(to_cfg(config))
        assert bool(model.proposal_generator.rpn_head._forward_hooks) == has_hooks


def test_the_loader_of_detectron2(coco: Path, tmp_path: Path) -> None:
    config = load_lazy_config(MASK_RCNN, TINY)
    loader = LazyTrainer.of(config).build_train_loader(to_cfg(config))
    assert isinstance(loader, TrainingStream)
    stream = [sample["image_id"] for sample in next(iter(loader))]
    yaml_cfg = load_config(twin(MASK_RCNN), ["SOLVER.IMS_PER_BATCH", "2", "SEED", "0"])
    expected = [sample["image_id"] for sample in next(iter(Trainer.build_train_loader(yaml_cfg)))]
    assert stream == expected


@pytest.mark.parametrize("folder", ["train2017", "val2017"])
def test_a_damaged_image_is_named(
    catalogs: None,
    fresh_logging: None,
    coco_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
) -> None:
    shutil.copytree(coco_root, tmp_path / "data")
    register_all_coco(str(tmp_path / "data"))
    for image in (tmp_path / "data" / "coco" / folder).iterdir():
        image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(SystemExit) as caught:
        main(["--config-file", MASK_RCNN, *TINY, f"train.output_dir={tmp_path / 'out'}"])
    assert caught.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert f"coco/{folder}/" in sentence
    assert "cannot be used" in sentence


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train.max_iters=5"],
            "The LazyConfig has no train.max_iters. Close to it: 'train.max_i",
        ),
        (["model.roi_heads.num_clases=5"], "Close to it: 'model.roi_heads.num_classes"),
        (["train.max_iter=many"], "'many' is str, and train.max_iter was"),
        (["train.amp.enabled=1"], "1 is int, and train.amp.enabled was False, which is bool"),
        (["optimizer.lr=[1]"], "and optimizer.lr was 0.002"),
        (["train.max_iter"], "'train.max_iter' is no override of a LazyConfig"),
        (["SOLVER.MAX_ITER", "5"], "For SOLVER.MAX_ITER, write train.max_iter=VALUE"),
        (["--resume"], "'--resume' is no override"),
        (["model.backbone.bottom_up.norm=BM"], "BM"),
        (["+model.backbone.bottom_up.width=3"], "unexpected keyword argument 'width'"),
        (["model.backbone.bottom_up.spec.spec=V-39-ese"], "Close to it: 'V-39-eSE'"),
        (["model.roi_heads.num_classes=3"], "set model.roi_heads.num_classes 80"),
        (
            ["dataloader.train.dataset.names=coco"],
            "'coco' of dataloader.train.dataset.names is not",
        ),
        (["dataloader.train.total_batch_size=0"], "dataloader.train.total_batch_size is 0"),
        (["train.init_checkpoint=gone.pth"], "gone.pth"),
        (["train.device=gpu"], "train.device 'gpu' is no device"),
        (["train.amp.dtype=float8", "train.amp.enabled=True"], "train.amp.dtype is 'float8'"),
        (["model.backbone.bottom_up.norm=FrozenBN"], "train from scratch with model.backbone.bot"),
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
        main(["--config-file", MASK_RCNN, *TINY, f"train.output_dir={tmp_path}", *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    sentence = error.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert message in sentence
    assert "Traceback" not in error


FILE_MISTAKES = {
    "gone.py": (None, "There is no config file"),
    "a.yaml": ("MODEL: {}", "tools/train_net.py runs it"),
    "syntax.py": ("model = (", "is not valid Python"),
    "imports.py": ("from .gone import model", "cannot be loaded"),
    "parts.py": ("model = {}", "lacks dataloader, optimizer, lr_multiplier, train"),
}


@pytest.mark.parametrize("name", FILE_MISTAKES)
def test_a_file_that_cannot_be_used(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = FILE_MISTAKES[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    before = builtins.__import__
    with pytest.raises(SystemExit) as caught:
        main(["--config-file", str(tmp_path / name)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert builtins.__import__ is before


def test_the_tool_for_yaml_names_the_tool_for_lazy_configs() -> None:
    with pytest.raises(ValueError, match="is a LazyConfig: tools/lazyconfig_train_net"):
        load_config(MASK_RCNN)


def test_divergence_names_the_keys_of_the_config(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(
            ["--config-file", MASK_RCNN, *TINY, f"train.output_dir={tmp_path}", "optimizer.lr=1e15"]
        )
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "train.clip_gradients.enabled True" in error
    assert "SOLVER." not in error
    assert "--auto-scale-lr" not in error


@pytest.mark.slow
def test_the_tool_itself(coco_root: Path, tmp_path: Path) -> None:
    """Run the tool in two processes, which both load the file."""
    tool = Path(__file__).parents[1] / "tools" / "lazyconfig_train_net.py"
    words = ["--num-gpus", "2", "--dist-url", "auto", "--config-file", MASK_RCNN]
    command = [sys.executable, str(tool), *words, *TINY, f"train.output_dir={tmp_path}"]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(coco_root), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "World size: 2" in done.stdout
    assert "| coco_2017_val | segm" in done.stdout
    assert "tools/lazyconfig_train_net.py --num-gpus 2" in (tmp_path / "results.md").read_text()


# Custom data --------------------------------------------------------------------------------------


def own_data(coco: Path, tmp_path: Path) -> list[str]:
    """Write the miniature COCO as two custom data sets of two categories, one as Labelme files."""
    for split in ("train", "val"):
        content = json.loads((coco / f"coco/annotations/instances_{split}2017.json").read_text())
        content["categories"] = [{"id": n, "name": f"kind {n}"} for n in (1, 2)]
        content["annotations"] = [
            annotation | {"category_id": number % 2 + 1}
            for number, annotation in enumerate(content["annotations"])
            if not annotation["iscrowd"]
        ]
        if split == "train":
            WRITERS["labelme"](tmp_path, {split: content}, Notes())
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    images = coco / "coco"
    words = [
        "--train-annotations",
        str(tmp_path / "train"),
        "--val-json",
        str(tmp_path / "val.json"),
    ]
    return [*words, f"--train-images={images / 'train2017'}", f"--val-images={images / 'val2017'}"]


def test_custom_annotations(coco: Path, tmp_path: Path) -> None:
    """Check data sets and categories in the run and in the saved config."""
    words, out = own_data(coco, tmp_path), tmp_path / "out"
    arguments = ["--config-file", MASK_RCNN, *words, *TINY, f"train.output_dir={out}"]
    trained = run(lazy_argument_parser().parse_args(arguments))
    names = MetadataCatalog.get("own_train").thing_classes
    assert names == ["kind 1", "kind 2"]
    assert "AP-kind 1" in trained["bbox"]
    saved = load_lazy_config(str(out / "config.yaml"))
    assert saved.model.roi_heads.num_classes == len(names)
    assert saved.model.roi_heads.box_predictor.num_classes == len(names)
    assert to_cfg(saved).DATASETS.OWN[0]["categories"] == names
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    weights = f"train.init_checkpoint={out / 'model_final.pth'}"
    arguments = ["--config-file", str(out / "config.yaml"), "--eval-only", weights]
    assert str(run(lazy_argument_parser().parse_args(arguments))) == str(trained)
    DatasetCatalog.data.clear()
    predictor = Predictor(str(out / "config.yaml"), str(out / "model_final.pth"))
    assert predictor.metadata.thing_classes == names


@pytest.mark.parametrize("override", ["model.roi_heads.num_classes=3", "dataloader.own=[]"])
def test_keys_that_follow_from_annotations_cannot_be_set(
    coco: Path, tmp_path: Path, override: str
) -> None:
    words = ["--config-file", MASK_RCNN, *own_data(coco, tmp_path), *TINY]
    words += [f"train.output_dir={tmp_path / 'out'}", f"+{override}"]
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=f"{key} follows from the files of --train-ann"):
        run(lazy_argument_parser().parse_args(words))
