# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Faults within one process: signals, damaged checkpoints, a full disk, non-finite losses."""

import errno
import json
import math
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling.meta_arch import GeneralizedRCNN
from engine_runs import FASTER_RCNN, MASK_RCNN, RETINANET, launch, read_log
from fault_runs import assert_equal, load
from fvcore.nn.precise_bn import get_bn_modules
from test_pretrain import launch as launch_classifier
from test_pretrain import write_images
from torch import nn

from vovnet_d2.atomic import FileNotWrittenError, atomic_write, remove_leftovers
from vovnet_d2.checkpoint import VoVNetCheckpointer
from vovnet_d2.checkpoint.writing import Metadata, save_weights
from vovnet_d2.engine import Trainer, argument_parser
from vovnet_d2.engine.hooks import Checkpointing, EvalHook
from vovnet_d2.engine.interruption import INTERRUPTED, Interrupted, StopRequest
from vovnet_d2.engine.launch import launch_or_exit
from vovnet_d2.made import LIST_NAME

pytest_plugins = ["engine_fixtures"]

NO_TEST = ["DATASETS.TEST", "()"]
EIGHT = ["SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "3", *NO_TEST]
FINAL = "model_final.pth"


class At(HookBase):
    """Hook that calls a function after an iteration."""

    def __init__(self, iteration: int, action: Callable[[Trainer], Any]):
        self.iteration, self.action = iteration, action

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.action(self.trainer)


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return a context in which trainings call a function after an iteration."""

    @contextmanager
    def context(iteration: int, action: Callable[[Trainer], Any]) -> Iterator[None]:
        build = Trainer.build_hooks
        with monkeypatch.context() as patch:
            hooks = lambda self: [At(iteration, action), *build(self)]  # noqa: E731
            patch.setattr(Trainer, "build_hooks", hooks)
            yield

    return context


def send(number: int) -> Callable[..., None]:
    return lambda *_: os.kill(os.getpid(), number)


# Files


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for text in ("old", "new"):
        with atomic_write(path) as partial:
            Path(partial).write_text(text)
            assert path.exists() == (text == "new")
        assert path.read_text() == text

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    full = pytest.raises(FileNotWrittenError, match=r"file could not .*: No space left on device")
    with full, atomic_write(path) as partial:
        Path(partial).write_text("newer")
    assert path.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [LIST_NAME, "file"]
    with pytest.raises(ZeroDivisionError), atomic_write(path) as partial:
        Path(partial).write_text(str(1 / 0))
    (tmp_path / "file.123.vovnet_d2.partial").write_text("left by a kill")
    (tmp_path / "file.123.partial").write_text("somebody else's")
    (tmp_path / "download.partial").write_text("somebody else's")
    (tmp_path / "file.copy.vovnet_d2.partial").write_text("somebody else's, without a process id")
    assert remove_leftovers(tmp_path) == ["file.123.vovnet_d2.partial"]
    assert sorted(os.listdir(tmp_path)) == [
        *(LIST_NAME, "download.partial", "file", "file.123.partial", "file.copy.vovnet_d2.partial")
    ]


def test_a_file_is_written_if_folders_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate a network file system that cannot flush folders."""
    flush = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with atomic_write(tmp_path / "file") as partial:
        Path(partial).write_text("new")
    assert (tmp_path / "file").read_text() == "new"


def test_files_are_flushed_as_windows_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate Windows, where folders and read-only descriptors cannot be flushed."""
    flushed = []
    system_open = os.open

    def windows_open(path: str, flags: int, *mode: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        flushed.append(flags & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR))
        return system_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", windows_open)
    with atomic_write(tmp_path / "file") as partial:
        Path(partial).write_text("new")
    assert (tmp_path / "file").read_text() == "new"
    assert flushed == [os.O_RDWR]


def test_a_new_training_forgets_earlier_checkpoints(tmp_path: Path) -> None:
    def checkpointer() -> VoVNetCheckpointer:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return VoVNetCheckpointer(model, str(tmp_path), max_to_keep=1, optimizer=optimizer)

    checkpointer().save("model_1")
    second = checkpointer()
    second.resume_or_load("", resume=False)
    second.save("model_2")
    assert (tmp_path / "model_1.pth").exists()
    assert json.loads((tmp_path / "checkpoints.json").read_text()) == ["model_2.pth"]


@pytest.mark.parametrize("history", ['["../important.pth", "model_0.pth"]', "{}", "[", "[1]"])
def test_no_file_outside_the_folder_is_removed(tmp_path: Path, history: str) -> None:
    (tmp_path / "important.pth").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints.json").write_text(history)
    checkpointer = VoVNetCheckpointer(nn.Linear(1, 1), str(tmp_path / "run"), max_to_keep=1)
    checkpointer.save("model_1")
    assert (tmp_path / "important.pth").exists()
    assert (tmp_path / "run" / "model_1.pth").exists()


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Limit the size of files to this number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_on_a_full_disk(tmp_path: Path, name: str) -> None:
    tensors = {"weight": torch.zeros(100_000)}
    with disk_of(50_000), pytest.raises(FileNotWrittenError, match="File too large"):
        save_weights(str(tmp_path / name), tensors, Metadata())
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(
    coco: Path, tmp_path: Path, after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(trainer: Trainer) -> None:
        context.__enter__()

    context = disk_of(100_000)  # enough for the logs
    arguments = argument_parser().parse_args([])
    with after(4, fill), pytest.raises(SystemExit) as caught:
        launch_or_exit(lambda _: launch(FASTER_RCNN, tmp_path, *EIGHT), arguments)
    context.__exit__(None, None, None)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    last = tmp_path / "model_0000002.pth"
    assert f"error: {tmp_path}/model_0000005.pth could not be written: File too large." in error
    assert f"--resume from the last checkpoint, {last}." in error
    assert "Traceback" not in error + read_log(tmp_path)
    assert load(last)["iteration"] == 2
    launch(FASTER_RCNN, tmp_path, "--resume", *EIGHT)
    assert load(tmp_path / FINAL)["iteration"] == 7


# Signals


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (RETINANET, ["DATALOADER.NUM_WORKERS", "2"]),
        (
            MASK_RCNN,
            [
                *["SOLVER.AMP.ENABLED", "True", "MODEL.VOVNET.NORM", "GN"],
                *["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"],
                *["DATALOADER.REPEAT_THRESHOLD", "0.9"],
            ],
        ),
    ],
    ids=["retinanet", "mask"],
)
def test_a_training_resumes_exactly_after_a_signal(
    coco: Path, tmp_path: Path, after: Any, config: str, options: list[str]
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    options = [*EIGHT, *options]
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    for iteration, number in ((1, signal.SIGTERM), (3, signal.SIGHUP), (5, signal.SIGUSR1)):
        with after(iteration, send(number)), pytest.raises(Interrupted) as caught:
            launch(config, interrupted, "--resume", *options)
        assert caught.value.code == INTERRUPTED == 75
        # The signal arrives after the processes have agreed on this step.
        name = f"model_{iteration + 1:07d}.pth"
        assert f"after {iteration + 2} of 8 iterations" in caught.value.message
        assert (interrupted / "last_checkpoint").read_text() == name
        assert signal.getsignal(number) == signal.SIG_DFL
    launch(config, interrupted, "--resume", *options, "DATALOADER.NUM_WORKERS", "0")
    launch(config, whole, *options)
    compare_runs(interrupted, whole)


def test_a_drawn_seed_is_kept(coco: Path, tmp_path: Path, after: Any) -> None:
    options = [*EIGHT, "SEED", "-1"]
    launch(FASTER_RCNN, tmp_path, *options)
    expected = load(tmp_path / FINAL)
    for name in (FINAL, "model_0000005.pth"):
        (tmp_path / name).unlink()
    launch(FASTER_RCNN, tmp_path, "--resume", *options)
    assert "2.pth.\n" in read_log(tmp_path)
    assert_equal(load(tmp_path / FINAL), expected)
    launch(FASTER_RCNN, tmp_path / "other", *options)
    other = load(tmp_path / "other" / FINAL)["trainer"]["stream"]["seed"]
    assert expected["trainer"]["stream"]["seed"] != other


def compare_runs(found: Path, expected: Path) -> None:
    first, second = load(found / FINAL), load(expected / FINAL)
    assert_equal(first, second)
    assert first["trainer"]["stream"]["batches"] == 8


def test_ctrl_c_in_an_evaluation(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt an evaluation. The resumed training evaluates again, and keeps the best weights."""
    options = ["SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test", send(signal.SIGINT))
        with pytest.raises(Interrupted, match="by SIGINT after 2 of 4"):
            launch(FASTER_RCNN, tmp_path, *options)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    scores = iter([30.0, 20.0])
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": next(scores)}})
    launch(FASTER_RCNN, tmp_path, "--resume", *options)
    best = load(tmp_path / "model_best.pth")
    assert (best["iteration"], best["value"]) == (1, 30.0)
    assert_equal(best["model"], load(tmp_path / "model_0000001.pth")["model"])


def test_the_second_ctrl_c_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    request = StopRequest()
    clock = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with request.listen():
        send(signal.SIGINT)()
        send(signal.SIGINT)()  # the launcher repeats the signal
        assert request.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)()
    assert capfd.readouterr().err.count("Another Ctrl-C stops at once.") == 1


