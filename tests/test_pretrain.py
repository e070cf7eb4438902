# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of classifiers: data, losses, accuracy, and weights that detectors load."""

import hashlib
import json
import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from devices import shapes_alone
from engine_runs import quick
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn
from torchvision.datasets import CIFAR10

from vovnet_d2 import VOVNET_SPECS, VoVNet, VoVNetCheckpointer, get_config_file
from vovnet_d2.checkpoint import check_input_convention
from vovnet_d2.data import classification, digit_split
from vovnet_d2.data.classification import build_classification_dataset
from vovnet_d2.engine import argument_parser, classifier, load_config, pretrain
from vovnet_d2.engine.classifier import AccuracyEvaluator, ClassifierTrainer, ImageClassifier
from vovnet_d2.modeling.baselines.cifar import CIFAR_SPECS

pytest_plugins = ["engine_fixtures"]

BASE = "Classification/Base-Classification.yaml"
DETECTOR = "Digits/mask_rcnn_V_19_slim_eSE_FPN.yaml"

# A network that is so thin that an iteration takes a fraction of a second.
THIN = [
    *["MODEL.VOVNET.CONV_BODY", "V-19-slim-eSE", "MODEL.VOVNET.LAYERS_PER_BLOCK", "1"],
    *["MODEL.VOVNET.STAGE_MID_CHANNELS", "(8, 8, 8, 8)", "MODEL.VOVNET.STEM_CHANNELS", "(8, 8, 8)"],
    *["MODEL.VOVNET.STAGE_OUT_CHANNELS", "(8, 16, 16, 24)"],
]
SHORT = [
    *["PRETRAIN.IMAGE_SIZE", "32", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "2"],
    *["SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "0.01", "SOLVER.AMP.ENABLED", "False"],
    *["TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu", "SEED", "1"],
]
COLOURS = {"blue": (30, 40, 220), "green": (20, 200, 60), "red": (230, 30, 20)}


def write_images(root: Path) -> Path:
    """Write noisy images of three colours in the layout of ImageNet.

    Each colour has 6 images for training and 4 images for validation."""
    rng = np.random.default_rng(0)
    for split, number in {"train": 6, "val": 4}.items():
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                noise = rng.integers(-20, 21, (40, 48, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def load_classification_config(name: str, options: list[str]) -> CfgNode:
    return load_config(name, options, add_config=pretrain.add_pretraining_config)


def launch(
    data: Path | str, out: Path, *words: str, config: str = BASE, pictures: bool = False
) -> dict[str, Any]:
    """Run the tool. ``words`` are flags, then config options."""
    flags = [word for word in words if word.startswith("--")]
    options = [*THIN, *SHORT, "PRETRAIN.DATA", str(data), "OUTPUT_DIR", str(out)]
    options += [word for word in words if not word.startswith("--")]
    with quick(pictures=pictures):
        arguments = ["--config-file", config, *flags, *options]
        return pretrain.run(argument_parser().parse_args(arguments))


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the results of a run that is long enough to learn the colours."""
    out = tmp_path_factory.mktemp("run")
    results = launch(images, out, "SOLVER.MAX_ITER", "40", "SOLVER.BASE_LR", "0.05", pictures=True)
    assert results["classification"]["top1"] > 60
    assert "WARNING" not in read_log(out)
    return out, results


def read_log(out: Path) -> str:
    return (out / "log.txt").read_text()


# The result as MODEL.WEIGHTS ----------------------------------------------------------------------


def thin_detector() -> tuple[Any, nn.Module]:
    cfg = load_config(DETECTOR, [*THIN, "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "8"])
    return cfg, build_model(cfg)


def test_a_detector_loads_all_tensors(
    trained: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(trained[0] / "model_final.pth")
    cfg, detector = thin_detector()
    checkpointer = VoVNetCheckpointer(detector)
    with caplog.at_level(logging.WARNING):
        checkpointer.load(path)
    assert not caplog.records
    saved = torch.load(path, weights_only=True)["model"]
    loaded = detector.backbone.bottom_up.state_dict()
    assert {f"network.{name}" for name in loaded} == {n for n in saved if ".linear." not in n}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, saved[f"network.{name}"]), name
    assert check_input_convention(cfg, checkpointer.input_convention) is None

    cfg.INPUT.FORMAT = "RGB"
    assert 'INPUT.FORMAT: "BGR"' in check_input_convention(cfg, checkpointer.input_convention)


@pytest.mark.parametrize("fmt", ["BGR", "RGB"])
def test_the_input_equals_that_of_detectors(fmt: str) -> None:
    """Compare the input of the network with that of Detectron2's detectors."""
    cfg, _ = thin_detector()
    cfg.INPUT.FORMAT = fmt
    cfg.MODEL.PIXEL_STD = [57.0, 58.0, 59.0]
    detector = build_model(cfg)
    rgb = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    seen = []

    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(x)
            return {"linear": x.mean((2, 3))}

    model = ImageClassifier(
        Network(), input_format=fmt, pixel_mean=cfg.MODEL.PIXEL_MEAN, pixel_std=cfg.MODEL.PIXEL_STD
    )
    model.eval()((rgb, torch.zeros(2, dtype=torch.long)))
    images = rgb.flip(1) if fmt == "BGR" else rgb  # as Detectron2's mapper returns them
    expected = detector.preprocess_image([{"image": image} for image in images]).tensor
    assert torch.equal(seen[0], expected)


def test_accuracy_of_the_bare_network(trained: tuple[Path, Any], images: Path) -> None:
    """Load the tensors into a VoVNet without their prefix, and evaluate it without the tool."""
    out, results = trained
    saved = torch.load(out / "model_final.pth", weights_only=True)["model"]
    spec = thin_detector()[1].backbone.bottom_up.spec
    network = VoVNet(spec, norm="BN", num_classes=3)
    network.load_state_dict({k.removeprefix("network."): v for k, v in saved.items()})
    network.eval()
    predictions, targets = [], []
    for target, name in enumerate(sorted(COLOURS)):
        for path in sorted((images / "val" / name).iterdir()):
            # The shorter side is resized to 36, and the middle 32 pixels are used (about 0.875).
            image = Image.open(path).convert("RGB").resize((43, 36), Image.Resampling.BICUBIC)
            bgr = np.asarray(image)[2:34, 6:38, ::-1] - np.array([103.53, 116.28, 123.675])
            x = torch.from_numpy(bgr.transpose(2, 0, 1).copy()).float()[None]
            with torch.no_grad():
                predictions.append(int(network(x)["linear"].argmax()))
            targets.append(target)
    expected = 100 * accuracy_score(targets, predictions)
    assert results["classification"]["top1"] == pytest.approx(expected)


# Resuming, evaluating -----------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_logging")
def test_resume(images: Path, tmp_path: Path) -> None:
    launch(images, tmp_path)
    first = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert first["iteration"] == 1
    # Nothing is left to train, so nothing changes.
    launch(images, tmp_path, "--resume")
    assert "nothing is left to train" in read_log(tmp_path)
    launch(images, tmp_path, "--resume", "SOLVER.MAX_ITER", "4")
    assert "Starting training from iteration 2" in read_log(tmp_path)
    last = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert last["iteration"] == 3
    counts = [s["model"]["network.stem.conv1.norm.num_batches_tracked"] for s in (first, last)]
    assert counts == [2, 4]


def test_report(trained: tuple[Path, Any]) -> None:
    out, results = trained
    assert json.loads((out / "results.json").read_text())["results"] == {"val": results}
    assert (out / "loss_curve.png").exists()


@pytest.mark.usefixtures("fresh_logging")
def test_eval_only(trained: tuple[Path, Any], images: Path, tmp_path: Path) -> None:
    weights = str(trained[0] / "model_final.pth")
    assert launch(images, tmp_path, "--eval-only", "MODEL.WEIGHTS", weights) == trained[1]


@pytest.mark.usefixtures("fresh_logging")
def test_fine_tuning_loads_the_backbone(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """Load a network of three classes into one of ten, and train with almost no learning rate."""
    weights = trained[0] / "model_final.pth"
    launch(
        "digits", tmp_path, "MODEL.WEIGHTS", str(weights), "SOLVER.MAX_ITER", "1",
        "SOLVER.BASE_LR", "1e-30",
    )  # fmt: skip
    old, new = (
        torch.load(path, weights_only=True)["model"]
        for path in (weights, tmp_path / "model_final.pth")
    )
    assert new["network.linear.weight"].shape[0] == 10
    kernels = [name for name in old if name.endswith("v1.weight") or ".aggregation.weight" in name]
    assert kernels
    assert all(torch.equal(old[name], new[name]) for name in kernels)
    assert "network.linear.weight has shape (3, 24) in the file" in read_log(tmp_path)


@pytest.mark.slow
def test_several_processes_evaluate_each_image_once(
    trained: tuple[Path, Any], images: Path, tmp_path: Path
) -> None:
    weights = str(trained[0] / "model_final.pth")
    options = [*THIN, *SHORT, "PRETRAIN.DATA", str(images), "OUTPUT_DIR", str(tmp_path)]
    flags = ["--config-file", BASE, "--eval-only", "--num-gpus", "2", "--dist-url", "auto"]
    pretrain.main([*flags, *options, "MODEL.WEIGHTS", weights])
    (top1,) = re.findall(r"copypaste: ([\d.]+),", read_log(tmp_path))
    assert float(top1) == pytest.approx(trained[1]["classification"]["top1"], abs=1e-3)


@pytest.mark.slow
def test_several_processes_train(images: Path, tmp_path: Path) -> None:
    options = [*THIN, *SHORT, "PRETRAIN.DATA", str(images), "OUTPUT_DIR", str(tmp_path)]
    flags = ["--config-file", BASE, "--num-gpus", "2", "--dist-url", "auto"]
    pretrain.main([*flags, *options])
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    # The names have no prefix of DistributedDataParallel, as in one process.
    assert all(name.startswith("network.") for name in saved["model"])
    assert saved["iteration"] == 1


@pytest.mark.usefixtures("fresh_logging")
def test_all_options_of_timm_together(images: Path, tmp_path: Path) -> None:
    """Use all augmentations, label smoothing and an optimizer of timm in mixed precision."""
    options = {
        "PRETRAIN.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
        "PRETRAIN.RE_PROB": "1.0",
        "PRETRAIN.MIXUP": "0.2",
        "PRETRAIN.CUTMIX": "1.0",
        "PRETRAIN.LABEL_SMOOTHING": "0.1",
        "PRETRAIN.OPTIMIZER": "lamb",
        "SOLVER.AMP.ENABLED": "True",
        "SOLVER.CLIP_GRADIENTS.ENABLED": "True",
    }
    launch(images, tmp_path, *(word for pair in options.items() for word in pair))
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in floats(saved))
    losses = re.findall(r"total_loss: ([\d.]+)", read_log(tmp_path))
    assert losses
    assert all(0 < float(loss) < 10 for loss in losses)


def floats(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors.values() if tensor.is_floating_point()]


def test_norms_and_biases_are_not_decayed(images: Path) -> None:
    cfg = load_classification_config(BASE, [*THIN, *SHORT, "PRETRAIN.DATA", str(images)])
    cfg.PRETRAIN.NUM_CLASSES = 3
    model = ClassifierTrainer.build_model(cfg)
    optimizer = ClassifierTrainer.build_optimizer(cfg, model)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert decayed == weights


# Losses and accuracy ------------------------------------------------------------------------------


class Logits(nn.Module):
    """Network whose logits are the first pixels of the images."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"linear": x[:, :, 0, :].flatten(1)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss(smoothing: float) -> None:
    model = ImageClassifier(
        Logits(),
        input_format="RGB",
        pixel_mean=[0.0] * 3,
        pixel_std=[64.0] * 3,
        label_smoothing=smoothing,
    )
    images, targets = torch.randint(0, 256, (8, 3, 1, 2)), torch.randint(0, 6, (8,))
    loss = model.train()((images, targets))["loss_cls"]
    peer = LabelSmoothingCrossEntropy(smoothing)(images.flatten(1) / 64.0, targets)
    torch.testing.assert_close(loss, peer)


def test_targets_of_mixed_images(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that images and targets are mixed in the same way, and that the loss uses both."""
    cfg = load_classification_config(BASE, [*THIN, *SHORT, "PRETRAIN.MIXUP", "1.0"])
    cfg.PRETRAIN.NUM_CLASSES, cfg.PRETRAIN.LABEL_SMOOTHING = 6, 0.0
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [0.0] * 3, [255.0] * 3, "RGB"
    model = ClassifierTrainer.build_model(cfg)
    model.network = Logits()
    # An image of class c is 1 in its c-th number and 0 elsewhere, so images equal their targets.
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    pixels = 255 * nn.functional.one_hot(targets, 6).view(6, 3, 1, 2)
    seen = []
    monkeypatch.setattr(
        nn.functional, "cross_entropy", lambda x, y, label_smoothing: seen.append((x, y)) or x.sum()
    )
    model.train()((pixels, targets))
    ((logits, mixed),) = seen
    torch.testing.assert_close(logits, mixed)
    assert not torch.equal(mixed, mixed.round())


@pytest.mark.parametrize("classes", [2, 5, 12])
def test_accuracy(classes: int) -> None:
    logits, targets = torch.randn(50, classes), torch.arange(50) % classes
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    for x, y in zip(logits.split(8), targets.split(8), strict=True):
        evaluator.process((torch.empty(0), y), x)
    results = evaluator.evaluate()["classification"]
    assert results["top1"] == pytest.approx(100 * accuracy_score(targets, logits.argmax(1)))
    if classes > 5:
        expected = 100 * top_k_accuracy_score(targets, logits, k=5)
    else:
        expected = 100.0
    assert results["top5"] == pytest.approx(expected)
    evaluator.reset()
    evaluator.process((torch.empty(0), targets[:2]), logits[:2])
    assert evaluator.evaluate()["classification"]["top1"] in (0, 50, 100)


# Data ---------------------------------------------------------------------------------------------


def test_digits_equal_those_of_the_detection_data() -> None:
    scans, labels = load_digits(return_X_y=True)
    for split, indices in zip(("train", "val"), digit_split(), strict=True):
        dataset = build_classification_dataset("digits", split, image_size=40)
        assert [label for _, label in dataset] == labels[indices].tolist()
        assert dataset.classes[3] == "3"
        for (image, _), index in zip(dataset, indices[:50], strict=False):
            # Average the pixels of each cell. The outermost of the 10x10 cells are empty.
            cells = np.asarray(image)[..., 0].reshape(10, 4, 10, 4).mean((1, 3))
            scan = np.pad(scans[index].reshape(8, 8), 1) * 255 / 16
            assert np.corrcoef(cells.ravel(), scan.ravel())[0, 1] > 0.98
            # The enlargement is smooth: ink changes less between two pixels than between two cells.
            steps = [
                np.abs(np.diff(np.asarray(p, float), axis=1)).max()
                for p in (image.convert("L"), scan)
            ]
            assert steps[0] < 0.7 * steps[1]
            assert image.size == (40, 40)


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write files of CIFAR-10 with ten random images each, and set their checksums."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    checksums = {}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    contents: dict[str, Any] = {
        name: {"data": rng.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))}
        for name in names
    }
    contents["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[n, checksums[n]] for n in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[5], checksums[names[5]]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": checksums["batches.meta"]})
    return root


