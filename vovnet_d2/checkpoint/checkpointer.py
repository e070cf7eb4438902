# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's checkpointer, for VoVNet's weights in every layout."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.common.checkpoint import (
    get_missing_parameters_message,
    get_unexpected_parameters_message,
)
from torch import nn

from .matching import Match, contradictions, find_vovnets, match_model, misfits
from .metadata import InputConvention, Metadata
from .reading import METADATA_KEY
from .recognition import Description, describe_state_dict, find_prefix
from .sources import read_weights
from .zoo import metadata_of_layout

__all__ = ["VoVNetCheckpointer"]

logger = logging.getLogger(__name__)


class VoVNetCheckpointer(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` that takes VoVNet's weights in any layout, and reports.

    - ``path`` may also be a name of the zoo (``timm://...``) or a .safetensors file.
    - The file's layout and prefix are recognised. If it is another network than the model's, or
      does not have all of it, loading it is an error that names the config lines that fit.
    - Nothing in the file is executed. Nothing is changed if loading fails.
    - A file with a whole detector loads whole. Of a backbone's, or another detector's, what is not
      there is left at its initialisation; not so where a training is resumed.

    A model without a VoVNet is loaded as :class:`DetectionCheckpointer` does, as safely.

    Attributes:
        input_convention: what the weights loaded last expect of their input, or None if that is
            not known; several where it is one of these. See :func:`check_input_convention`.
        missing_outside_backbone: names of the model's tensors outside VoVNet's stem and stages
            (FPN, heads, a classifier) that the weights loaded last left at their initialisation:
            the file lacks them, or has them in another shape. In a model without a VoVNet, of all
            tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        allow_partial: bool = False,
        allow_pickle: bool = False,
        **checkpointables: Any,
    ):
        """
        Args:
            model: see :class:`DetectionCheckpointer`; as are ``save_dir``, ``save_to_disk`` and
                ``checkpointables``.
            allow_partial: load what fits of a file that does not fit the network, with a warning.
            allow_pickle: also read the Python pickles of Detectron2's model zoo (.pkl).
        """
        if not logger.hasHandlers():  # Detectron2's default_setup, say, knows only its own logger
            setup_logger(distributed_rank=comm.get_rank(), name="vovnet_d2")
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.allow_partial = allow_partial
        self.allow_pickle = allow_pickle
        self.input_convention: InputConvention | tuple[InputConvention, ...] | None = None
        self.missing_outside_backbone: list[str] = []

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """
        Args:
            path: a file, a URL or a name of the zoo. If it is empty, nothing is loaded.
            checkpointables: names of the objects to load beside the model; all by default.

        Returns:
            what the file holds beside the model and these objects.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, unsafe, or does not fit; nothing has changed then.
        """
        self.input_convention, self.missing_outside_backbone = None, []
        if not path:
            return super().load(path)
        logger.info("Loading from %s ...", path)
        checkpoint, known = read_weights(path, allow_pickle=self.allow_pickle)
        wanted = self.checkpointables if checkpointables is None else checkpointables
        present = {key: self.checkpointables[key] for key in wanted if key in checkpoint}

        with _unchanged_on_error(self.model, present.values()):
            if find_vovnets(self.model):
                try:
                    self._load_vovnets(checkpoint.pop("model"), known, resuming=bool(present))
                except ValueError as error:
                    raise ValueError(f"{path} was not loaded. {error}") from error
            else:
                incompatible = self._load_model(checkpoint)
                self._log_incompatible_keys(incompatible)
                self.missing_outside_backbone = incompatible.missing_keys
            for key, target in present.items():
                logger.info("Loading %s from %s ...", key, path)
                try:
                    target.load_state_dict(checkpoint.pop(key))
                except Exception as error:
                    raise ValueError(
                        f"{path} was not loaded: its {key} is not this run's ({error}). To start "
                        "from its weights alone, name it in MODEL.WEIGHTS and do not resume."
                    ) from error
        return checkpoint

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as :class:`Checkpointer` does, with what the tensors alone do not tell: see
        :class:`Metadata`."""
        if len(nets := list(find_vovnets(self.model).values())) == 1:
            convention = InputConvention.of_model(self.model)
            kwargs.setdefault(METADATA_KEY, Metadata.of_spec(nets[0].spec, convention).to_dict())
        super().save(name, **kwargs)

    def _load_vovnets(
        self, state_dict: dict[str, torch.Tensor], known: Metadata | None, *, resuming: bool
    ) -> None:
        matches: list[Match] = []
        problems: list[str] = []
        for backbone, net in find_vovnets(self.model).items():
            found = describe_state_dict(state_dict, find_prefix(state_dict, preferred=backbone))
            match = match_model(self.model, backbone, state_dict, found)
            told = known or metadata_of_layout(found, state_dict)
            self._report(match, found, told)
            problems += misfits(net, match, found)
            if known:
                problems += contradictions(net, known)
            else:
                # Only a convention, so no error: somebody may have trained another network since.
                for sentence in contradictions(net, told):
                    logger.warning(sentence)
            matches.append(match)
        absent = _in_all([*match.missing, *match.wrong_shape] for match in matches)
        if resuming and absent and not problems:
            problems = [
                f"To resume, all of the model must be in it; {len(absent)} tensors are missing or "
                f"of another shape, such as {absent[0]}."
            ]
        if problems and not self.allow_partial:
            raise ValueError(
                " ".join(problems) + " To load what fits nevertheless, add --allow-partial "
                "(in code: allow_partial=True)."
            )
        for problem in problems:
            logger.warning("Loading in part. %s", problem)
        tensors = {name: t for match in matches for name, t in match.tensors.items()}
        self.model.load_state_dict(tensors, strict=False)
        self.missing_outside_backbone = [
            name for name in absent if not any(match.in_backbone([name]) for match in matches)
        ]
        _log_names(matches)

    def _report(self, match: Match, found: Description, told: Metadata) -> None:
        """Log what the file is, what of it is loaded, and what could not be told."""
        logger.info("The file holds %s.\n%s", found, match.table())
        for name, (file, model) in match.wrong_shape.items():
            logger.warning("%s has shape %s in the file and %s in the model.", name, file, model)
        self.input_convention = told.input or told.candidates or None
        candidates = (told.input,) if told.input else told.candidates
        if candidates:
            lines = " or ".join(", ".join(candidate.config_lines()) for candidate in candidates)
            logger.info("It expects %s (%s).", lines, told.source or "as it says itself")
        untold = [n for n in ("stem", "residual", "input") if getattr(told, n) is None]
        if told.candidates:
            untold.remove("input")
        if untold:
            logger.info(
                "The file does not tell its %s: taken to be the model's.", " and ".join(untold)
            )


def _in_all(lists: Iterable[Iterable[str]]) -> list[str]:
    """The names that are in each of the lists: in a model of two VoVNets, what one of them has no
    use for may be the other's."""
    first, *others = (dict.fromkeys(names) for names in lists)
    return [name for name in first if all(name in other for other in others)]


def _log_names(matches: list[Match]) -> None:
    """What is missing and what is not used; no reason to warn if the file is a backbone alone."""
    missing = _in_all(match.missing for match in matches)
    unexpected = _in_all(
        [name for name in match.unexpected if match.part(name) != "linear"] for match in matches
    )
    alone = not any(
        match.part(name) == "other"
        for match in matches
        for name in (*match.tensors, *match.wrong_shape, *match.unexpected)
    )
    level = logging.INFO if alone else logging.WARNING
    if missing:
        logger.log(level, get_missing_parameters_message(missing))
    if unexpected:
        logger.log(level, get_unexpected_parameters_message(unexpected))


@contextmanager
def _unchanged_on_error(model: nn.Module, others: Iterable[Any]) -> Iterator[None]:
    """Give the model and the other objects the state back that they had, if something fails."""
    tensors = {name: t.to("cpu", copy=True) for name, t in model.state_dict().items()}
    states = [(other, copy.deepcopy(other.state_dict())) for other in others]
    try:
        yield
    except BaseException:
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensors[name])
        for other, state in states:
            other.load_state_dict(state)
        raise
