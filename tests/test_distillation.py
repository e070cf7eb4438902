# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Distillation from the feature maps of a teacher: the loss, and trainings with it."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_lazyconfig
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from engine_runs import FASTER_RCNN, MASK_RCNN, RETINANET, TINY, quick, tiny_config
from torch import nn

from vovnet_d2.checkpoint import VoVNetCheckpointer
from vovnet_d2.engine import Trainer, argument_parser, run
from vovnet_d2.engine.distillation import FeatureTeacher, add_teacher, correlation_loss
from vovnet_d2.engine.lazy import lazy_argument_parser
from vovnet_d2.engine.lazy import run as run_lazy
from vovnet_d2.engine.lazy_config import load_lazy_config

pytest_plugins = ["engine_fixtures"]

FCOS = "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml"
# The teacher has another input convention and other widths than the student.
TEACHER = [
    *["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[120.0, 110.0, 100.0]", "SEED", "3"],
    *["MODEL.FCOS.NORM", "", "MODEL.FCOS.NUM_CONVS", "1"],
    *["MODEL.PIXEL_STD", "[50.0, 60.0, 70.0]", "MODEL.VOVNET.STAGE_OUT_CHANNELS", "(8, 8, 8, 16)"],
]


def write_teacher(folder: Path, config: str, *options: str) -> tuple[str, str]:
    """Write the config and weights of an untrained detector, like the output of a training."""
    folder.mkdir(exist_ok=True)
    cfg = tiny_config(config, folder, *TEACHER, *options)
    torch.manual_seed(3)
    VoVNetCheckpointer(build_model(cfg), str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "config.yaml"), str(folder / "model_final.pth")


def student_config(config: str, teacher: tuple[str, str], *options: str) -> CfgNode:
    words = ["DISTILLATION.TEACHER", teacher[0], "DISTILLATION.WEIGHTS", teacher[1]]
    return tiny_config(config, Path("out"), *words, *options)


def make_batch() -> list[dict[str, Any]]:
    """Return two images of different sizes, each with one object and its mask."""
    batch = []
    for height, width in ((256, 130), (140, 300)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 36.0, 30.0]]))
        instances.gt_classes = torch.tensor([3])
        instances.gt_masks = PolygonMasks([[np.array([4.0, 6, 36, 6, 36, 30, 4, 30])]])
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def losses_of(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # for the sampling of proposals
    with EventStorage():
        return model(batch)


def correlations(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Return Pearson's correlation of each channel of two feature maps (N, C, H, W) with NumPy."""
    arrays = [maps.detach().double().numpy().swapaxes(0, 1) for maps in (one, other)]
    pairs = zip(*arrays, strict=True)
    return [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]


# The loss


def test_the_loss_equals_one_minus_the_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, 3, generator=generator) * 9 + 4 for _ in range(2))
    teacher[:, 1] = student[:, 1] * 0.01 - 70
    teacher[:, 2] = -student[:, 2]
    expected = [1 - r for r in correlations(student, teacher)]
    assert expected[1:3] == pytest.approx([0, 2], abs=1e-5)
    found = correlation_loss(student, teacher)
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-5)
    assert float(correlation_loss(student.bfloat16(), teacher)) == pytest.approx(
        float(found), abs=0.02
    )


def test_constant_feature_maps_have_a_finite_gradient() -> None:
    """Check a feature map of one pixel, and the zeros of a dead channel."""
    for shape in ((1, 4, 1, 1), (2, 4, 3, 3)):
        student = torch.zeros(shape, requires_grad=True)
        correlation_loss(student, torch.randn(shape)).backward()
        assert student.grad is not None
        assert student.grad.abs().max() < 1000


# The loss in a detector