def test_images_are_resized_smoothly() -> None:
    """Compare with resizing in Pillow: bicubic, and in training bicubic or bilinear at random."""
    options = ["PRETRAIN.IMAGE_SIZE", "24", "PRETRAIN.CROP_PCT", "0.8", "PRETRAIN.HFLIP", "0.0"]
    options += ["PRETRAIN.SCALE", "(1.0, 1.0)", "PRETRAIN.RATIO", "(1.0, 1.0)"]
    options += ["PRETRAIN.COLOR_JITTER", "0.0", "PRETRAIN.AUTO_AUGMENT", ""]
    cfg = load_classification_config(BASE, options)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    bilinear, bicubic = (
        np.asarray(image.resize((24, 24), how)).tobytes()
        for how in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    )
    train = classifier._training_transform(cfg)
    drawn = {train(image).permute(1, 2, 0).numpy().tobytes() for _ in range(20)}
    assert drawn == {bilinear, bicubic}
    whole = np.asarray(image.resize((30, 30), Image.Resampling.BICUBIC))
    found = classifier._test_transform(cfg)(image).permute(1, 2, 0).numpy()
    assert np.array_equal(found, whole[3:27, 3:27])


def test_cifar10_is_evaluated_on_its_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(write_cifar10(tmp_path, monkeypatch))
    assert [len(build_classification_dataset(data, split)) for split in ("train", "val")] == [
        50,
        10,
    ]


