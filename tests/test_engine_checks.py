# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Mistakes that the launcher finds before training, and their messages."""

import json
import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from coco_tree import THINGS
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin import register_all_coco, register_all_pascal_voc
from detectron2.utils import comm
from devices import shapes_alone
from engine_runs import FASTER_RCNN, RETINANET

from vovnet_d2.checkpoint.zoo import ZOO
from vovnet_d2.data import register_digits
from vovnet_d2.engine import load_config
from vovnet_d2.engine.data_checks import check_data
from vovnet_d2.engine.devices import check_device, parse_device
from vovnet_d2.engine.initial_weights import check_all_loaded, check_initialisation
from vovnet_d2.engine.precision import autocast_dtype
from vovnet_d2.engine.registered_data import load_records
from vovnet_d2.engine.run_checks import check_config, check_schedule

pytest_plugins = ["engine_fixtures"]

SCRATCH = ["MODEL.VOVNET.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"]


def config(*options: str, file: str = FASTER_RCNN) -> CfgNode:
    return load_config(file, ["MODEL.DEVICE", "cpu", *options])


# Data


def test_the_miniature_passes(coco: Path) -> None:
    check_data(config(), training=True)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_unknown_data_set(coco: Path, key: str) -> None:
    cfg = config(f"DATASETS.{key}", "('coco_2017_vall',)")
    with pytest.raises(KeyError, match=rf"'coco_2017_vall' of DATASETS.{key} .*coco_2017_val"):
        check_data(cfg, training=True)


def test_no_data_set(coco: Path) -> None:
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN is empty: give --config-file"):
        check_data(config("DATASETS.TRAIN", "()"), training=True)
    with pytest.raises(ValueError, match=r"DATASETS.TEST is empty"):
        check_data(config("DATASETS.TEST", "()"), training=False)
    check_data(config("DATASETS.TEST", "()"), training=True)
    check_data(config("DATASETS.TRAIN", "()"), training=False)