def test_classifiers_and_precise_norms(tmp_path: Path, after: Any) -> None:
    """Compare an interrupted training with a whole one, with augmented images and batches."""
    data = write_images(tmp_path / "images")
    options = ["SOLVER.MAX_ITER", "8", "TEST.EVAL_PERIOD", "4", "PRETRAIN.RE_PROB", "0.5"]
    options += ["PRETRAIN.MIXUP", "0.4", "PRETRAIN.AUTO_AUGMENT", "rand-m5", "MODEL.VOVNET.NORM"]
    options += ["BN", "TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"]
    with after(4, send(signal.SIGTERM)), pytest.raises(Interrupted):
        launch_classifier(data, tmp_path / "a", *options)
    launch_classifier(data, tmp_path / "a", "--resume", *options)
    launch_classifier(data, tmp_path / "b", *options, "DATALOADER.NUM_WORKERS", "2")
    compare_runs(tmp_path / "a", tmp_path / "b")


def test_the_evaluation_at_the_end_is_not_run_twice(tmp_path: Path) -> None:
    """Resume a finished training, which evaluates at its end like every training."""
    calls: list[int] = []
    hook = EvalHook(2, lambda: calls.append(hook.trainer.start_iter), "bbox/AP", str(tmp_path))
    for done in (2, 4):
        storage = SimpleNamespace(iter=done)
        hook.trainer = SimpleNamespace(start_iter=done, max_iter=4, storage=storage)
        hook.before_train()
    assert calls == [2]


