# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's DefaultTrainer on GPUs and CPUs, in full and mixed precision."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from traceback import clear_frames
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..checkpoint import VoVNetCheckpointer
from ..data.copy_paste import CopyPaste
from ..data.mapper import AugmentedTestMapper, Mapper, build_augmentations, build_mapper
from ..data.stream import Place, TrainingStream, build_detection_stream, seed_all, step_seed
from ..data.unreadable import ReadableOnly, image_roots
from ..data.workers import attend_to_workers
from ..errors import UserValueError
from ..tiles import TiledDetector
from .averaging import EMA_SUFFIX, WeightAverage, name_of_average
from .categories import category_names, find_difference
from .compilation import compile_backbone, explain_compilation, run_eagerly
from .data_checks import check_stream
from .dense import read_loss_normalizers, write_loss_normalizers
from .distillation import add_teacher
from .evaluation import build_evaluator, main_metric
from .hooks import (
    BestCheckpointer,
    Checkpointing,
    EarlyStopping,
    EndOfTraining,
    EpochCount,
    EpochPrinter,
    EvalHook,
    PreciseBN,
    UnreadableCount,
    WeightsCheckpointer,
)
from .initial_weights import report_loaded
from .interruption import Interrupted, StopRequest, exit_on_signal
from .loggers import TrackerWriter
from .memory_format import to_memory_format
from .nonfinite import (
    AgreedSteps,
    KeptStatistics,
    NonFiniteLossError,
    TrainingDivergedError,
    explain,
    write_record,
)
from .precision import autocast, autocast_dtype, predict_in_float32
from .registered_data import explain_loading
from .solver import build_optimizer

__all__ = ["MixedPrecisionTrainer", "Trainer"]

logger = logging.getLogger(__name__)

Results = dict[str, Any]


