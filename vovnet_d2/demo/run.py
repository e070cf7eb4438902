# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the demo, from a source of images to its outputs."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..drawing.artist import Artist, Shown
from ..predictor import Predictor
from .inputs import Frame, Source
from .outputs import Sink
from .results import ResultsFile
from .selection import Selection


@dataclass
class Outcome:
    """Counts what a run of the demo did.

    Attributes:
        done: the number of images whose outputs were written.
        objects: the number of objects that are shown on them; None for a network that labels
            pixels only.
        skipped: the number of inputs that could not be read to their end.
        interrupted: True if Ctrl-C ended the run.
    """

    done: int = 0
    objects: int | None = None
    skipped: int = 0
    interrupted: bool = False


@dataclass(frozen=True)
class Run:
    """Runs a detector on a source of images.

    Attributes:
        predictor: with predictions on the CPU.
        selection: selects the predictions to show.
        artist: draws them, if there are sinks.
        sinks: take the drawn pictures.
        results: takes the detections.
    """

    predictor: Predictor
    selection: Selection
    artist: Artist
    sinks: Sequence[Sink]
    results: ResultsFile | None

    def __call__(self, source: Source) -> Outcome:
        """Process the images of a source, with a progress bar. Name and skip unreadable images."""
        outcome = Outcome()

        def skip(sentence: str) -> None:
            outcome.skipped += 1
            tqdm.write(sentence, file=sys.stderr)

        try:
            with tqdm(total=source.total, unit=source.unit) as bar:
                for frame, prediction in self._predict(source.frames(skip)):
                    shown = self.selection(prediction)
                    if not self._keep(frame, shown):
                        break
                    if shown.instances is not None:
                        outcome.objects = (outcome.objects or 0) + len(shown.instances)
                    outcome.done += 1
                    bar.update(frame.number - bar.n)
        except KeyboardInterrupt:
            outcome.interrupted = True
        return outcome

    def _predict(self, frames: Iterator[Frame]) -> Iterator[tuple[Frame, dict[str, Any]]]:
        for batch in _batches(frames, self.predictor.batch_size):
            predictions = self.predictor([frame.pixels for frame in batch])
            yield from zip(batch, predictions, strict=True)

    def _keep(self, frame: Frame, shown: Shown) -> bool:
        """Draw and write a prediction; return False to stop."""
        go_on = []
        if self.sinks:
            drawn = self.artist.draw(frame.pixels, shown)
            go_on = [sink.write(frame, drawn) for sink in self.sinks]
        if self.results:  # after drawing, as this moves keypoints by half a pixel, in place
            self.results.write(frame, shown)
        return all(go_on)


def _batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    iterator = iter(frames)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
