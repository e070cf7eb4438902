# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Workers of data loaders with each start method: fork, forkserver (Python 3.14 on Linux) and spawn
(macOS, Windows). Other methods than fork send objects to workers by pickle."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import FASTER_RCNN, TINY, tiny_config
from test_lazyconfig import TINY as TINY_LAZY
from test_pretrain import SHORT, THIN
from torch.utils.data import DataLoader

from vovnet_d2.data.stream import TrainingStream
from vovnet_d2.engine import Trainer, load_config
from vovnet_d2.engine.classifier import ClassifierTrainer
from vovnet_d2.engine.lazy import LazyTrainer
from vovnet_d2.engine.lazy_config import load_lazy_config, to_cfg
from vovnet_d2.engine.pretrain import add_pretraining_config

pytest_plugins = ["engine_fixtures"]

TOOLS = Path(__file__).parents[1] / "tools"
LAZY = "lazy/COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.py"
DIGITS = "Classification/V_19_slim_eSE_digits.yaml"
# This code runs a tool with another start method.
RUN = """
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1))
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def detector(folder: Path) -> tuple[Iterable[Any], Iterable[Any]]:
    cfg = tiny_config(FASTER_RCNN, folder, "DATALOADER.MAX_UNREADABLE", "0")
    return Trainer.build_train_loader(cfg), Trainer.build_test_loader(cfg, "coco_2017_val")


def lazy_detector(folder: Path) -> tuple[Iterable[Any], Iterable[Any]]:
    config = load_lazy_config(LAZY, [*TINY_LAZY, f"train.output_dir={folder}"])
    trainer, cfg = LazyTrainer.of(config), to_cfg(config)
    return trainer.build_train_loader(cfg), trainer.build_test_loader(cfg, "coco_2017_val")


def classifier(folder: Path) -> tuple[Iterable[Any], Iterable[Any]]:
    options = ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(folder)]
    cfg = load_config(DIGITS, options, add_config=add_pretraining_config)
    cfg.PRETRAIN.NUM_CLASSES = 10
    loader = ClassifierTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    return ClassifierTrainer.build_train_loader(cfg), loader


@pytest.mark.parametrize("build", [detector, lazy_detector, classifier])
def test_objects_for_workers_can_be_pickled(build: Any, coco: Path, tmp_path: Path) -> None:
    train, test = build(tmp_path)
    assert isinstance(train, TrainingStream)
    assert isinstance(test, DataLoader)
    batch = next(train.batches(train.place))
    for loader, index in ((iter(train), batch[0]), (test, 0)):
        dataset = loader._dataset if loader is not test else test.dataset
        sent = (dataset, loader._collate_fn if loader is not test else test.collate_fn)
        copied, collate = pickle.loads(pickle.dumps(sent))
        torch.manual_seed(0)
        found = copied[index]
        torch.manual_seed(0)
        assert str(found) == str(dataset[index])
        assert len(collate([found])) > 0
    assert pickle.loads(pickle.dumps(test.worker_init_fn)) is test.worker_init_fn


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "method"),
    [("train_net", "forkserver"), ("lazyconfig_train_net", "spawn"), ("pretrain_net", "spawn")],
)
def test_tools_with_workers(coco_root: Path, tmp_path: Path, tool: str, method: str) -> None:
    yaml = ["DATALOADER.NUM_WORKERS", "1", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]
    words = {
        "train_net": ["--config-file", FASTER_RCNN, *TINY, *yaml],
        "lazyconfig_train_net": [
            *["--config-file", LAZY, *TINY_LAZY, f"train.output_dir={tmp_path}"],
            *["dataloader.train.num_workers=1", "dataloader.test.num_workers=1"],
        ],
        "pretrain_net": ["--config-file", DIGITS, *THIN, *SHORT, *yaml],
    }[tool]
    script = tmp_path / "run.py"
    script.write_text(RUN)
    done = subprocess.run(
        [sys.executable, str(script), method, str(TOOLS / f"{tool}.py"), *words],
        env={**os.environ, "DETECTRON2_DATASETS": str(coco_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "results.json").is_file()