@pytest.mark.usefixtures("fresh_logging")
@pytest.mark.parametrize("network", CIFAR_SPECS)
def test_cifar10(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_cifar10(tmp_path / "data", monkeypatch)
    out = tmp_path / "out"
    options = ["PRETRAIN.NETWORK", network, "PRETRAIN.IMAGE_SIZE", "8", "TEST.EVAL_PERIOD", "1"]
    results = launch(data, out, *options)
    # There are two iterations of four images.
    assert "50 images of 10 classes in train; 2 iterations are 0.2 epochs" in read_log(out)
    assert not (out / "model_best.pth").exists()  # the last weights are the best
    saved = torch.load(out / "model_final.pth", weights_only=True)["model"]
    assert saved["network.linear.weight"].shape[0] == 10
    again = launch(
        data, out, "--eval-only", "--resume", "PRETRAIN.NETWORK", network,
        "PRETRAIN.IMAGE_SIZE", "8",
    )  # fmt: skip
    assert again == results


# Config files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(Path(get_config_file(BASE)).parent.iterdir()), ids=lambda path: path.name
)
def test_config(path: Path) -> None:
    cfg = load_classification_config(str(path), ["MODEL.DEVICE", "meta"])
    cfg.PRETRAIN.NUM_CLASSES = 10
    with shapes_alone():
        network = ClassifierTrainer.build_model(cfg).network
    name = path.stem.removesuffix("_digits").replace("_", "-")
    if name in VOVNET_SPECS:
        assert network.spec == VOVNET_SPECS[name]
    detectors = load_config("Base-RCNN-VoVNet-FPN.yaml")
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        assert cfg.MODEL[key] == detectors.MODEL[key]
    assert cfg.INPUT.FORMAT == detectors.INPUT.FORMAT
    assert 0 <= cfg.SOLVER.WARMUP_ITERS < cfg.SOLVER.MAX_ITER