def test_an_interrupted_last_evaluation_does_not_change_the_final_checkpoint() -> None:
    saved = []
    keep = SimpleNamespace(save=lambda name, **_: saved.append(name), get_checkpoint_file=str)
    hook = Checkpointing(keep, period=0)
    hook.trainer = SimpleNamespace(start_iter=0, iter=3, max_iter=4, gather_rank_states=list)
    hook.before_train()
    hook.after_step()
    with pytest.raises(Interrupted):
        hook.end_evaluation("SIGINT")
    assert saved == ["model_final"]


def test_a_missing_evaluation_is_run_once(tmp_path: Path, after: Any) -> None:
    data = write_images(tmp_path / "images")
    options = ["SOLVER.MAX_ITER", "6", "TEST.EVAL_PERIOD", "4", "SOLVER.CHECKPOINT_PERIOD", "4"]
    out = tmp_path / "out"
    with after(2, send(signal.SIGTERM)), pytest.raises(Interrupted, match="after 4 of 6"):
        launch_classifier(data, out, *options)
    sentence = "The evaluation after iteration 3 is missing and is run now."
    for _ in range(2):
        launch_classifier(data, out, "--resume", *options)
        assert read_log(out).count(sentence) == 1
        (out / "last_checkpoint").write_text("model_0000003.pth")
    scores = [json.loads(row) for row in (out / "metrics.json").read_text().splitlines()]
    assert {row["iteration"] for row in scores if "classification/top1" in row} >= {3}


