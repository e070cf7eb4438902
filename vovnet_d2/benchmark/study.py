# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A study measures the paper's six figures of networks: work, speed, parameters, memory, energy and
computation efficiency. Every network is measured under every treatment, for each mode, image size
and batch."""

import copy
import gc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..analysis import Complexity, analyze
from ..backends import BACKENDS
from ..engine.memory_format import prefers_channels_last
from ..errors import UserValueError
from ..modeling.allocation import keep_freed_memory
from ..timing import describe_environment, interleaved_rounds, package_version, ratios
from . import deployment
from .energy import EnergyMeter, NoEnergyMeter, find_meter, joules_per_call
from .exports import Exports, is_evaluated
from .limits import available_cores
from .memory import allocated, peak_memory
from .networks import Network, calibrate_norms
from .treatments import TREATMENTS, Treatment, compiled_or_failed
from .workload import (
    count_multiply_adds,
    detector_inputs,
    inference,
    network_inputs,
    random_images,
    training_step,
)

MODES = ("inference", "training")
OWN_SIZE = "own size"  # each network has its own image size
_ENERGY_BLOCKS = 3
_LEAST_ENERGY_SECONDS = 0.3


@dataclass(frozen=True)
class Plan:
    """Describes what a benchmark measures, and how.

    Attributes:
        networks: the networks, which have different names.
        treatments: names of :data:`TREATMENTS`.
        modes: names of :data:`MODES`.
        sizes: (height, width) of the images, in pixels; None is the own size of each network.
        warmup: calls of each case before it is timed.
        repeats: rounds of all cases.
        references: the network that the times of each network are compared with; the first network
            if a name is missing here.
        reference_treatment: the treatment that a network's times are compared with; None is the
            first.
        accuracy: the accuracy of each network, which was measured elsewhere.
        energy_seconds: the least seconds of each energy measurement; 0 disables it.
        deployment: also measure the columns of :data:`.deployment.COLUMNS`, in inference.
    """

    networks: Sequence[Network]
    treatments: Sequence[str] = ("plain", "optimized")
    modes: Sequence[str] = ("inference",)
    batches: Sequence[int] = (1,)
    sizes: Sequence[tuple[int, int] | None] = ((480, 640),)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    warmup: int = 3
    repeats: int = 20
    references: Mapping[str, str] = field(default_factory=dict)
    reference_treatment: str | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    energy_seconds: float = 2.0
    deployment: bool = False

    def __post_init__(self) -> None:
        names = [network.name for network in self.networks]
        if len(set(names)) < len(names):
            raise UserValueError(f"A network is named twice: {', '.join(names)}.")
        _require([*self.references, *self.references.values()], names, "reference network")
        _require(self.accuracy, names, "network with an accuracy")
        if self.reference_treatment is not None:
            _require([self.reference_treatment], self.treatments, "reference treatment")
        sizes = [size for size in self.sizes if size is not None]
        without_size = [network.name for network in self.networks if network.size is None]
        if len(sizes) < len(self.sizes) and without_size:
            raise UserValueError(
                f"{', '.join(without_size)} has no size of its own: give --sizes HEIGHTxWIDTH."
            )
        if self.energy_seconds != 0 and not self.energy_seconds >= _LEAST_ENERGY_SECONDS:
            raise UserValueError(
                f"The seconds for energy are {self.energy_seconds:g}: give "
                f"{_LEAST_ENERGY_SECONDS:g} or more, as meters count in steps, or 0 for none."
            )

    def reference_of(self, network: str) -> str:
        return self.references.get(network, self.networks[0].name)


def _require(names: Any, choices: Any, what: str) -> None:
    for name in names:
        if name not in choices:
            raise UserValueError(f"No {what} {name!r}: there are {', '.join(choices)}.")


@dataclass(frozen=True)
class _Cell:
    """The mode, image size and batch that are the same for all cases that are compared."""

    mode: str
    size: tuple[int, int] | None
    batch: int

    def size_for(self, network: Network) -> tuple[int, int]:
        size = self.size or network.size
        assert size is not None, "a plan would not have it"
        return size

    @property
    def size_name(self) -> str:
        return _times(self.size) if self.size else OWN_SIZE


@dataclass
class _Case:
    """Holds a network with a treatment, and one call of it to be timed.

    Attributes:
        call: one inference or one step, until one fails.
        peak_memory: the bytes that torch holds at most; None if torch does not know them.
        multiply_adds: the multiply-adds for one image, in the mode of the case.
        deployed: the columns of :data:`.deployment.COLUMNS` that are known.
        error: the message of a call that failed.
    """

    network: Network
    treatment: Treatment
    call: Callable[[], object]
    peak_memory: int | None
    complexity: Complexity
    multiply_adds: float
    deployed: dict[str, float | None]
    error: str = ""

    @property
    def name(self) -> str:
        return _case_name(self.network.name, self.treatment.name)

    def run(self) -> None:
        """Call the function. A failure ends this case, and not the other cases."""
        try:
            self.call()
            return
        except Exception as error:
            self.error = f"{_reason(error)} (while timed beside the others)"
        self.call = lambda: None
        _free_memory()


def _case_name(network: str, treatment: str) -> str:
    return f"{network} {treatment}"


class Study:
    """Measures a plan.

    Attributes:
        rows: a row for each network, treatment, mode, size and batch that was measured. The row of
            a case that cannot run has the reason under ``"error"``, and no numbers.
        interruption: the cause that ended :meth:`run` early: Ctrl-C, another signal, or an error
            outside the cases.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.rows: list[dict[str, Any]] = []
        self.interruption: BaseException | None = None
        self._models: dict[str, nn.Module] = {}
        self._complexities: dict[tuple[str, tuple[int, int]], Complexity] = {}
        self._ap: dict[str, dict[str, float | None]] = {}
        self._folder = Path()

    @cached_property
    def meter(self) -> EnergyMeter | NoEnergyMeter:
        if self.plan.energy_seconds == 0:
            return NoEnergyMeter("it was given no time")
        try:
            return find_meter(self.plan.device)
        except NoEnergyMeter as reason:
            return reason

    @property
    def protocol(self) -> dict[str, str]:
        """Describe the hardware, the versions, the command and the protocol of all rows."""
        if self.interruption is None:
            return self._protocol
        rounds = max((row["rounds"] or 0 for row in self.rows), default=0)
        note = f"these are the results up to then, of {rounds} rounds or fewer (see the CSV file)"
        return self._protocol | {"interrupted": note}

    @cached_property
    def _protocol(self) -> dict[str, str]:
        plan, meter = self.plan, self.meter
        energy = (
            f"not available, because {meter}"
            if isinstance(meter, NoEnergyMeter)
            else f"{meter.source}; idle power included; median of {_ENERGY_BLOCKS} blocks of at "
            f"least {plan.energy_seconds:g} s in all"
        )
        described = describe_environment(plan.device)
        described.pop("float32 convolutions", None)  # each treatment sets it, see the rows
        if plan.device.type == "cpu":
            described["freed memory"] = (
                "kept by the process" if keep_freed_memory() else "left to the C library"
            )
            if plan.deployment:
                described["img/s, all cores"] = f"{len(available_cores())} processes"
        return described | {
            "warm-up": f"{plan.warmup} calls",
            "repeats": f"{plan.repeats} rounds of all cases, in random order",
            "energy": energy,
            **self._versions_of_backends(),
        }

    def _versions_of_backends(self) -> dict[str, str]:
        names = {treatment.backend for treatment in self.treatments()} - {""}
        modules = sorted({BACKENDS[name].packages[0] for name in names})
        return {module: package_version(module) for module in modules}

    def treatments(self) -> list[Treatment]:
        return [TREATMENTS[name] for name in self.plan.treatments]

    def run(self, save: Callable[[], object] = lambda: None) -> None:
        """Measure everything. If something ends this early, keep the rows that are measured.
        ``save`` is called after each mode, batch and size. If it fails, measuring goes on."""
        plan = self.plan
        assert self._protocol, "taken beforehand: the checkout may be another one afterwards"
        cells = [_Cell(*values) for values in product(plan.modes, plan.sizes, plan.batches)]
        cases = len(plan.networks) * len(plan.treatments)
        if plan.device.type == "cpu":
            keep_freed_memory()
        try:
            with (
                compiled_or_failed(len(cells) * cases),
                tempfile.TemporaryDirectory() as folder,
                tqdm(total=len(cells) * (cases + plan.repeats), unit="step") as bar,
            ):
                self._folder = Path(folder)
                for cell in cells:
                    self._measure(cell, bar)
                    try:
                        save()
                    except OSError as error:
                        bar.write(f"Not saved yet: {error}", file=sys.stderr)
        except BaseException as interruption:  # a signal may raise SystemExit
            self.interruption = interruption

    def _measure(self, cell: _Cell, bar: tqdm) -> None:
        _free_memory()  # memory of the cell before
        bar.set_description(f"{cell.mode}, batch {cell.batch}, {cell.size_name}")
        cases: list[_Case] = []
        for network, treatment in product(self.plan.networks, self.treatments()):
            bar.set_postfix_str(_case_name(network.name, treatment.name))
            reason = ""
            try:
                cases.append(self._prepare(cell, network, treatment))
            except Exception as error:  # networks of others may raise any error
                reason = _reason(error)
            if reason:  # the frames of the error, which held memory, are gone now
                self.rows.append(self._row(cell, network, treatment, error=reason))
                _free_memory()
            bar.update()
        bar.set_postfix_str("")
        if cases:
            self._time(cell, cases, bar)
        else:
            bar.update(self.plan.repeats)

    def _time(self, cell: _Cell, cases: Sequence[_Case], bar: tqdm) -> None:
        calls: dict[str, Callable[[], object]] = {case.name: case.run for case in cases}
        rounds: list[dict[str, float]] = []
        joules: dict[str, float] = {}
        try:
            for times in interleaved_rounds(
                calls, device=self.plan.device, repeats=self.plan.repeats
            ):
                rounds.append(times)
                bar.update()
            joules = self._joules(cases)
        finally:
            failed = {case.name for case in cases if case.error}
            series = {name: [one[name] for one in rounds] for name in calls.keys() - failed}
            for case in cases:
                if case.error:
                    self.rows.append(
                        self._row(cell, case.network, case.treatment, error=case.error)
                    )
                elif rounds:
                    self.rows.append(self._measured_row(cell, case, series, joules))

    def _prepare(self, cell: _Cell, network: Network, treatment: Treatment) -> _Case:
        """Make a case and warm it up."""
        device, training = self.plan.device, cell.mode == "training"
        if reason := treatment.refusal(device, training=training):
            raise UserValueError(reason)
        before = allocated(device)
        images = random_images(cell.batch, cell.size_for(network), device)
        model, last, program = self._treat(network, treatment, images, training=training)
        inputs = network_inputs(model, images, is_detector=network.is_detector, last=last)
        make = training_step if training else inference
        call = make(model, inputs, treatment, device)
        for _ in range(self.plan.warmup):
            call()
        case = _Case(
            network,
            treatment,
            call,
            None if program else peak_memory(call, device, before=before),
            self._complexity(network, cell.size_for(network)),
            self._multiply_adds(network, cell),
            {},
        )
        if self.plan.deployment and not training:
            case.deployed = self._deployed(case, model, inputs, program, cell.batch)
        return case

    def _treat(
        self, network: Network, treatment: Treatment, images: Tensor, *, training: bool
    ) -> tuple[nn.Module, bool, Path | None]:
        """Return a copy of a network under a treatment, whether it takes images in channels-last,
        and the file that its backend has loaded."""
        original, device = self._model(network), self.plan.device
        if treatment.backend:
            exports = Exports(self._folder)
            model, program = exports.use_backend(network, original, treatment, images)
            return model, False, program
        if not training:
            return treatment.for_inference(original).to(device), not treatment.plain, None
        last = network.channels_last
        if last is None:
            last = prefers_channels_last(device)
        model = treatment.for_training(original, channels_last=last)
        return model.to(device), last and not treatment.plain, None

    def _deployed(
        self, case: _Case, model: nn.Module, inputs: Any, program: Path | None, batch: int
    ) -> dict[str, float | None]:
        name, treatment, device = case.name, case.treatment, self.plan.device
        found: dict[str, float | None] = {"file_mb": deployment.file_bytes(model, program) / 1e6}
        if device.type == "cpu":
            served = deployment.Served(self._folder / "network.pt", treatment, program)
            found |= deployment.measure_processes(name, model, inputs, served, batch=batch)
        if is_evaluated(case.network):
            if name not in self._ap:  # it is the same at each size and batch
                self._ap[name] = deployment.measure_ap(case.network, model, treatment, device)
            found |= self._ap[name]
        return found

    def _model(self, network: Network) -> nn.Module:
        """Return the network on the CPU. It is never changed."""
        if network.name not in self._models:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = network.build()
                if network.load:
                    network.load(model)
                else:
                    calibrate_norms(model, torch.randn(2, 3, *(network.size or (224, 224))))
            self._models[network.name] = model
        return self._models[network.name]

    def _complexity(self, network: Network, size: tuple[int, int]) -> Complexity:
        if (network.name, size) not in self._complexities:
            with torch.device("meta"):
                model = network.build()
            self._complexities[network.name, size] = analyze(model, size)
        return self._complexities[network.name, size]

    def _joules(self, cases: Sequence[_Case]) -> dict[str, float]:
        """Return the energy of one call of each case, or an empty dict without a meter."""
        meter = self.meter
        if isinstance(meter, NoEnergyMeter):
            return {}
        seconds = self.plan.energy_seconds / _ENERGY_BLOCKS
        blocks: dict[str, list[float]] = {}
        for case in [*cases] * _ENERGY_BLOCKS:
            if not case.error:
                joules = joules_per_call(meter, case.run, device=self.plan.device, seconds=seconds)
                blocks.setdefault(case.name, []).append(joules)
        return {name: float(np.median(joules)) for name, joules in blocks.items()}

    def _multiply_adds(self, network: Network, cell: _Cell) -> float:
        """Return the multiply-adds for one image. In training they are counted in a real step, and
        include the backward pass."""
        if cell.mode == "inference":
            return self._complexity(network, cell.size_for(network)).total.multiply_adds
        cpu, plain = torch.device("cpu"), TREATMENTS["plain"]
        key = network.name, cell.size_for(network)
        if key not in self._training_counts:

            def count(number: int) -> float:
                model = copy.deepcopy(self._model(network)).train()
                images = random_images(number, cell.size_for(network), cpu)
                inputs = detector_inputs(model, images) if network.is_detector else images
                return count_multiply_adds(training_step(model, inputs, plain, cpu)) / number

            try:
                self._training_counts[key] = count(1)
            except ValueError:  # a batch norm cannot train on a map of one pixel
                self._training_counts[key] = count(2)
        return self._training_counts[key]

    @cached_property
    def _training_counts(self) -> dict[Any, float]:
        return {}

    def _measured_row(
        self,
        cell: _Cell,
        case: _Case,
        times: Mapping[str, Sequence[float]],
        joules: Mapping[str, float],
    ) -> dict[str, Any]:
        network, seconds = case.network, np.array(times[case.name])
        latency = float(np.median(seconds))
        per_call = joules.get(case.name)
        reference = _case_name(self.plan.reference_of(network.name), case.treatment.name)
        own = _case_name(network.name, self.plan.reference_treatment or self.plan.treatments[0])
        return self._row(
            cell,
            network,
            case.treatment,
            gflops=case.multiply_adds / 1e9,
            parameters_m=case.complexity.total.parameters / 1e6,
            not_counted=" ".join(n for n in case.complexity.notes if "parameters" in n),
            latency_ms=latency * 1e3,
            latency_p95_ms=float(np.percentile(seconds, 95)) * 1e3,
            fps=cell.batch / latency,
            peak_memory_mb=None if case.peak_memory is None else case.peak_memory / 1e6,
            joules_per_image=None if per_call is None else per_call / cell.batch,
            gflops_per_second=cell.batch * case.multiply_adds / latency / 1e9,
            rounds=len(seconds),
            **case.deployed,
            **_compare("network", self.plan.reference_of(network.name), seconds, times, reference),
            **_compare("treatment", own.removeprefix(network.name + " "), seconds, times, own),
        )

    def _row(
        self, cell: _Cell, network: Network, treatment: Treatment, **measured: Any
    ) -> dict[str, Any]:
        accuracy = self.plan.accuracy.get(network.name)
        more = deployment.COLUMNS if self.plan.deployment else ()
        row = dict.fromkeys((*_COLUMNS, *more)) | {
            "network": network.name,
            "kind": "detector" if network.is_detector else "backbone",
            "treatment": treatment.name,
            "mode": cell.mode,
            "dtype": "int8" if treatment.int8 else str(treatment.dtype).removeprefix("torch."),
            "float32_operands": "TF32" if treatment.tf32 else "float32",
            "batch": cell.batch,
            "compared_at": cell.size_name,
            "image_size": _times(cell.size_for(network)),
            "accuracy": accuracy,
            "error": "",
        }
        assert measured.keys() <= row.keys()
        return row | measured