# The digits recipe --------------------------------------------------------------------------------


# With this thin network and small images, an iteration takes a twentieth of a second.
THIN_FOR_DIGITS = [
    *["MODEL.VOVNET.STAGE_MID_CHANNELS", "(16, 16, 24, 32)", "PRETRAIN.IMAGE_SIZE", "32"],
    *["MODEL.VOVNET.STAGE_OUT_CHANNELS", "(24, 48, 64, 96)"],
    *["MODEL.VOVNET.STEM_CHANNELS", "(16, 16, 16)", "PRETRAIN.AUTO_AUGMENT", ""],
    *["SOLVER.IMS_PER_BATCH", "32", "SOLVER.MAX_ITER", "400", "SOLVER.WARMUP_ITERS", "20"],
]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_logging")
def test_a_thin_classifier_of_digits_is_as_good_as_an_svc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train a thin network and two SVCs on the same 400 digits, and compare their accuracy.

    The trainer and the recipe are those of the shipped config for digits. The network is thinner
    than the network of that config, and the training is shorter, so the accuracy of the shipped
    config is another one. In November 2026, on an x86-64 CPU, several seeds gave the network 97.5
    to 98.3 %, and the better SVC 96.7 %.
    """
    pixels, labels = load_digits(return_X_y=True)
    train, val = digit_split()
    train = train[::3][:400]
    monkeypatch.setattr(classification, "digit_split", lambda: (train, val))
    grid = {"gamma": [0.0003, 0.0005, 0.001, 0.002, 0.004], "C": [1, 3, 10, 100]}
    # The first has the gamma of scikit-learn's example. The second is tuned on the training digits.
    machines = [SVC(gamma=0.001), GridSearchCV(SVC(), grid, cv=5)]
    best = max(
        m.fit(pixels[train], labels[train]).score(pixels[val], labels[val]) for m in machines
    )

    name = "Classification/V_19_slim_eSE_digits.yaml"
    options = [*THIN_FOR_DIGITS, "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    results = pretrain.run(argument_parser().parse_args(["--config-file", name, *options]))

    print(f"SVC {100 * best:.2f} %, classifier {results['classification']['top1']:.2f} %")
    assert results["classification"]["top1"] >= 100 * best - 1e-6


# Mistakes -----------------------------------------------------------------------------------------


def no_folder(root: Path) -> None:
    pass


def empty_folder(root: Path) -> None:
    root.mkdir()


def split_folder(root: Path) -> None:
    write_images(root)
    for name in COLOURS:
        (root / "train" / name).rename(root / name)


def flat_val(root: Path) -> None:
    write_images(root)
    for name in COLOURS:
        for path in (root / "val" / name).iterdir():
            path.rename(root / "val" / f"{name}{path.name}")
        (root / "val" / name).rmdir()


def other_classes(root: Path) -> None:
    write_images(root)
    (root / "val" / "green").rename(root / "val" / "violet")


def one_class_less(root: Path) -> None:
    write_images(root)
    shutil.rmtree(root / "train" / max(COLOURS))


def class_without_images(root: Path) -> None:
    write_images(root)
    for path in (root / "train" / "red").iterdir():
        path.rename(path.with_suffix(".raw"))


def damaged_image(root: Path) -> None:
    write_images(root)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:100])


def damaged_cifar10(root: Path) -> None:
    (root / CIFAR10.base_folder).mkdir(parents=True)


@pytest.mark.usefixtures("fresh_logging")
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (no_folder, FileNotFoundError, "no folder .*data.*'digits'"),
        (empty_folder, FileNotFoundError, "no folder 'val', but nothing.*train and val"),
        (split_folder, FileNotFoundError, "train has no folders"),
        (flat_val, FileNotFoundError, "val has no folders"),
        (other_classes, ValueError, "number 1.*'green'.*'red'"),
        (one_class_less, ValueError, f"number 2.*'missing'.*'{max(COLOURS)}'"),
        (class_without_images, FileNotFoundError, "red"),
        (damaged_image, ValueError, r"\.png cannot be read as an image"),
        (damaged_cifar10, FileNotFoundError, "incomplete or damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_wrong_data(make: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(error, match=words):
        launch(tmp_path / "data", tmp_path / "out")


@pytest.mark.usefixtures("fresh_logging")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["PRETRAIN.DATA", ""], "PRETRAIN.DATA is empty"),
        (["PRETRAIN.DATA", "digits", "DATASETS.TEST", "('test',)"], "choose from train, val"),
        (["PRETRAIN.NETWORK", "V-39"], "choose from VoVNet, DenseNet-40"),
        (["PRETRAIN.OPTIMIZER", "adamm"], "Close to it: .*adam"),
        (["PRETRAIN.AUTO_AUGMENT", "strong"], "none of timm's policies"),
        (["PRETRAIN.MIXUP", "0.1", "SOLVER.IMS_PER_BATCH", "5"], "even multiple"),
        (
            ["PRETRAIN.CUTMIX", "0.1", "SOLVER.IMS_PER_BATCH", "6", "SOLVER.ACCUMULATE", "2"],
            "computes at once, which are 3",
        ),
        (["DATASETS.TRAIN", "('train', 'extra')"], "name one split"),
        (["INPUT.FORMAT", "L"], "BGR or RGB"),
        (["MODEL.VOVNET.NORM", "FrozenBN"], "MODEL.VOVNET.NORM BN"),
        (["PRETRAIN.SIZE", "64"], "PRETRAIN.IMAGE_SIZE"),
        (["SOLVER.OPTIMIZER", "AdamW"], "PRETRAIN.OPTIMIZER names"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_options(options: list[str], words: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, KeyError), match=words):
        launch(images, tmp_path, *options)


@pytest.mark.usefixtures("fresh_logging")
def test_a_mistake_gives_one_sentence(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        pretrain.main(["PRETRAIN.DATA", "nowhere", "OUTPUT_DIR", str(tmp_path)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