@pytest.mark.parametrize(
    ("config", "width", "order"),
    [(MASK_RCNN, 16, "BGR"), (MASK_RCNN, 24, "RGB"), (RETINANET, 24, "BGR"), (FCOS, 12, "RGB")],
)
def test_the_loss_of_a_detector(tmp_path: Path, config: str, width: int, order: str) -> None:
    """Compare with a second computation by NumPy from the feature maps of both networks."""
    files = write_teacher(tmp_path / "t", config, "MODEL.FPN.OUT_CHANNELS", str(width))
    words = ["MODEL.FCOS.NORM", "", "MODEL.FCOS.NUM_CONVS", "1"]
    words += ["INPUT.FORMAT", order, "DISTILLATION.LOSS_WEIGHT", "2.5"]
    cfg = student_config(config, files, *words)
    student = build_model(cfg)
    teacher = build_model(
        tiny_config(config, tmp_path, *TEACHER, "MODEL.FPN.OUT_CHANNELS", f"{width}")
    )
    teacher.load_state_dict(torch.load(files[1], weights_only=True)["model"])
    teacher.eval()

    batch = make_batch()
    # A copy, because RetinaNet keeps a running number of positive anchors.
    plain = losses_of(copy.deepcopy(student), batch)
    add_teacher(student, cfg)
    losses = losses_of(student, batch)
    assert {**plain, "loss_distillation": losses["loss_distillation"]} == losses

    for_teacher = copy.deepcopy(batch)
    if order == "BGR":
        for record in for_teacher:
            record["image"] = record["image"][[2, 1, 0]]
    with torch.no_grad():
        theirs = teacher.backbone(teacher.preprocess_image(for_teacher).tensor)
        ours = student.backbone(student.preprocess_image(batch).tensor)
    levels = (
        ["p2", "p3", "p4", "p5", "p6"] if config == MASK_RCNN else ["p3", "p4", "p5", "p6", "p7"]
    )
    assert list(ours) == levels
    if width != 16:
        generator = torch.Generator().manual_seed(0)
        matrix = nn.init.orthogonal_(torch.empty(16, width), generator=generator)
        product = matrix @ matrix.T if width > 16 else matrix.T @ matrix
        torch.testing.assert_close(product, torch.eye(min(16, width)), atol=1e-5, rtol=0)
        theirs = {k: torch.einsum("oc,nchw->nohw", matrix, maps) for k, maps in theirs.items()}
    parts = [np.mean([1 - r for r in correlations(ours[k], theirs[k])]) for k in levels]
    assert float(losses["loss_distillation"]) == pytest.approx(2.5 * sum(parts), rel=1e-3)


def test_only_the_student_learns(tmp_path: Path) -> None:
    files = write_teacher(tmp_path / "t", RETINANET)
    cfg = student_config(RETINANET, files, "SOLVER.BASE_LR", "0.02")
    student = build_model(cfg)
    names = list(student.state_dict())
    parameters = [name for name, _ in student.named_parameters()]
    teacher = FeatureTeacher(build_model(tiny_config(RETINANET, tmp_path, *TEACHER)))
    before = copy.deepcopy(teacher.network.state_dict())
    teacher.attach(student)
    assert list(student.state_dict()) == names
    assert [name for name, _ in student.named_parameters()] == parameters

    optimizer = build_optimizer(cfg, student)
    batch = make_batch()
    losses = []
    for _ in range(12):
        loss = losses_of(student, batch)["loss_distillation"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    with_gradient = {
        name.partition(".")[0] for name, p in student.named_parameters() if p.grad is not None
    }
    assert with_gradient == {"backbone"}  # the heads have other losses
    assert not teacher.network.training
    for name, tensor in teacher.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())


