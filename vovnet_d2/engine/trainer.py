# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's DefaultTrainer on GPUs and CPUs, in full and mixed precision."""

import logging
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from traceback import clear_frames
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..checkpoint import VoVNetCheckpointer
from ..data.copy_paste import CopyPaste
from ..data.mapper import build_mapper
from ..data.stream import Place, TrainingStream, build_detection_stream, seed_all, step_seed
from ..data.unreadable import ReadableOnly, image_roots
from ..errors import UserValueError
from ..words import counted
from .agreed_steps import build_steps
from .averaging import EMA_SUFFIX, WeightAverage, name_of_average
from .categories import category_names, find_difference
from .compilation import compile_backbone, explain_compilation, run_eagerly
from .data_checks import check_stream
from .dense import read_loss_normalizers, write_loss_normalizers
from .distillation import add_teacher
from .evaluating_trainer import EvaluatingTrainer, Results, merge_results
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
from .in_features import build_explained
from .initial_weights import report_loaded
from .interruption import Interrupted, StopRequest, exit_on_signal
from .loggers import TrackerWriter
from .memory_format import to_memory_format
from .nonfinite import (
    KeptStatistics,
    NonFiniteLossError,
    NonFiniteStep,
    TrainingDivergedError,
    image_names,
)
from .precision import predict_in_float32
from .registered_data import explain_loading
from .solver import build_optimizer

logger = logging.getLogger(__name__)