# Checkpoints


@pytest.fixture
def run_with_checkpoints(coco: Path, tmp_path: Path) -> Path:
    """Train with checkpoints after iterations 1, 3 and 5, and a final one after iteration 5."""
    options = ["SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", *NO_TEST]
    launch(FASTER_RCNN, tmp_path, *options)
    return tmp_path


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_checkpoint_before_a_damaged_one_is_used(run_with_checkpoints: Path) -> None:
    out = run_with_checkpoints
    expected = load(out / FINAL)
    damage(out / FINAL)
    (out / "model_0000005.pth").write_bytes((out / "model_0000005.pth").read_bytes()[:1000])
    options = ["SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", *NO_TEST]
    launch(FASTER_RCNN, out, "--resume", *options)
    log = read_log(out)
    assert f"model_final.pth cannot be resumed from: {out}/model_final.pth is damaged" in log
    assert f"model_0000005.pth cannot be resumed from: {out}/model_0000005.pth is damaged" in log
    assert "4 of 6 iterations are done" in log
    assert_equal(load(out / FINAL), expected)

    for path in out.glob("model_*.pth"):
        damage(path)
    (out / "model_0000001.pth").unlink()
    with pytest.raises(ValueError, match=r"No checkpoint in .* damaged.*1\.pth is not there"):
        launch(FASTER_RCNN, out, "--resume", *options)


def test_checkpoints_that_do_not_fit_are_not_skipped(run_with_checkpoints: Path) -> None:
    with pytest.raises(ValueError, match=r"model_final\.pth was not loaded"):
        launch(FASTER_RCNN, run_with_checkpoints, "--resume", "MODEL.FPN.OUT_CHANNELS", "24")


