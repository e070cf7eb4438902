# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The training commands of README and docs have sensible schedules."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.config import CfgNode

from vovnet_d2.engine import Trainer, argument_parser, load_config, pretrain
from vovnet_d2.engine.lazy import LazyTrainer, lazy_argument_parser
from vovnet_d2.engine.lazy_config import load_lazy_config, to_cfg
from vovnet_d2.engine.pretrain import add_pretraining_config
from vovnet_d2.engine.scaling import scale_to_batch
from vovnet_d2.engine.schedule import fit_schedule
from vovnet_d2.engine.written import find_written

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# These words replace "..." in a command.
USUAL = "COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.yaml"


def find_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the tool and the arguments of each command."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *(" ".join(code.split()) for code in inline)]:
            found = re.search(
                r"tools/((?:pre|lazyconfig_)?train_net)\.py (.*--config-file .*)", line
            )
            if found:
                words = [USUAL if word == "..." else word for word in shlex.split(found[2])]
                if "--eval-only" not in words and "mine.yaml" not in words:
                    yield found[1], words


COMMANDS = list(find_commands())


class Schedule(NamedTuple):
    """Schedule of a command. ``written`` is the config of the file, before options change it."""

    cfg: CfgNode
    scheduler: Any
    written: CfgNode


def optimizer(rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def schedule(tool: str, words: list[str]) -> Schedule:
    if tool == "lazyconfig_train_net":
        args = lazy_argument_parser().parse_args(words)
        lazy = load_lazy_config(args.config_file, args.opts)
        cfg = to_cfg(lazy)
        scheduler = LazyTrainer.of(lazy).build_lr_scheduler(cfg, optimizer(lazy.optimizer.lr))
        written = to_cfg(load_lazy_config(args.config_file, []))
        written.SOLVER.BASE_LR = lazy.optimizer.lr
        return Schedule(cfg, scheduler, written)
    parser = pretrain.argument_parser() if tool == "pretrain_net" else argument_parser()
    args = parser.parse_args(words)
    add = add_pretraining_config if tool == "pretrain_net" else None
    written = load_config(args.config_file, add_config=add)
    if args.auto_scale_lr:
        cfg = scale_to_batch(written, args.opts)
    else:
        cfg = load_config(args.config_file, args.opts, add_config=add)
    if is_for_custom_data(words):
        cfg.DATASETS.TEST = ("own_val",)  # the name for --val-annotations
        fit_schedule(cfg, *find_written(args.config_file, args.opts), num_images=500)
    return Schedule(cfg, Trainer.build_lr_scheduler(cfg, optimizer(cfg.SOLVER.BASE_LR)), written)


def learning_rates(scheduler: Any, iterations: range) -> list[float]:
    """Return the learning rates at some iterations, without the steps in between."""
    rates = []
    for iteration in iterations:
        scheduler.last_epoch = iteration - 1
        scheduler.optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


def test_the_pages_have_commands() -> None:
    assert {tool for tool, _ in COMMANDS} == {"train_net", "pretrain_net", "lazyconfig_train_net"}
    assert len(COMMANDS) >= 10
    assert any(is_for_custom_data(words) for _, words in COMMANDS)


def is_for_custom_data(words: list[str]) -> bool:
    return any(word in ("--train-json", "--train-annotations") for word in words)


@pytest.mark.parametrize(("tool", "words"), COMMANDS, ids=lambda value: str(value)[-60:])
def test_a_documented_training_learns_and_is_evaluated_and_saved(
    tool: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the working folder of the commands
    cfg, scheduler, written = schedule(tool, words)
    total, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
    rates = learning_rates(scheduler, range(0, total, max(1, total // 500)))
    # The rate grows linearly with the batch. A cosine schedule already falls during the warm-up.
    expected = written.SOLVER.BASE_LR * batch / written.SOLVER.IMS_PER_BATCH
    assert max(rates) == pytest.approx(expected, rel=0.1)
    assert rates.index(max(rates)) < len(rates) / 5
    assert rates[-1] < 0.2 * max(rates)
    assert 2 <= (total - 1) // cfg.TEST.EVAL_PERIOD <= 60
    assert 2 <= (total - 1) // cfg.SOLVER.CHECKPOINT_PERIOD <= 100
    # Neither happens shortly before the end, because both happen at the end anyway.
    assert total % cfg.TEST.EVAL_PERIOD == 0 or total % cfg.TEST.EVAL_PERIOD > total / 50