_COLUMNS = (
    *("network", "kind", "treatment", "mode", "dtype", "float32_operands", "batch"),
    *("compared_at", "image_size", "gflops", "parameters_m", "not_counted"),
    *("latency_ms", "latency_p95_ms", "fps", "rounds", "peak_memory_mb"),
    *("joules_per_image", "gflops_per_second", "accuracy", "error"),
    *("reference_network", "time_of_network", "time_of_network_q1", "time_of_network_q3"),
    *("reference_treatment", "time_of_treatment", "time_of_treatment_q1", "time_of_treatment_q3"),
)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, KeyError):
        first = f"KeyError: {first}"
    return "out of memory" if "can't allocate memory" in first else first


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _compare(
    kind: str,
    reference: str,
    seconds: Any,
    times: Mapping[str, Sequence[float]],
    reference_case: str,
) -> dict[str, Any]:
    """Return the median and the quartiles of the ratios of all rounds, or an empty dict if the
    reference cannot run."""
    if reference_case not in times:
        return {}
    q1, middle, q3 = np.percentile(ratios(seconds, times[reference_case]), (25, 50, 75))
    return {
        f"reference_{kind}": reference,
        f"time_of_{kind}": float(middle),
        f"time_of_{kind}_q1": float(q1),
        f"time_of_{kind}_q3": float(q3),
    }