def test_old_checkpoints_are_removed(coco: Path, tmp_path: Path) -> None:
    options = ["SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "1", *NO_TEST]
    launch(FASTER_RCNN, tmp_path, *options, "SOLVER.CHECKPOINTS_KEPT", "2", "SOLVER.MAX_ITER", "5")
    names = ["model_0000003.pth", "model_0000004.pth", FINAL]
    assert sorted(path.name for path in tmp_path.glob("model_*.pth")) == names
    launch(FASTER_RCNN, tmp_path, "--resume", *options, "SOLVER.CHECKPOINTS_KEPT", "1")
    names = ["model_0000005.pth", FINAL]
    assert sorted(path.name for path in tmp_path.glob("model_*.pth")) == names


def test_another_batch_continues_after_the_seen_images(coco: Path, tmp_path: Path) -> None:
    options = ["SOLVER.WARMUP_ITERS", "0", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", *NO_TEST]
    launch(FASTER_RCNN, tmp_path, *options, "SOLVER.MAX_ITER", "6")
    options += ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.004", "SOLVER.MAX_ITER", "5"]
    launch(FASTER_RCNN, tmp_path, "--resume", *options)
    log = read_log(tmp_path)
    assert "after the 12 images seen, from iteration 3 of this run's" in log
    state = load(tmp_path / FINAL)["trainer"]
    assert (state["stream"]["origin"], state["stream"]["batches"]) == (12, 2)
    assert state["hooks"]["LRScheduler"]["last_epoch"] == 5
    rates = [json.loads(row)["lr"] for row in (tmp_path / "metrics.json").read_text().splitlines()]
    assert rates[-1] == pytest.approx(0.004 * (1 + math.cos(math.pi * 4 / 5)) / 2)


# Losses


@pytest.fixture
def broken_loss(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Break the loss of the third and fourth steps, and raise Detectron2's error in the fifth.

    Return the images of all steps.
    """
    images: list[list[str]] = []
    forward = GeneralizedRCNN.forward

    def patched(self: GeneralizedRCNN, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        losses = forward(self, batch)
        norm = self.backbone.bottom_up.stem.conv1.norm
        if self.training:
            images.append([record["file_name"] for record in batch])
            if len(images) in (3, 4):
                losses["loss_cls"] = losses["loss_cls"] * math.nan
                norm.running_mean.data.fill_(math.nan)  # the backward pass does not notice it
            if len(images) == 5:
                raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        return losses

    monkeypatch.setattr(GeneralizedRCNN, "forward", patched)
    return images


def test_a_loss_that_is_not_finite_ends_the_training(
    coco: Path, tmp_path: Path, broken_loss: list[list[str]]
) -> None:
    with pytest.raises(FloatingPointError, match=r"iteration 2\. loss_cls is nan\.") as caught:
        launch(FASTER_RCNN, tmp_path, *EIGHT, "SOLVER.CHECKPOINT_PERIOD", "2")
    record = json.loads((tmp_path / "nonfinite_0000002.json").read_text())
    assert record["iteration"] == 2
    assert record["learning_rate"] == 0.002
    assert record["seed"] == 1
    (process,) = record["processes"]
    assert process["images"] == broken_loss[-1]
    assert process["losses"]["loss_cls"] == "nan"
    assert process["losses"]["loss_rpn_cls"] > 0
    for part in (
        str(tmp_path / "nonfinite_0000002.json"),
        "0.002",
        "model_0000001.pth",
        *broken_loss[-1],
    ):
        assert part in str(caught.value)
    # The state equals that of the last checkpoint, because no step was made since.
    state, last = (load(tmp_path / n) for n in ("nonfinite_0000002.pth", "model_0000001.pth"))
    assert_equal(state, last)

    # A resume from this state makes the same step again.
    (tmp_path / "last_checkpoint").write_text("nonfinite_0000002.pth")
    with pytest.raises(FloatingPointError, match="iteration 2"):
        launch(FASTER_RCNN, tmp_path, "--resume", *EIGHT)
    assert broken_loss[3] == broken_loss[2]


def test_a_skipped_step_does_not_change_norms(
    coco: Path, tmp_path: Path, broken_loss: list[list[str]], after: Any
) -> None:
    """Skip a step after the buffers of norms were replaced, as PreciseBN does."""

    def exchange(trainer: Trainer) -> None:
        for norm in get_bn_modules(trainer.model):
            norm.running_mean = norm.running_mean.clone()

    options = [*EIGHT, "SOLVER.MAX_ITER", "4", "SOLVER.MAX_SKIPPED_STEPS", "2"]
    with after(0, exchange):
        launch(FASTER_RCNN, tmp_path, *options)
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / FINAL)["model"].values())


def test_some_steps_may_be_skipped(
    coco: Path, tmp_path: Path, broken_loss: list[list[str]]
) -> None:
    options = [*EIGHT, "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_SKIPPED_STEPS"]
    launch(FASTER_RCNN, tmp_path / "a", *options, "3")
    log = read_log(tmp_path / "a")
    assert "Iteration 2 is skipped, number 1 of the 3" in log
    assert "Iteration 4 is skipped, number 3 of the 3" in log
    before, after, final = (
        load(tmp_path / "a" / name) for name in ("model_0000001.pth", "model_0000004.pth", FINAL)
    )
    assert_equal(after["model"], before["model"])
    assert all(tensor.isfinite().all() for tensor in final["model"].values())
    assert final["trainer"]["skipped_steps"] == 3
    name = "proposal_generator.rpn_head.conv.weight"
    assert not torch.equal(final["model"][name], after["model"][name])

    broken_loss.clear()
    with pytest.raises(FloatingPointError, match=r"iteration 4\. Predicted boxes or scores"):
        launch(FASTER_RCNN, tmp_path / "b", *options, "2")
    assert (tmp_path / "b" / "nonfinite_0000004.json").exists()