def test_the_loss_is_only_computed_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the teacher does not run in an evaluation or without gradients.

    A copy of the student, such as averaged weights, shares the teacher.
    """
    student = build_model(tiny_config(FASTER_RCNN, tmp_path))
    teacher = FeatureTeacher(build_model(tiny_config(FASTER_RCNN, tmp_path, *TEACHER)))
    teacher.attach(student)
    batch = make_batch()
    twin = copy.deepcopy(student)
    assert copy.deepcopy(teacher) is teacher
    assert "loss_distillation" in losses_of(twin, batch)
    monkeypatch.setattr(FeatureTeacher, "_compute_features", None)  # a call would fail
    with torch.no_grad():
        assert "loss_distillation" not in losses_of(student, batch)
    with torch.no_grad():
        assert "instances" in student.eval()(batch)[0]
    assert teacher._features is None  # nothing is kept


# Trainings


def launch(
    out: Path, *words: str, config: str = FASTER_RCNN, teacher: tuple[str, str] | None = None
) -> dict:
    flags = [word for word in words if word.startswith("--")]
    more = [word for word in words if not word.startswith("--")]
    if teacher:
        flags += ["--teacher", *teacher]
    options = [*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(out), *more]
    with quick():
        return run(argument_parser().parse_args(["--config-file", config, *flags, *options]))


def read_losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "metrics.json").read_text().splitlines())
    return [row["loss_distillation"] for row in rows if "loss_distillation" in row]


def read_state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def test_a_training_with_a_teacher(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a resumed training is exact, and evaluate it without the teacher.

    Checkpoints contain no teacher, and the config names the teacher.
    """
    teacher = write_teacher(tmp_path / "t", RETINANET, "MODEL.FPN.OUT_CHANNELS", "24")
    words = ["SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"]
    words += ["DISTILLATION.IN_FEATURES", "['p3', 'p4', 'p5']"]
    launch(tmp_path / "a", *words, teacher=teacher)
    plain = build_model(tiny_config(FASTER_RCNN, tmp_path))
    final = read_state(tmp_path / "a" / "model_final.pth")
    assert list(final["model"]) == list(plain.state_dict())
    log = (tmp_path / "a" / "log.txt").read_text()
    named = f"The teacher {teacher[0]} with the weights {teacher[1]}"
    assert f"{named} teaches the feature maps p3, p4, p5" in log
    assert [0 < loss < 2 * 3 * 6 for loss in read_losses(tmp_path / "a")] == [True]

    # Resume from the state after two iterations, which must give the same result.
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "model_0000001.pth", tmp_path / "b")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000001.pth")
    launch(tmp_path / "b", "--resume", *words, teacher=teacher)
    resumed = read_state(tmp_path / "b" / "model_final.pth")
    for name, tensor in final["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name

    shutil.rmtree(tmp_path / "t")
    with quick():
        options = ["MODEL.WEIGHTS", str(tmp_path / "a" / "model_final.pth")]
        config = str(tmp_path / "a" / "config.yaml")
        words = ["--config-file", config, "--eval-only", *options]
        assert set(run(argument_parser().parse_args(words))) == {"bbox"}
        with pytest.raises(FileNotFoundError, match=r"There is no config file|No config file"):
            run(argument_parser().parse_args(["--config-file", config]))


def test_mixed_precision(coco: Path, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "t", MASK_RCNN)
    losses = []
    for enabled in ("False", "True"):
        cfg = student_config(MASK_RCNN, teacher, "SOLVER.AMP.ENABLED", enabled)
        cfg.OUTPUT_DIR = str(tmp_path)
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        with EventStorage() as storage:
            trainer.iter = 0
            trainer.run_step()
            losses.append(storage.latest()["loss_distillation"][0])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_lazy_config(coco: Path, tmp_path: Path) -> None:
    """Compare the losses of a LazyConfig with those of the corresponding YAML file."""
    name = test_lazyconfig.MASK_RCNN
    teacher = write_teacher(tmp_path / "t", MASK_RCNN)
    options = [*test_lazyconfig.TINY, f"train.output_dir={tmp_path / 'lazy'}"]
    words = ["--config-file", name, "--teacher", *teacher, *options]
    with quick():
        run_lazy(lazy_argument_parser().parse_args([*words, "dataloader.test.dataset.names=null"]))
    saved = load_lazy_config(str(tmp_path / "lazy" / "config.yaml"))
    assert saved.train.distillation.teacher == teacher[0]
    # The lazy schedule is shortened in proportion.
    same = ["MODEL.WEIGHTS", "", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "SOLVER.STEPS", "(2,)"]
    same += ["DATASETS.TEST", "()"]
    launch(tmp_path / "yaml", *same, config=test_lazyconfig.twin(name), teacher=teacher)
    losses = [read_losses(tmp_path / kind) for kind in ("lazy", "yaml")]
    assert losses[0] == losses[1] != []


# Mistakes


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (RETINANET, [], r"do not both have a feature map p2 .*teacher p3 \(stride 8\).*\['p3'"),
        (MASK_RCNN, ["DISTILLATION.IN_FEATURES", "['p9']"], "a feature map p9"),
        (MASK_RCNN, ["DISTILLATION.WEIGHTS", ""], r"WEIGHTS is empty.*--teacher CONFIG WEIGHTS"),
        (MASK_RCNN, ["DISTILLATION.WEIGHTS", "gone.pth"], "gone.pth"),
        (MASK_RCNN, ["DISTILLATION.TEACHER", "gone.yaml"], "gone.yaml"),
        (MASK_RCNN, ["INPUT.FORMAT", "L"], "INPUT.FORMAT is L and that of the teacher .* is RGB"),
    ],
)
def test_mistakes(tmp_path: Path, config: str, options: list[str], message: str) -> None:
    files = write_teacher(tmp_path / "t", config)
    cfg = student_config(MASK_RCNN, files, *options)
    student = build_model(tiny_config(MASK_RCNN, tmp_path))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        add_teacher(student, cfg)


def test_strides_differ(tmp_path: Path) -> None:
    student = build_model(tiny_config(MASK_RCNN, tmp_path))
    teacher = build_model(tiny_config(MASK_RCNN, tmp_path))
    teacher.backbone._out_feature_strides["p5"] = 16
    with pytest.raises(ValueError, match="do not both have a feature map p5 with the same"):
        FeatureTeacher(teacher).attach(student)
