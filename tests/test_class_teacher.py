# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Distillation of classifiers from the soft targets of a network of timm."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.special import softmax
from scipy.stats import entropy
from test_pretrain import BASE, SHORT, THIN, launch, load_classification_config, read_log
from test_pretrain import images as images
from torch import nn

from vovnet_d2.checkpoint.metadata import InputConvention
from vovnet_d2.engine import class_teacher, pretrain
from vovnet_d2.engine.class_teacher import ClassTeacher, build_class_teacher, soft_target_loss
from vovnet_d2.engine.classifier import ImageClassifier

pytest_plugins = ["engine_fixtures"]

NAME = "mobilenetv3_small_050"


def write_teacher(folder: Path, num_classes: int) -> str:
    torch.manual_seed(0)
    path = str(folder / "teacher.pth")
    torch.save(timm.create_model(NAME, num_classes=num_classes).state_dict(), path)
    return path


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_divergence_of_softened_probabilities(temperature: float) -> None:
    """Compare the loss with SciPy, and its gradient with that of a cross-entropy with the
    probabilities of the teacher.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=generator) * 6 for _ in range(2))
    student.requires_grad_()
    p, q = (softmax(x.detach().double().numpy() / temperature, axis=1) for x in (teacher, student))
    loss = soft_target_loss(student, teacher, temperature)
    assert float(loss) == pytest.approx(temperature**2 * np.mean(entropy(p, q, axis=1)), rel=1e-5)
    loss.backward()
    expected = torch.from_numpy(temperature * (q - p) / 3).float()
    torch.testing.assert_close(student.grad, expected, atol=1e-6, rtol=1e-4)


class FirstPixels(nn.Module):
    """Network whose logits are the colour of the first pixel."""

    def forward(self, x: torch.Tensor) -> Any:
        return x[:, :, 0, 0]


class Linear(FirstPixels):
    def forward(self, x: torch.Tensor) -> Any:
        return {"linear": super().forward(x)}


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_the_teacher_gets_images_in_its_own_normalisation(order: str) -> None:
    student = ImageClassifier(
        Linear(), input_format=order, pixel_mean=[10.0, 20.0, 30.0], pixel_std=[2.0, 3.0, 4.0]
    )
    convention = InputConvention("RGB", (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
    student.teacher = ClassTeacher(FirstPixels(), convention, temperature=2.0, loss_weight=3.0)
    rgb = torch.randint(0, 256, (4, 3, 2, 2))
    losses = student.train()((rgb, torch.zeros(4, dtype=torch.long)))
    pixels = rgb[:, :, 0, 0].double().numpy()
    taught = (pixels - [100, 110, 120]) / [50, 60, 70]
    own = ((pixels if order == "RGB" else pixels[:, ::-1]) - [10, 20, 30]) / [2, 3, 4]
    divergence = entropy(softmax(taught / 2, axis=1), softmax(own / 2, axis=1), axis=1).mean()
    assert float(losses["loss_distillation"]) == pytest.approx(3 * 4 * divergence, rel=1e-4)
    assert "loss_cls" in losses


@pytest.mark.usefixtures("fresh_logging")
def test_a_training_with_a_teacher(images: Path, tmp_path: Path) -> None:
    """Check that a resumed training is exact, and that checkpoints contain no teacher."""
    weights = write_teacher(tmp_path, 3)
    words = ["DISTILLATION.TEACHER", NAME, "DISTILLATION.WEIGHTS", weights]
    words += ["DISTILLATION.TEMPERATURE", "2.0"]
    words += ["SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"]
    launch(images, tmp_path / "whole", *words)
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000001.pth", tmp_path / "parts")
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000001.pth")
    launch(images, tmp_path / "parts", "--resume", *words)
    launch(images, tmp_path / "plain", "SOLVER.MAX_ITER", "4")
    states = [
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("whole", "parts", "plain")
    ]
    assert list(states[0]) == list(states[2])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert "loss_distillation" in read_log(tmp_path / "whole")
    assert "loss_distillation" not in read_log(tmp_path / "plain")
    Path(weights).unlink()
    evaluated = [*words, "MODEL.WEIGHTS", str(tmp_path / "whole" / "model_final.pth")]
    assert "classification" in launch(images, tmp_path / "whole", "--eval-only", *evaluated)


@pytest.mark.usefixtures("fresh_logging")
def test_argument_teacher(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use ``--teacher NAME`` without a file, which takes the weights from timm."""
    asked = []

    def create(_: Any, name: str, __: str) -> nn.Module:
        asked.append(name)
        return timm.create_model(name, num_classes=3)

    monkeypatch.setattr(class_teacher, "create_pretrained", create)
    options = [*THIN, *SHORT, "PRETRAIN.DATA", str(images), "OUTPUT_DIR", str(tmp_path)]
    words = ["--config-file", BASE, "--teacher", NAME, *options]
    pretrain.run(pretrain.argument_parser().parse_args(words))
    assert asked == [NAME]
    assert "loss_distillation" in read_log(tmp_path)