@pytest.mark.parametrize("gone", ["annotations/instances_val2017.json", "val2017", "train2017"])
def test_missing_files(
    catalogs: None, coco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    shutil.copytree(coco_root / "coco", tmp_path / "coco")
    path = tmp_path / "coco" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    register_all_coco(str(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    message = rf"missing: {path}\. .*DETECTRON2_DATASETS \(which is {tmp_path}\)"
    with pytest.raises(FileNotFoundError, match=message):
        check_data(config(), training=True)


def test_missing_voc_folder(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_all_pascal_voc(str(tmp_path))
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    cfg = config("DATASETS.TEST", "('voc_2007_val',)", "MODEL.ROI_HEADS.NUM_CLASSES", "20")
    with pytest.raises(FileNotFoundError, match=r"VOC2007\. .*unset, so .*datasets"):
        check_data(cfg, training=False)


def test_a_data_set_that_builds_itself_is_not_missing(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    register_digits()
    for name in ("digits_train", "digits_val"):
        metadata = MetadataCatalog.get(name)
        folder = tmp_path / name
        del metadata.json_file, metadata.image_root
        metadata.set(json_file=str(folder / "x.json"), image_root=str(folder))

        def build(folder: Path = folder) -> list:
            folder.mkdir()
            (folder / "x.json").touch()
            built.append(folder)
            return []

        monkeypatch.setitem(DatasetCatalog.data, name, build)
    options = ["DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "('digits_val',)"]
    check_data(config(*options, "MODEL.ROI_HEADS.NUM_CLASSES", "10"), training=True)
    assert len(built) == 2


def break_ids(content: dict) -> None:
    content["annotations"][1]["id"] = content["annotations"][0]["id"]


def break_category(content: dict) -> None:
    content["annotations"][0]["category_id"] = 1234


def break_images(content: dict) -> None:
    del content["images"][0]["height"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (break_ids, "AssertionError: .* not unique"),
        (break_category, "KeyError: Encountered category_id=1234"),
        (break_images, "KeyError: height"),
        (None, "JSONDecodeError: .*line 1 column"),
    ],
)
def test_a_file_with_faults(
    coco: Path, tmp_path: Path, spoil: Callable[[dict], None] | None, reason: str
) -> None:
    text = (coco / "coco" / "annotations" / "instances_val2017.json").read_text()
    path = tmp_path / "mine.json"
    if spoil:
        content = json.loads(text)
        spoil(content)
        path.write_text(json.dumps(content))
    else:
        path.write_text(text[:100])
    register_coco_instances("mine", {}, str(path), str(coco / "coco" / "val2017"))
    message = f"Data set mine cannot be loaded from {path}: {reason}"
    with pytest.raises(ValueError, match=message):
        check_data(config("DATASETS.TEST", "('mine',)"), training=False)


def test_two_images_of_one_id(coco: Path, tmp_path: Path) -> None:
    """Refuse two images with one id, because Detectron2's loader would merge them."""
    content = json.loads((coco / "coco" / "annotations" / "instances_val2017.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(content))
    register_coco_instances("mine", {}, f"{tmp_path}/mine.json", str(coco / "coco" / "val2017"))
    check_data(config("DATASETS.TEST", "('mine',)"), training=False)
    content["images"][1]["id"] = float(content["images"][0]["id"])
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"two images of .*mine\.json have the id \d+\. tools"):
        check_data(config("DATASETS.TEST", "('mine',)"), training=False)


def test_errors_of_detectron2s_loader_are_sentences(coco: Path, tmp_path: Path) -> None:
    """Load a file whose polygon is not in a list, which raises a TypeError in Detectron2."""
    content = json.loads((coco / "coco" / "annotations" / "instances_val2017.json").read_text())
    content["annotations"][0]["segmentation"] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    (tmp_path / "mine.json").write_text(json.dumps(content))
    register_coco_instances("mine", {}, f"{tmp_path}/mine.json", str(coco / "coco" / "val2017"))
    sentence = r"mine cannot be loaded from .*mine\.json: TypeError: .* tools/check_dataset"
    for load in (
        partial(check_data, config("DATASETS.TEST", "('mine',)"), training=False),
        partial(load_records, "mine"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load()
    DatasetCatalog.register("theirs", lambda: 1 + "1")
    with pytest.raises(TypeError):
        load_records("theirs")


def test_a_function_that_fails_without_a_message(catalogs: None) -> None:
    def load() -> list:
        raise AssertionError

    DatasetCatalog.register("mine", load)
    with pytest.raises(ValueError, match=r"mine cannot be loaded from the function .*: Assert"):
        check_data(config("DATASETS.TEST", "('mine',)"), training=False)


@pytest.mark.parametrize("installed", [False, True])
def test_missing_panoptic_files_are_only_named_if_needed(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    found = ModuleSpec("panopticapi", None) if installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    MetadataCatalog.get("mine").set(
        thing_classes=["a"],
        panoptic_root=str(tmp_path),
        panoptic_json=str(tmp_path / "panoptic.json"),
        evaluator_type="coco_panoptic_seg",
    )
    DatasetCatalog.register("mine", list)
    options = ["MODEL.ROI_HEADS.NUM_CLASSES", "1", "DATASETS.TRAIN", "('mine',)"]
    check_data(config(*options, "DATASETS.TEST", "()"), training=True)
    expected = pytest.raises(FileNotFoundError, match=r"missing: .*panoptic\.json\.")
    with expected if installed else nullcontext():
        check_data(config(*options, "DATASETS.TEST", "('mine',)"), training=True)


@pytest.mark.parametrize(
    ("file", "key"),
    [(FASTER_RCNN, "MODEL.ROI_HEADS.NUM_CLASSES"), (RETINANET, "MODEL.RETINANET.NUM_CLASSES")],
)
def test_number_of_categories(coco: Path, file: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"80 categories and the network 7: set {key} 80"):
        check_data(config(key, "7", file=file), training=True)


def test_number_of_semantic_categories(catalogs: None) -> None:
    MetadataCatalog.get("stuff").set(stuff_classes=["sky", "sea"], evaluator_type="sem_seg")
    DatasetCatalog.register("stuff", list)
    cfg = config("DATASETS.TRAIN", "('stuff',)", "DATASETS.TEST", "()")
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with pytest.raises(ValueError, match=r"2 categories .* set MODEL.SEM_SEG_HEAD.NUM_CLASSES 2"):
        check_data(cfg, training=True)


def test_validation_categories_that_training_does_not_have(coco: Path, tmp_path: Path) -> None:
    annotations = (coco / "coco" / "annotations" / "instances_val2017.json").read_text()
    second, third = THINGS[1]["name"], THINGS[2]["name"]
    swapped = annotations.replace(f'"{second}"', '"?"').replace(f'"{third}"', f'"{second}"')
    path = tmp_path / "swapped.json"
    path.write_text(swapped.replace('"?"', f'"{third}"'))
    register_coco_instances("mine", {}, str(path), str(coco / "coco" / "val2017"))
    message = rf"coco_2017_train and mine .* number 1 is '{second}' in one and '{third}' in the"
    with pytest.raises(ValueError, match=message):
        check_data(config("DATASETS.TEST", "('mine',)"), training=True)


# Weights


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["MODEL.VOVNET.NORM", "FrozenBN"], "MODEL.VOVNET.NORM BN"),
        (["MODEL.VOVNET.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "2"], "FREEZE_AT 0"),
        (["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"], "MODEL.RESNETS.NORM BN"),
    ],
)
def test_training_frozen_layers_without_weights(options: list[str], named: str) -> None:
    if "build_resnet_fpn_backbone" in options:
        levels = "('res2', 'res3', 'res4', 'res5')"
        options = [*options, "MODEL.FPN.IN_FEATURES", levels, "MODEL.RESNETS.OUT_FEATURES", levels]
    cfg = config(*options)
    with pytest.raises(ValueError, match=rf"MODEL.WEIGHTS is empty .*{named}"):
        check_initialisation(cfg, training=True, resuming=False)
    check_initialisation(cfg, training=True, resuming=True)
    cfg.MODEL.WEIGHTS = "some.pth"
    check_initialisation(cfg, training=True, resuming=False)


def test_training_from_scratch_is_allowed() -> None:
    check_initialisation(config(*SCRATCH), training=True, resuming=False)


@pytest.mark.parametrize(("name", "variant"), [(n, e.variant) for n, e in ZOO.items()])
def test_available_weights_are_named(name: str, variant: str) -> None:
    with pytest.raises(ValueError, match=rf"\(MODEL.WEIGHTS [^;]*{name}"), shapes_alone():
        check_initialisation(
            config("MODEL.VOVNET.CONV_BODY", variant, "MODEL.VOVNET.NORM", "FrozenBN"),
            training=True,
            resuming=False,
        )


def test_evaluating_nothing() -> None:
    with pytest.raises(ValueError, match=r"no weights to evaluate: set MODEL.WEIGHTS .*--resume"):
        check_initialisation(config(), training=False, resuming=False)


def test_weights_of_another_number_of_categories_name_the_config() -> None:
    checkpointer = SimpleNamespace(
        missing_outside_backbone=["roi_heads.box_predictor.cls_score.weight"],
        loaded_categories={"thing_classes": ["cat", "dog"]},
    )
    message = r"They were trained on 2 categories \('cat', 'dog'\): use the config\.yaml"
    with pytest.raises(ValueError, match=message):
        check_all_loaded(checkpointer, "a.pth")
    checkpointer.loaded_categories = {}
    with pytest.raises(ValueError, match="Train first"):
        check_all_loaded(checkpointer, "a.pth")


# The rest of the config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "RetinaNett"], "'RetinaNett' is not registered.*RetinaNet"),
        (
            ["MODEL.BACKBONE.NAME", "build_vovnet_fpn"],
            r"BACKBONE.NAME 'build_vovnet_fpn' .*build_vovnet_fpn_backbone",
        ),
        (
            ["MODEL.CHANNELS_LAST", "auto"],
            "CHANNELS_LAST is 'auto': choose True, False, or None for what is faster",
        ),
        (
            ["MODEL.KEYPOINT_ON", "True", "MODEL.CHANNELS_LAST", "True"],
            "needs MODEL.CHANNELS_LAST False",
        ),
        (["SOLVER.IMS_PER_BATCH", "0"], "IMS_PER_BATCH is 0: it must be a multiple .* is 1"),
        (
            ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float8"],
            "'float8': choose from 'auto'",
        ),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"], "float16 needs a GPU"),
        (["TEST.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"], "float16 needs a GPU"),
        (
            ["MODEL.META_ARCHITECTURE", "RetinaNet", "TEST.AUG.ENABLED", "True"],
            "for GeneralizedRCNN without keypoints only: set TEST.AUG.ENABLED False",
        ),
        (
            ["MODEL.KEYPOINT_ON", "True", "TEST.AUG.ENABLED", "True"],
            "for GeneralizedRCNN without keypoints only: set TEST.AUG.ENABLED False",
        ),
        *(
            (
                [*learned, "MODEL.MASK_ON", "True", "INPUT.COPY_PASTE", "0.5"],
                "INPUT.COPY_PASTE 0.5 pastes .* no keypoints and no label maps",
            )
            for learned in (
                ["MODEL.META_ARCHITECTURE", "PanopticFPN"],
                ["MODEL.META_ARCHITECTURE", "SemanticSegmentor"],
                ["MODEL.KEYPOINT_ON", "True"],
            )
        ),
    ],
)
def test_settings_that_contradict_each_other(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(config(*options), training=True)


@pytest.mark.parametrize(("capability", "dtype"), [(7, "float16"), (8, "bfloat16")])
def test_mixed_precision_is_bfloat16_if_the_gpu_has_it(
    capability: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check GPUs before and since Ampere. torch reports bfloat16 as supported on both."""
    facts = SimpleNamespace(major=capability, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert autocast_dtype(config("MODEL.DEVICE", "cuda")) == getattr(torch, dtype)
    assert autocast_dtype(config()) == torch.bfloat16
    words = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.DTYPE", "bfloat16"]
    if dtype == "float16":
        with pytest.raises(ValueError, match=r"does not compute in bfloat16: set SOLVER.AMP.DTYPE"):
            autocast_dtype(config(*words))
    else:
        assert autocast_dtype(config(*words)) == torch.bfloat16


def test_the_processes_have_equal_shares_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    check_config(config("SOLVER.IMS_PER_BATCH", "6"), training=True)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 8: it must be a multiple .* is 3"):
        check_config(config("SOLVER.IMS_PER_BATCH", "8"), training=True)


def keypoints(count: str, sigmas: str, test: str = "('people',)") -> CfgNode:
    return config(
        *["MODEL.KEYPOINT_ON", "True", "MODEL.CHANNELS_LAST", "False"],
        *["MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", count],
        *["TEST.KEYPOINT_OKS_SIGMAS", sigmas],
        *["DATASETS.TRAIN", "('people',)", "DATASETS.TEST", test],
    )


@pytest.fixture
def people(catalogs: None) -> None:
    names = [f"k{number}" for number in range(17)]
    metadata = {"thing_classes": ["person"], "evaluator_type": "coco", "keypoint_names": names}
    MetadataCatalog.get("people").set(**metadata)
    DatasetCatalog.register("people", list)


@pytest.mark.parametrize(
    ("count", "sigmas", "message"),
    [
        ("5", "[]", r'is 5, and .* has 17 sigmas: give one .* "\[0.05, 0.05, 0.05, 0.05, 0.05\]"'),
        ("17", "[0.1, 0.1]", "is 17, and .* has 2 sigmas"),
    ],
)
def test_each_keypoint_needs_a_sigma(people: None, count: str, sigmas: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_data(keypoints(count, sigmas), training=True)
    check_data(keypoints(count, sigmas, test="()"), training=True)
    check_data(keypoints(count, str([0.1] * int(count))), training=True)


def test_sigmas_of_coco_for_other_keypoints_are_a_warning(
    people: None, caplog: pytest.LogCaptureFixture
) -> None:
    check_data(keypoints("17", str([0.1] * 17)), training=True)
    assert not caplog.text
    check_data(keypoints("17", "[]"), training=True)
    assert "The keypoints of people are not COCO's" in caplog.text


def test_a_training_that_is_all_warm_up_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    options = ["SOLVER.WARMUP_ITERS", "100", "SOLVER.MAX_ITER"]
    check_schedule(config(*options, "101"))
    assert not caplog.text
    check_schedule(config(*options, "100"))
    assert "SOLVER.WARMUP_ITERS 100 is not below SOLVER.MAX_ITER 100" in caplog.text


def test_evaluation_does_not_check_training_settings() -> None:
    options = ["SOLVER.IMS_PER_BATCH", "0", "SOLVER.AMP.ENABLED", "True"]
    check_config(config(*options, "SOLVER.AMP.DTYPE", "float16"), training=False)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:1"):
        assert parse_device(name) == torch.device(name)
    for name in ("gpu", "meta", "mps", "cuda:2", "cuda:-1", ""):
        with pytest.raises(ArgumentTypeError, match=rf"'{name}' .* cpu, cuda, cuda:0, cuda:1$"):
            parse_device(name)


def test_several_processes_do_not_share_the_cpu_of_a_machine_with_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_device(config("MODEL.DEVICE", "cpu"))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="hide these with CUDA_VISIBLE_DEVICES=''"):
        check_device(config("MODEL.DEVICE", "cpu"))