class MixedPrecisionTrainer(AgreedSteps):
    """A :class:`SimpleTrainer` whose forward pass runs under autocast, on any device.

    float16 losses are scaled, so that small gradients do not vanish; bfloat16 needs no scaling.
    Detectron2's AMPTrainer does this on GPUs only.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        dtype: torch.dtype,
        **options: Any,
    ):
        """
        Args:
            dtype: what the forward pass computes in.
            options: see :class:`AgreedSteps`.
        """
        super().__init__(model, data_loader, optimizer, **options)
        self.device = device
        self.dtype = dtype
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def forward(self, data: Any) -> dict[str, torch.Tensor] | torch.Tensor:
        with torch.autocast(self.device.type, self.dtype):
            return super().forward(data)

    def backward(self, loss: torch.Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def update(self) -> None:
        # Gradients are clipped before the step, in which fused optimizers would unscale them.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class Trainer(DefaultTrainer):
    """A trainer and evaluator of the network that a config describes.

    Beyond :class:`DefaultTrainer` it evaluates every kind of data set that Detectron2 has an
    evaluator for, keeps the best weights where ``TEST.EVAL_PERIOD`` is set and the average of the
    weights where ``SOLVER.EMA`` is, and runs on CPUs in mixed precision and several processes too.

    It may be interrupted at any time: resumed, it has the data, the random numbers and so, on a
    CPU, the parameters that it would have had. All randomness follows from the seed, the
    iteration and the position of a sample in :class:`~vovnet_d2.data.stream.TrainingStream`.
    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end it after the step that is being made, with a checkpoint,
    by :class:`~vovnet_d2.engine.interruption.Interrupted`.

    Attributes:
        stop_signal: the name of a signal that one of the processes had got before the latest step;
            None if there was no signal.
        earlier_seconds: wall time of the training before it was resumed, up to the checkpoint.
    """

    _average: WeightAverage | None = None

    def __init__(self, cfg: CfgNode, *, allow_partial: bool = False, allow_pickle: bool = False):
        """
        Args:
            cfg: a config with this package's keys.
            allow_partial, allow_pickle: see :class:`VoVNetCheckpointer`.
        """
        # DefaultTrainer's constructor is not called, because it builds other parts.
        TrainerBase.__init__(self)
        for name in ("detectron2", "vovnet_d2"):  # default_setup knows the first only
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        device = torch.device(cfg.MODEL.DEVICE)
        model = self.build_model(cfg)
        self.add_teacher(cfg, model, allow_pickle=allow_pickle)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        if cfg.SOLVER.COMPILE.ENABLED:
            budget = cfg.SOLVER.COMPILE.MEMORY_BUDGET
            compile_backbone(model, memory_budget=budget, dynamic=not cfg.INPUT.FIXED_SIZE)
        model = create_ddp_model(
            model,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # one copy of the gradients instead of two
            device_ids=[comm.get_local_rank()] if device.type == "cuda" else None,
        )
        self._request = StopRequest()
        parts: Any = (model, data_loader, optimizer)
        options: Any = {"request": self._request, "accumulate": cfg.SOLVER.ACCUMULATE}
        if cfg.SOLVER.AMP.ENABLED:
            options |= {"device": device, "dtype": autocast_dtype(cfg)}
            self._trainer: AgreedSteps = MixedPrecisionTrainer(*parts, **options)
        else:
            self._trainer = AgreedSteps(*parts, **options)
        self._statistics = KeptStatistics(model)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = VoVNetCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            allow_partial=allow_partial,
            allow_pickle=allow_pickle,
            max_to_keep=cfg.SOLVER.CHECKPOINTS_KEPT,
            categories=category_names(cfg.DATASETS.TRAIN),
            trainer=weakref.proxy(self),
        )
        self.earlier_seconds = 0.0
        self._began = time.perf_counter()
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: Results = {}
        self._rank_states: list[dict[str, float]] = []
        self._skipped_steps = 0
        processes = comm.get_world_size()
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._place = Place(seed, 0, 0, cfg.SOLVER.IMS_PER_BATCH, processes)  # at start_iter
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's, in its order, and the best checkpoint before the writers."""
        cfg = self.cfg
        period, metric = cfg.TEST.EVAL_PERIOD, self.main_metric(cfg)
        found: list[HookBase | None] = [hooks.IterationTimer(), hooks.LRScheduler()]
        # The networks that are evaluated, each with its metric and the file of its best weights.
        judged = [(self.model, metric, "model_best")] if metric else []
        categories = self.checkpointer.categories
        averaged = None
        if cfg.SOLVER.EMA:
            self._average = WeightAverage(self.checkpointer.model, cfg.SOLVER.EMA)
            found.append(self._average)
            model = self._average.model
            averaged = WeightsCheckpointer(model, cfg.OUTPUT_DIR, categories=categories)
            if metric:
                judged.append((model, name_of_average(metric), "model_best_ema"))
        period_of_checkpoints = cfg.SOLVER.CHECKPOINT_PERIOD
        self._checkpointing = Checkpointing(self.checkpointer, period_of_checkpoints, averaged)
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            own = cfg.clone()
            own.defrost()
            own.DATALOADER.NUM_WORKERS = 0
            data_loader = self.build_train_loader(own)
            found.append(PreciseBN(period, self.model, data_loader, cfg.TEST.PRECISE_BN.NUM_ITER))
        found.append(self._checkpointing)
        evaluate = self._interruptible(self._test_and_keep)
        found.append(EvalHook(period, evaluate, metric, cfg.OUTPUT_DIR))
        if cfg.TEST.AUG.ENABLED:
            found.append(hooks.EvalHook(0, self._interruptible(self._test_with_tta_and_keep)))
        if comm.is_main_process():
            for model, name, file in judged * (period > 0):
                best = (period, model, cfg.OUTPUT_DIR, name)
                found.append(BestCheckpointer(*best, file_prefix=file, categories=categories))
            found.append(UnreadableCount())
            found.append(EpochCount())
            found.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        if judged and period > 0 and (patience := cfg.TEST.PATIENCE) > 0:
            _, name, file = judged[-1]  # the average decides, as its weights are the ones to use
            ending = (self._checkpointing, period, name, patience, cfg.OUTPUT_DIR)
            found.append(EarlyStopping(*ending, best=file))
        return found

    def build_writers(self) -> list[EventWriter]:
        writers = super().build_writers()
        is_plain = [type(writer) is CommonMetricPrinter for writer in writers]
        pairs = zip(writers, is_plain, strict=True)
        writers = [EpochPrinter(self.max_iter) if plain else writer for writer, plain in pairs]
        return [*writers, *(TrackerWriter(name, self.cfg) for name in self.cfg.LOGGERS)]

    def _test_and_keep(self) -> Results:
        results = self.test(self.cfg, self.model)
        if self._average:
            logger.info("Evaluating the average of the weights (SOLVER.EMA) ...")
            results = _merge(results, self._test_as(EMA_SUFFIX, self.cfg, self._average.model))
        self._last_eval_results = results
        return results

    def _test_with_tta_and_keep(self) -> Results:
        results = self.test_with_tta(self.cfg, self.model)
        self._last_eval_results = _merge(self._last_eval_results, results)
        return results

    def _interruptible(self, evaluate: Callable[[], Results]) -> Callable[[], Results]:
        """Return an evaluation that a signal ends at once."""

        def run() -> Results:
            self.gather_rank_states()
            self._share_buffers()
            signal = self._request.signal
            try:
                with exit_on_signal(), run_eagerly(self.cfg):
                    if signal is None:
                        return evaluate()
            except Interrupted as interrupted:
                signal = interrupted.signal
                clear_frames(interrupted.__traceback__)  # which hold the data loader's workers
            self._checkpointing.end_evaluation(signal)

        return run

    def _share_buffers(self) -> None:
        """Give all processes the statistics of norms of the first one, which are what is saved:
        processes evaluate one network then."""
        if comm.get_world_size() > 1:
            for model in (self.model, *([self._average.model] if self._average else [])):
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in ``OUTPUT_DIR``, or start from ``MODEL.WEIGHTS``.

        Args:
            resume: do the former, if there is such a checkpoint.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file does not fit the network.
        """
        super().resume_or_load(resume=resume)
        report_loaded(self.checkpointer, self.cfg, resume=resume)
        if difference := find_difference(self.cfg, self.cfg.DATASETS.TRAIN, self.checkpointer):
            logger.warning("%s The training goes on from what they learned of those.", difference)
        if resume and self.checkpointer.has_checkpoint():
            logger.info(
                "%d of %d iterations are done%s.",
                self.start_iter,
                self.max_iter,
                "" if self.start_iter < self.max_iter else ": nothing is left to train",
            )

    def train(self) -> Results:
        """
        Returns:
            the results of the last evaluation, as :meth:`test` gives them.

        Raises:
            TrainingDivergedError: a loss is NaN or infinite; the message names likely causes.
            FileNotWrittenError: the disk is full, say.
            Interrupted: a signal asked for it, and a checkpoint is saved.
        """
        if isinstance(self._trainer.data_loader, TrainingStream):
            self._trainer.data_loader.place = self._place
        elif self.start_iter > 0:
            logger.warning("The training data start anew: their loader is no TrainingStream.")
        # torch compiles a scripted loss function after some calls, which changes its last bit. On a
        # CPU a resumed training would differ.
        compiled = torch.device(self.cfg.MODEL.DEVICE).type != "cpu"
        try:
            with self._request.listen(), torch.jit.optimized_execution(compiled):
                TrainerBase.train(self, self.start_iter, self.max_iter)
        except EndOfTraining as end:
            clear_frames(end.__traceback__)  # which hold the data loader's workers
        finally:
            self._end_workers()
        return self._last_eval_results

    def _end_workers(self) -> None:
        """End the worker processes of the data loader.

        Otherwise the traceback of an error, which holds their iterator, keeps them and this process
        alive.
        """
        iterator = self._trainer._data_loader_iter_obj
        self._trainer._data_loader_iter_obj = None
        # torch's iterator over several workers has this method, and no public one.
        if (end := getattr(iterator, "_shutdown_workers", None)) is not None:
            end()

    def run_step(self) -> None:
        seed_all(step_seed(self._place.seed, self.iter, comm.get_rank()))
        self._statistics.keep()
        try:
            with explain_compilation(self.cfg):
                super().run_step()
        except NonFiniteLossError as error:
            self._statistics.restore()  # which are not finite now
            images = comm.gather(self._image_names())
            record = self._record_nonfinite(error, images)
            if self._skipped_steps >= self.cfg.SOLVER.MAX_SKIPPED_STEPS:
                raise TrainingDivergedError(
                    self._explain_nonfinite(error, images, record)
                ) from error
            self._skipped_steps += 1
            logger.warning(
                "Iteration %d is skipped, number %d of the %d that SOLVER.MAX_SKIPPED_STEPS "
                "allows: %s The record is in %s.",
                *(self.iter, self._skipped_steps, self.cfg.SOLVER.MAX_SKIPPED_STEPS, error, record),
            )

    @property
    def stop_signal(self) -> str | None:
        return self._trainer.stop_signal

    @property
    def seed(self) -> int:
        """Return the seed of all random numbers: ``SEED``, or a random seed if that is -1."""
        return self._place.seed

    def count_epochs(self, iterations: int) -> float | None:
        """Return the number of epochs after a number of iterations; None if the loader does not
        tell the number of images."""
        loader = self._trainer.data_loader
        if not isinstance(loader, TrainingStream):
            return None
        place = self._place
        seen = place.num_samples + (iterations - self.start_iter) * place.batch_size
        return seen / len(loader.dataset)  # type: ignore[arg-type]

    def describe_length(self) -> str:
        """Return how many iterations and epochs the training has had, at its end."""
        done, planned = self.max_iter, self.cfg.SOLVER.MAX_ITER
        told = f"{done} iterations" if done >= planned else f"{done} of {planned} iterations"
        epochs = self.count_epochs(done)
        return told if epochs is None else f"{told}, {epochs:.4g} epochs"

    # What a checkpoint holds beyond Detectron2's

    def gather_rank_states(self) -> None:
        """Gather the state that differs between processes, before one of them saves. All processes
        call this.
        """
        self._rank_states = comm.gather(read_loss_normalizers(self.checkpointer.model))

    def state_dict(self) -> dict[str, Any]:
        done = self.iter + 1 - self.start_iter
        state = super().state_dict()
        state["stream"] = asdict(replace(self._place, batches=self._place.batches + done))
        state["ranks"] = self._rank_states
        state["skipped_steps"] = self._skipped_steps
        state["seconds"] = self.earlier_seconds + time.perf_counter() - self._began
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        base_rates = self.scheduler.base_lrs
        super().load_state_dict(state_dict)
        self.earlier_seconds = state_dict.get("seconds", 0.0)
        if "stream" not in state_dict:
            logger.warning("The checkpoint is of another trainer: the training data start anew.")
            return
        saved = Place(**state_dict["stream"])
        if self.cfg.SEED >= 0:
            saved = replace(saved, seed=self.cfg.SEED)
        batch_size, processes = self._place.batch_size, self._place.num_processes
        self._place = saved.shared_by(processes, batch_size=batch_size)
        self._skipped_steps = state_dict["skipped_steps"]
        write_loss_normalizers(self.checkpointer.model, state_dict["ranks"])
        if self._place is not saved:
            self._say_that_the_batch_is_another(saved)
        if batch_size != saved.batch_size:
            # Iterations are counted in batches of this run, and its learning rates apply.
            self.iter = saved.num_samples // batch_size - 1
            self.scheduler.last_epoch = self.iter + 1
            self.scheduler.base_lrs = base_rates
            groups = self.optimizer.param_groups
            for group, rate in zip(groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = rate

    def _say_that_the_batch_is_another(self, saved: Place) -> None:
        place = self._place
        logger.warning(
            "Batches of %d in %d processes instead of %d in %d: the training goes on after the %d "
            "images seen, from iteration %d of this run's, not exactly as it would have.",
            *(place.batch_size, place.num_processes, saved.batch_size, saved.num_processes),
            *(saved.num_samples, saved.num_samples // place.batch_size),
        )

    # Losses that are not finite

    def _record_nonfinite(self, error: NonFiniteLossError, images: list[list[str]]) -> str:
        """Write down what is known of this step, and return the file's path."""
        if not comm.is_main_process():
            return ""
        rate = self.optimizer.param_groups[0]["lr"]
        facts = {"losses": error.losses, "images": images, "rate": rate, "seed": self.seed}
        return write_record(self.cfg.OUTPUT_DIR, self.iter, **facts)

    def _image_names(self) -> list[str]:
        """Return the names of the images of this step in this process."""
        loader = self._trainer.data_loader
        if not isinstance(loader, TrainingStream):
            return []
        place = replace(self._place, batches=self._place.batches + self.iter - self.start_iter)
        return [loader.name(index) for _, index in next(loader.batches(place))]

    def _explain_nonfinite(
        self, error: NonFiniteLossError, images: list[list[str]], record: str
    ) -> str:
        self.gather_rank_states()
        if not comm.is_main_process():
            return f"Training diverged at iteration {self.iter}. {error}"
        iteration = self.iter
        state = f"nonfinite_{iteration:07d}"
        # The iteration that the parameters, the optimizer and the schedule belong to:
        self.iter = self._trainer.iter = iteration - 1
        self.checkpointer.write(state, iteration=self.iter)
        self.iter = self._trainer.iter = iteration
        rate = self.optimizer.param_groups[0]["lr"]
        before = {k: round(v, 4) for k, (v, _) in self.storage.latest().items() if "loss" in k}
        return (
            f"Training diverged at iteration {iteration}. {error}\n"
            f"Losses of each process: {error.losses}; learning rate: {rate:.3g}.\n"
            f"Images of each process: {images}.\n"
            f"Losses of the iteration before: {before or 'there was none'}.\n"
            f"{explain(self.cfg, rate=rate)}\n"
            f"All this is in {record}, and the state before the step in {state}.pth: with this "
            "name in the file last_checkpoint, --resume makes the step again.\n"
            f"Last checkpoint: {self.checkpointer.get_checkpoint_file() or 'none was saved'}."
        )

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """
        Returns:
            the config for the batch of ``num_workers`` processes, where
            ``SOLVER.REFERENCE_WORLD_SIZE`` says for how many it was written.

        Raises:
            ValueError: the batch of the config is not for so many.
        """
        batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference < 0 or (reference and batch % reference):
            raise UserValueError(
                f"SOLVER.REFERENCE_WORLD_SIZE is {reference}: it must divide SOLVER.IMS_PER_BATCH, "
                f"which is {batch}, or be 0 for no scaling."
            )
        return DefaultTrainer.auto_scale_workers(cfg, num_workers)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return to_memory_format(predict_in_float32(super().build_model(cfg), cfg), cfg)

    @classmethod
    def add_teacher(cls, cfg: CfgNode, model: nn.Module, *, allow_pickle: bool) -> None:
        """Attach the teacher that ``DISTILLATION`` names to ``model``, if there is one."""
        if cfg.DISTILLATION.TEACHER:
            add_teacher(model, cfg, allow_pickle=allow_pickle)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """Build the stream of training samples.

        To use another mapper, override this method and call :func:`build_detection_stream` with it.
        The training can then still be resumed exactly.
        """
        mapper = ReadableOnly(
            build_mapper(cfg, is_train=True),
            roots=image_roots(cfg.DATASETS.TRAIN),
            max_skipped=cfg.DATALOADER.MAX_UNREADABLE,
        )
        with explain_loading():
            stream = build_detection_stream(cfg, mapper=mapper)
        check_stream(cfg, stream)
        if cfg.INPUT.COPY_PASTE:
            stream.mapper = CopyPaste(mapper, stream.dataset, cfg.INPUT.COPY_PASTE)
        return stream

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        mapper = build_mapper(cfg, is_train=False)
        if cfg.TEST.TILES:  # which are cut from an image as it is
            mapper = Mapper(cfg, False, augmentations=[])
        readable = ReadableOnly(mapper, roots=image_roots([dataset_name]))
        loader = build_detection_test_loader(cfg, dataset_name, mapper=readable)
        return attend_to_workers(loader)

    @classmethod
    def main_metric(cls, cfg: CfgNode) -> str | None:
        """See :func:`vovnet_d2.engine.evaluation.main_metric`."""
        return main_metric(cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, *, suffix: str = ""
    ) -> DatasetEvaluator:
        """See :func:`vovnet_d2.engine.evaluation.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, suffix=suffix)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> Results:
        """
        Returns:
            on the main process, ``{task: {metric: value}}``, or this for each data set by name
            where ``DATASETS.TEST`` has several.
        """
        if cfg.TEST.TILES:
            tiles, overlap = cfg.TEST.TILES, cfg.TEST.TILE_OVERLAP
            resize = T.AugmentationList(build_augmentations(cfg, is_train=False))
            model = TiledDetector(model, tiles, overlap, resize=resize)
        with autocast(cfg, enabled=cfg.TEST.AMP.ENABLED):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> Results:
        """Evaluate as :meth:`test` does, with the augmentation of ``TEST.AUG``.

        The names of the tasks end with ``_TTA``.
        """
        logger.info("Evaluating with test-time augmentation ...")
        aug = cfg.TEST.AUG
        mapper = AugmentedTestMapper(aug.MIN_SIZES, aug.MAX_SIZE, flip=aug.FLIP)
        return cls._test_as("_TTA", cfg, GeneralizedRCNNWithTTA(cfg, model, mapper))

    @classmethod
    def _test_as(cls, suffix: str, cfg: CfgNode, model: nn.Module) -> Results:
        """Evaluate as :meth:`test` does; the names of tasks and folders end with ``suffix``."""
        evaluators = [cls.build_evaluator(cfg, name, suffix=suffix) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, model, evaluators)
        if len(cfg.DATASETS.TEST) == 1:
            return _rename(results, suffix)
        return {name: _rename(tasks, suffix) for name, tasks in results.items()}

    @classmethod
    def test_all(cls, cfg: CfgNode, model: nn.Module) -> Results:
        """Evaluate by :meth:`test`, and by :meth:`test_with_tta` if ``TEST.AUG`` asks for it."""
        results = cls.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results = _merge(results, cls.test_with_tta(cfg, model))
        return results


def _rename(tasks: Results, suffix: str) -> Results:
    return {f"{task}{suffix}": metrics for task, metrics in tasks.items()}


def _merge(results: Results, more: Results) -> Results:
    """Merge the tasks of two results, with one data set or several."""
    common = {key: results[key] | more[key] for key in results.keys() & more.keys()}
    return {**results, **more, **common}