class Trainer(EvaluatingTrainer):
    """A trainer and evaluator of the network that a config describes.

    Unlike :class:`DefaultTrainer`, it evaluates every kind of data set that Detectron2 has an
    evaluator for. It keeps the best weights if ``TEST.EVAL_PERIOD`` is set, and the average of the
    weights if ``SOLVER.EMA`` is set. It runs on CPUs in mixed precision and in several processes,
    too.

    A training may be interrupted at any time. A resumed training has the data, the random numbers
    and so, on a CPU, the parameters that it would have had. All random numbers follow from the
    seed, the iteration and the position of a sample in
    :class:`~vovnet_d2.data.stream.TrainingStream`. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end a
    training after the current step, with a checkpoint, by
    :class:`~vovnet_d2.engine.interruption.Interrupted`.

    Attributes:
        stop_signal: the name of a signal that one of the processes got before the latest step;
            None if there was no signal.
        earlier_seconds: wall time of the training before it was resumed, up to the checkpoint.
    """

    _average: WeightAverage | None = None

    def __init__(self, cfg: CfgNode, *, allow_partial: bool = False, allow_pickle: bool = False):
        """Build the parts of a training. For the two flags see :class:`VoVNetCheckpointer`."""
        # DefaultTrainer's constructor is not called, because it builds other parts.
        TrainerBase.__init__(self)
        _set_up_loggers(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg

        # The parts of the training, in the order in which Detectron2 builds them.
        model = self.build_model(cfg)
        self.add_teacher(cfg, model, allow_pickle=allow_pickle)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = _compile_and_distribute(cfg, model)
        self._request = StopRequest()
        self._trainer = build_steps(cfg, model, data_loader, optimizer, request=self._request)
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
        self._statistics = KeptStatistics(model)
        if cfg.SOLVER.EMA:
            self._average = WeightAverage(self.checkpointer.model, cfg.SOLVER.EMA)
        self._checkpointing = self._build_checkpointing()

        # How far the training is. A checkpoint replaces these values.
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        batch_size, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
        self._place = Place(seed, 0, 0, batch_size, processes)  # at start_iter
        self.earlier_seconds = 0.0
        self._began = time.perf_counter()
        self._skipped_steps = 0
        self._rank_states: list[dict[str, float]] = []
        self._last_eval_results: Results = {}

        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Return Detectron2's hooks in Detectron2's order, with those of this package among them.

        The hooks that keep the best weights come after the evaluation and before the writers. The
        hook that may end the training comes last.
        """
        cfg, period = self.cfg, self.cfg.TEST.EVAL_PERIOD
        found: list[HookBase | None] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if self._average:
            found.append(self._average)
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            found.append(self._build_precise_bn())
        found.append(self._checkpointing)
        evaluate, metric = self._interruptible(self._test_and_keep), self.main_metric(cfg)
        found.append(EvalHook(period, evaluate, metric, cfg.OUTPUT_DIR))
        if cfg.TEST.AUG.ENABLED:
            found.append(hooks.EvalHook(0, self._interruptible(self._test_with_tta_and_keep)))
        judged = self._find_judged(metric)
        if comm.is_main_process():
            for model, name, file in judged:
                best = (period, model, cfg.OUTPUT_DIR, name)
                categories = self.checkpointer.categories
                found.append(BestCheckpointer(*best, file_prefix=file, categories=categories))
            found += [UnreadableCount(), EpochCount()]
            found.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        if judged and (patience := cfg.TEST.PATIENCE) > 0:
            # An average of the weights decides, because its weights are the ones to use.
            _, name, file = judged[-1]
            ending = (self._checkpointing, period, name, patience, cfg.OUTPUT_DIR)
            found.append(EarlyStopping(*ending, best=file))
        return found

    def _build_checkpointing(self) -> Checkpointing:
        folder, averaged = self.cfg.OUTPUT_DIR, None
        if self._average:
            model, categories = self._average.model, self.checkpointer.categories
            averaged = WeightsCheckpointer(model, folder, categories=categories)
        return Checkpointing(self.checkpointer, self.cfg.SOLVER.CHECKPOINT_PERIOD, averaged)

    def _build_precise_bn(self) -> PreciseBN:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        node = cfg.TEST.PRECISE_BN
        data_loader = self.build_train_loader(cfg)
        return PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, data_loader, node.NUM_ITER)

    def _find_judged(self, metric: str | None) -> list[tuple[nn.Module, str, str]]:
        """Return the networks whose best weights are kept, each with its metric and the name of its
        file. An average of the weights comes last.
        """
        if not metric or self.cfg.TEST.EVAL_PERIOD <= 0:
            return []
        judged = [(self.model, metric, "model_best")]
        if self._average:
            judged.append((self._average.model, name_of_average(metric), "model_best_ema"))
        return judged

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
            averaged = self.test_as(EMA_SUFFIX, self.cfg, self._average.model)
            results = merge_results(results, averaged)
        self._last_eval_results = results
        return results

    def _test_with_tta_and_keep(self) -> Results:
        results = self.test_with_tta(self.cfg, self.model)
        self._last_eval_results = merge_results(self._last_eval_results, results)
        return results

    def _interruptible(self, evaluate: Callable[[], Results]) -> Callable[[], Results]:
        """Return a function that evaluates in all processes. A signal ends the evaluation at once,
        with a checkpoint.
        """

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
                clear_frames(interrupted.__traceback__)  # they hold the data loader's workers
            self._checkpointing.end_evaluation(signal)

        return run

    def _share_buffers(self) -> None:
        """Give all processes the statistics of norms of the first process, which saves them. So all
        processes evaluate the same network.
        """
        if comm.get_world_size() > 1:
            for model in (self.model, *([self._average.model] if self._average else [])):
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def resume_or_load(self, resume: bool = True) -> None:
        """With ``resume``, resume from the last checkpoint in ``OUTPUT_DIR``, if there is one.
        Otherwise start from ``MODEL.WEIGHTS``.

        Raises:
            FileNotFoundError: the file of ``MODEL.WEIGHTS`` is missing.
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
        """Train to the end.

        Returns:
            the results of the last evaluation, as :meth:`test` gives them.

        Raises:
            TrainingDivergedError: a loss is NaN or infinite; the message names likely causes.
            FileNotWrittenError: a file cannot be written, for example because the disk is full.
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
            clear_frames(end.__traceback__)  # they hold the data loader's workers
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
        """Make a step. A step whose loss is not finite is skipped, up to
        ``SOLVER.MAX_SKIPPED_STEPS`` times. Then TrainingDivergedError is raised."""
        seed_all(step_seed(self._place.seed, self.iter, comm.get_rank()))
        self._statistics.keep()
        try:
            with explain_compilation(self.cfg):
                super().run_step()
        except NonFiniteLossError as error:
            self._statistics.restore()  # this step may have made them NaN
            self._skip_step(error)

    def _skip_step(self, error: NonFiniteLossError) -> None:
        """Record a step whose loss is not finite, and count it as skipped. Raise
        TrainingDivergedError if too many steps were skipped before."""
        loader = self._trainer.data_loader
        images = comm.gather(image_names(loader, self._find_place(self.iter)))
        rate = self.optimizer.param_groups[0]["lr"]
        step = NonFiniteStep(self.iter, error.losses, images, rate, self.seed)
        record = step.write(self.cfg.OUTPUT_DIR) if comm.is_main_process() else ""
        if self._skipped_steps >= self.cfg.SOLVER.MAX_SKIPPED_STEPS:
            self._end_at(step, record, error)
        self._skipped_steps += 1
        logger.warning(
            "Iteration %d is skipped, number %d of the %d that SOLVER.MAX_SKIPPED_STEPS "
            "allows: %s The record is in %s.",
            *(self.iter, self._skipped_steps, self.cfg.SOLVER.MAX_SKIPPED_STEPS, error, record),
        )

    def _end_at(self, step: NonFiniteStep, record: str, error: NonFiniteLossError) -> NoReturn:
        """Save the state before a step whose loss is not finite, and end the training."""
        self.gather_rank_states()
        message = f"Training diverged at iteration {step.iteration}. {error}"
        if comm.is_main_process():
            # The iteration that the parameters, the optimizer and the schedule belong to:
            self.iter = self._trainer.iter = step.iteration - 1
            self.checkpointer.write(step.name, iteration=self.iter)
            self.iter = self._trainer.iter = step.iteration
            latest = self.storage.latest().items()
            before = {name: round(value, 4) for name, (value, _) in latest if "loss" in name}
            checkpoint = self.checkpointer.get_checkpoint_file()
            explained = step.explain(self.cfg, before=before, record=record, checkpoint=checkpoint)
            message = f"{message}\n{explained}"
        raise TrainingDivergedError(message) from error

    # How far the training is

    @property
    def stop_signal(self) -> str | None:
        return self._trainer.stop_signal

    @property
    def seed(self) -> int:
        """Return the seed of all random numbers: ``SEED``, or a random seed if that is -1."""
        return self._place.seed

    def count_epochs(self, iterations: int) -> float | None:
        """Return the number of epochs after a number of iterations. Return None if the number of
        images is not known.
        """
        loader = self._trainer.data_loader
        if not isinstance(loader, TrainingStream):
            return None
        seen = self._find_place(iterations).num_samples
        return seen / len(loader.dataset)  # type: ignore[arg-type]

    def describe_length(self) -> str:
        """Return how many iterations and epochs the training has had, at its end."""
        done, planned = self.max_iter, self.cfg.SOLVER.MAX_ITER
        told = counted(done, "iterations")
        if done < planned:
            told = f"{done:,} of {planned:,} iterations"
        epochs = self.count_epochs(done)
        return told if epochs is None else f"{told}, {epochs:.4g} epochs"

    def _find_place(self, iterations: int) -> Place:
        """Return the place in the stream of samples after a number of iterations."""
        batches = self._place.batches + iterations - self.start_iter
        return replace(self._place, batches=batches)

    # The following state is in our checkpoints and not in those of Detectron2.

    def gather_rank_states(self) -> None:
        """Gather the states that differ between processes. All processes call this method before
        one of them saves.
        """
        self._rank_states = comm.gather(read_loss_normalizers(self.checkpointer.model))

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["stream"] = asdict(self._find_place(self.iter + 1))
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
            logger.warning(
                "Batches of %d in %d processes instead of %d in %d: the training goes on after the "
                "%d images seen, from iteration %d of this run's, not exactly as it would have.",
                *(batch_size, processes, saved.batch_size, saved.num_processes),
                *(saved.num_samples, saved.num_samples // batch_size),
            )
        if batch_size != saved.batch_size:
            self._count_in_batches_of_this_run(saved.num_samples, base_rates)

    def _count_in_batches_of_this_run(self, num_samples: int, base_rates: list[float]) -> None:
        """Set the iteration to the number of samples over the batch of this run, and the learning
        rates to those of this run.
        """
        self.iter = num_samples // self._place.batch_size - 1
        self.scheduler.last_epoch = self.iter + 1
        self.scheduler.base_lrs = base_rates
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = rate

    # The parts of a training, which a subclass may build in another way

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Return the config for the batch of ``num_workers`` processes, if
        ``SOLVER.REFERENCE_WORLD_SIZE`` says for how many processes the config was written. Raise
        ValueError if so many cannot share the batch of the config."""
        batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference < 0 or (reference and batch % reference):
            raise UserValueError(
                f"SOLVER.REFERENCE_WORLD_SIZE is {reference}: it must divide SOLVER.IMS_PER_BATCH, "
                f"which is {batch}, or be 0 for no scaling."
            )
        return DefaultTrainer.auto_scale_workers(cfg, num_workers)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_explained(cfg, super().build_model)
        return to_memory_format(predict_in_float32(model, cfg), cfg)

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


def _set_up_loggers(cfg: CfgNode) -> None:
    """Start the log in ``OUTPUT_DIR``, unless a command line has done so."""
    for name in ("detectron2", "vovnet_d2"):  # default_setup knows the first only
        if not logging.getLogger(name).isEnabledFor(logging.INFO):
            setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)


def _compile_and_distribute(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Compile the backbone of a model if the config asks for it, and let processes share the
    gradients of the model.
    """
    if cfg.SOLVER.COMPILE.ENABLED:
        budget = cfg.SOLVER.COMPILE.MEMORY_BUDGET
        compile_backbone(model, memory_budget=budget, dynamic=not cfg.INPUT.FIXED_SIZE)
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    return create_ddp_model(
        model,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,  # one copy of the gradients instead of two
        device_ids=[comm.get_local_rank()] if on_gpu else None,
    )
