# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Extend Detectron2's checkpointer to VoVNet's weights in every layout."""

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
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

from ..atomic import FileNotWrittenError, atomic_write, write_text
from ..errors import UserValueError
from ..made import is_made_here
from ..words import counted
from .matching import Match, contradictions, find_vovnets, match_model, misfits
from .metadata import InputConvention, Metadata
from .reading import METADATA_KEY, read_checkpoint
from .recognition import Description, describe_state_dict, find_prefix
from .sources import read_weights
from .zoo import metadata_of_layout

logger = logging.getLogger(__name__)

CATEGORY_KINDS = ("thing_classes", "stuff_classes")
"""The kinds of categories, as Detectron2's metadata call them."""

_CATEGORIES = "categories"  # key of a file's entry
_HISTORY = "checkpoints.json"  # names of a training's checkpoints that are kept, oldest first


class VoVNetCheckpointer(DetectionCheckpointer):
    """A :class:`DetectionCheckpointer` that takes VoVNet's weights in any layout, and logs what it
    loaded.

    - ``path`` may also be a name of the zoo (``timm://...``, ``osmr://...``, ``v99://...``), a
      .safetensors file or a zip archive of one file (.pth.zip).
    - The layout and the prefix of the file are recognised. If the file has another network than
      the model, or lacks parts of it, loading is an error that names the config lines that fit.
    - Nothing in the file is executed. Nothing is changed if loading fails.
    - A file with a whole detector loads whole. With a file of a backbone, or of another detector,
      the other parts keep their initial values. A resumed training refuses such a file.

    - Files are written whole or not at all. If a checkpoint turns out to be damaged when a
      training is resumed, the log names the file, and the checkpoint before it is used.

    For a model without a VoVNet it works as :class:`DetectionCheckpointer` does, but executes
    nothing in the file either.

    Attributes:
        input_convention: the input that the last loaded weights expect. It is None if that is not
            known, and a tuple if one of several is meant. See :func:`check_input_convention`.
        missing_outside_backbone: names of the model's tensors outside VoVNet's stem and stages
            (FPN, heads, a classifier) that the last loaded weights left at their initial values:
            the file lacks them, or has them in another shape. In a model without a VoVNet, the
            names are all tensors that the file lacks or has in another shape.
        categories: the names that are written to files, see ``__init__``.
        loaded_categories: the names in the file of the last loaded weights; empty without any.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        allow_partial: bool = False,
        allow_pickle: bool = False,
        max_to_keep: int = 0,
        categories: Mapping[str, Sequence[str]] | None = None,
        **checkpointables: Any,
    ):
        """
        Args:
            model: see :class:`DetectionCheckpointer`; as are ``save_dir``, ``save_to_disk`` and
                ``checkpointables``.
            allow_partial: if a file does not fit the network, load the tensors that fit, with a
                warning.
            allow_pickle: also read the Python pickles of Detectron2's model zoo (.pkl).
            max_to_keep: the number of newest checkpoints to keep; 0 keeps all. ``model_final.pth``
                is always kept, and not counted.
            categories: names of the categories that the model predicts, by kind, see
                :data:`CATEGORY_KINDS`. They are written to files, so that predictions can be named
                without the config.
        """
        if not logger.hasHandlers():  # Detectron2's default_setup knows only Detectron2's logger
            setup_logger(distributed_rank=comm.get_rank(), name="vovnet_d2")
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.allow_partial = allow_partial
        self.allow_pickle = allow_pickle
        self.max_to_keep = max_to_keep
        self.categories = {kind: list(names) for kind, names in (categories or {}).items()}
        self.loaded_categories: dict[str, list[str]] = {}
        self.input_convention: InputConvention | tuple[InputConvention, ...] | None = None
        self.missing_outside_backbone: list[str] = []

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file into the model and the other objects.

        Args:
            path: a file, a URL or a name of the zoo. If it is empty, nothing is loaded.
            checkpointables: names of the objects to load in addition to the model; all by default.

        Returns:
            what the file holds apart from the model and these objects.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, unsafe, or does not fit; nothing has changed then.
        """
        self.input_convention, self.missing_outside_backbone = None, []
        self.loaded_categories = {}
        if not path:
            logger.info("No file of weights is loaded.")
            return {}
        logger.info("Loading from %s ...", path)
        checkpoint, known = read_weights(path, allow_pickle=self.allow_pickle)
        categories = _read_categories(checkpoint.pop(_CATEGORIES, None))
        wanted = self.checkpointables if checkpointables is None else checkpointables
        present = {key: self.checkpointables[key] for key in wanted if key in checkpoint}

        with _unchanged_on_error(self.model, present.values()):
            if find_vovnets(self.model):
                try:
                    self._load_vovnets(checkpoint.pop("model"), known, resuming=bool(present))
                except ValueError as error:
                    raise UserValueError(f"{path} was not loaded. {error}") from error
            else:
                incompatible = self._load_model(checkpoint)
                self._log_incompatible_keys(incompatible)
                self.missing_outside_backbone = incompatible.missing_keys
            for key, target in present.items():
                logger.info("Loading %s from %s ...", key, path)
                try:
                    target.load_state_dict(checkpoint.pop(key))
                except Exception as error:
                    raise UserValueError(
                        f"{path} was not loaded: its {key} is not this run's ({error}). To start "
                        "from its weights alone, name it in MODEL.WEIGHTS and do not resume."
                    ) from error
        self.loaded_categories = categories
        return checkpoint

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the newest checkpoint that every process can read, or load weights. Raise
        ValueError if there are checkpoints, and none of them can be read."""
        names = comm.all_gather(self._checkpoints_to_resume() if resume else [])[0]
        if not names:
            extra = self.load(path, checkpointables=[])
            if self.checkpointables:
                self._write_history([])  # the folder holds another training
            return extra
        problems = {}
        for name in names:
            file = os.path.join(self.save_dir, name)
            if not (problem := next(filter(None, comm.all_gather(self._why_unusable(file))), "")):
                extra = self.load(file)
                if self.checkpointables:
                    self._write_history([*self._earlier_than(name), name])
                    self._write_tag(name)
                return extra
            problems[name] = problem
            logger.warning("%s cannot be resumed from: %s", name, problem)
        raise UserValueError(
            f"No checkpoint in {self.save_dir} can be resumed from: "
            f"{' '.join(problems.values())} Put a copy of one there, or start anew without "
            "--resume."
        )

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as :class:`Checkpointer` does, and add the facts that the tensors do not tell, see
        :class:`Metadata`. If the file cannot be written, raise FileNotWrittenError; earlier
        checkpoints stay."""
        if not self.save_dir or not self.save_to_disk:
            return
        try:
            self.write(name, **kwargs)
            self.tag_last_checkpoint(f"{name}.pth")
        except FileNotWrittenError as error:
            last = self.get_checkpoint_file()
            raise FileNotWrittenError(
                f"{error} Make room, and go on with --resume from the last checkpoint, {last}."
                if last
                else f"{error} There is no earlier checkpoint."
            ) from error

    def write(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint that no training resumes from."""
        if len(nets := list(find_vovnets(self.model).values())) == 1:
            convention = InputConvention.of_model(self.model)
            kwargs.setdefault(METADATA_KEY, Metadata.of_spec(nets[0].spec, convention).to_dict())
        if self.categories:
            kwargs.setdefault(_CATEGORIES, self.categories)
        states = {key: target.state_dict() for key, target in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        with atomic_write(path) as partial, open(partial, "wb") as file:
            torch.save({"model": self.model.state_dict(), **states, **kwargs}, file)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let a training resume from this file, and remove the oldest beyond ``max_to_keep``."""
        names = [name for name in self._read_history() if name != last_filename_basename]
        names.append(last_filename_basename)
        self._write_history(names)
        self._write_tag(last_filename_basename)
        counted = [name for name in names if name != "model_final.pth"]
        too_old = counted[: -self.max_to_keep] if self.max_to_keep > 0 else []
        for path in (Path(self.save_dir, name) for name in too_old):
            if is_made_here(path):  # and neither changed nor replaced since
                path.unlink()
        if too_old:  # last, so that a killed process leaves no file that is not listed
            self._write_history([name for name in names if name not in too_old])

    def _checkpoints_to_resume(self) -> list[str]:
        """Return the names of the checkpoints that can be resumed from, the newest first."""
        if not self.has_checkpoint():
            return []
        last = os.path.basename(self.get_checkpoint_file())
        return [last, *reversed(self._earlier_than(last))]

    def _earlier_than(self, name: str) -> list[str]:
        names = self._read_history()
        return names[: names.index(name)] if name in names else []

    def _why_unusable(self, path: str) -> str:
        try:
            absent = [key for key in self.checkpointables if key not in read_checkpoint(path)]
        except FileNotFoundError:
            return f"{path} is not there (all machines must see the same OUTPUT_DIR)."
        except ValueError as error:
            return str(error)
        return f"{path} is of weights alone, without {absent[0]}." if absent else ""

    def _read_history(self) -> list[str]:
        try:
            names = json.loads(Path(self.save_dir, _HISTORY).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return []
        # Files are removed by these names, so none may lead out of the folder.
        plain = isinstance(names, list) and all(
            isinstance(name, str) and name == os.path.basename(name) for name in names
        )
        return names if plain else []

    def _write_history(self, names: list[str]) -> None:
        self._write_text(_HISTORY, json.dumps(names) + "\n")

    def _write_tag(self, name: str) -> None:
        self._write_text("last_checkpoint", name)  # Detectron2's

    def _write_text(self, name: str, text: str) -> None:
        if self.save_dir and self.save_to_disk:
            write_text(os.path.join(self.save_dir, name), text)

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
                "To resume, all of the model must be in it; missing or of another shape: "
                f"{counted(len(absent), 'tensors')}, such as {absent[0]}."
            ]
        if problems and not self.allow_partial:
            raise UserValueError(
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
        """Log which network the file has, which tensors are loaded, and what is not known."""
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


def _read_categories(found: Any) -> dict[str, list[str]]:
    """Return the categories of a file; empty if the file has something else under this name."""
    if not isinstance(found, dict):
        return {}
    known = {kind: found[kind] for kind in CATEGORY_KINDS if isinstance(found.get(kind), list)}
    return {k: names for k, names in known.items() if all(isinstance(name, str) for name in names)}


def _in_all(lists: Iterable[Iterable[str]]) -> list[str]:
    """Return the names that are in each of the lists.

    In a model of two VoVNets, a tensor that one of them does not use may belong to the other.
    """
    first, *others = (dict.fromkeys(names) for names in lists)
    return [name for name in first if all(name in other for other in others)]


def _log_names(matches: list[Match]) -> None:
    """Log which tensors are missing and which are not used.

    A file of a backbone alone causes no warning.
    """
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
    """Restore the state of the model and of the other objects if something fails in the context."""
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