def test_the_teacher_has_the_input_of_its_weights(tmp_path: Path) -> None:
    """Compare with timm's normalisation, scaled to pixel values from 0 to 255."""
    cfg = load_classification_config(BASE, [*THIN, *SHORT, "DISTILLATION.TEACHER", NAME])
    cfg.PRETRAIN.NUM_CLASSES, cfg.DISTILLATION.WEIGHTS = 3, write_teacher(tmp_path, 3)
    convention = build_class_teacher(cfg).convention
    assert convention.format == "RGB"
    mean = timm.get_pretrained_cfg(NAME).mean
    assert convention.pixel_mean == pytest.approx([255 * value for value in mean])


@pytest.mark.parametrize(
    ("name", "num_classes", "options", "message"),
    [
        ("mobilenetv3_smal_050", 3, [], "timm has no network 'mobilenetv3_smal_050'. Close to it"),
        (NAME, 4, [], "does not hold the weights of timm's mobilenetv3_small_050 with 3 classes"),
        (NAME, 3, ["DISTILLATION.WEIGHTS", "gone.pth"], "gone.pth"),
        (NAME, 3, ["DISTILLATION.TEMPERATURE", "0.0"], "TEMPERATURE is 0.0: it must be above 0"),
    ],
)
def test_mistakes(
    tmp_path: Path, name: str, num_classes: int, options: list[str], message: str
) -> None:
    weights = write_teacher(tmp_path, num_classes)
    words = ["DISTILLATION.TEACHER", name, "DISTILLATION.WEIGHTS", weights, *options]
    cfg = load_classification_config(BASE, [*THIN, *SHORT, *words])
    cfg.PRETRAIN.NUM_CLASSES = 3
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        build_class_teacher(cfg)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)), "has 5 classes .* has 3: the"),
        (nn.Linear(7, 3), "does not take images of 32×32 pixels"),
    ],
)
def test_timms_network_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, network: nn.Module, message: str
) -> None:
    monkeypatch.setattr(class_teacher, "create_pretrained", lambda *_: network)
    monkeypatch.setattr(
        class_teacher, "_timm_convention", lambda _: InputConvention("RGB", (0, 0, 0), (1, 1, 1))
    )
    cfg = load_classification_config(BASE, [*THIN, *SHORT, "DISTILLATION.TEACHER", NAME])
    cfg.PRETRAIN.NUM_CLASSES = 3
    with pytest.raises(ValueError, match=message):
        build_class_teacher(cfg)


@pytest.mark.parametrize("known", [True, False])
def test_the_teacher_has_the_input_that_a_file_states(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a file with and without its input convention. Without it, timm's convention holds."""
    stated = InputConvention("BGR", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    network = timm.create_model("ese_vovnet19b_slim", num_classes=3)
    found = {"model": network.state_dict()}, SimpleNamespace(input=stated if known else None)
    monkeypatch.setattr(class_teacher, "read_weights", lambda path: found)
    _, convention = class_teacher._load("ese_vovnet19b_slim", "file.pth", 3)
    assert (convention == stated) == known
