"""Training pictures: fresh ones at every step, from the seed, the stage and the number of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from vtprune.tiny.clips import CLIP_KINDS, FRAMES, draw_clip
from vtprune.tiny.drawing import Stream
from vtprune.tiny.scenes import KINDS, TRAIN, Question, Scene, Span, ask, draw_scene
from vtprune.tiny.training.concepts import Cells, label_cells

QUESTIONS = 8
SEEDS = 64
_ODDS = {"color": 3, "shape": 2, "where": 3, "exist": 2, "left": 6, "number": 6, "count": 3}
"""How often a kind is drawn from what can be asked of a scene: rare ones more often."""
_VARIED = ("left", "count")
"""Kinds of which a second and a third question are made up."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B pictures or clips, the labels of their cells, and up to `QUESTIONS` questions each."""

    views: list[tuple[Scene, ...]]
    cells: Cells
    questions: list[list[Question]]

    @property
    def scenes(self) -> list[Scene]:
        """The pictures; of clips the first frames."""
        return [views[0] for views in self.views]

    def pixels(self) -> Tensor:
        """Bytes, (B, views, 3, size, size), where the labels are."""
        stacked = torch.from_numpy(np.stack([[view.pixels for view in views] for views in self.views]))
        return stacked.to(self.cells.what.device).permute(0, 1, 4, 2, 3)

    def answerable(self, owner: Tensor) -> Tensor:
        """Which questions cells of these owners can answer, (B, K), on the host: all they are about is in sight.

        Questions about nothing ("no", "zero") are thinned out as much as the others: few cells are no hint at them.
        """
        answerable = torch.zeros(len(self.questions), max(map(len, self.questions)), dtype=torch.bool)
        about = torch.zeros_like(answerable)
        nothing = torch.zeros_like(answerable)
        for i, (seen, row) in enumerate(zip(owner.tolist(), self.questions, strict=True)):
            for k, question in enumerate(row):
                about[i, k], nothing[i, k] = bool(question.about), not question.about
                answerable[i, k] = bool(question.about) and set(question.about) <= set(seen)
        share = answerable.sum() / about.sum().clamp(min=1)
        turns = (nothing.flatten().cumsum(0) * share).floor()
        taken = turns.diff(prepend=turns.new_zeros(1)).view_as(nothing) > 0
        return answerable | (nothing & taken)


@dataclass(frozen=True)
class Chance:
    """What a step draws from: `shared` is the same for all workers of a run, `own` is not."""

    shared: Generator
    own: Generator

    @classmethod
    def of(cls, seed: int, rank: int) -> Chance:
        """From the seed of a step, for a worker."""
        return cls(Generator().manual_seed(seed), Generator().manual_seed(seed + (rank + 1) * 1_000_000_007))


@dataclass(frozen=True)
class Source:
    """The pictures of one stage of one run; `crowded`: every second scene is full of shapes and signs.

    Runs of different seeds, below `SEEDS`, and stages never share a picture.
    """

    seed: int
    stage: int
    patch: int
    crowded: bool = False
    device: str = "cpu"

    def batch(self, step: int, rows: range, size: int) -> Batch:
        """Those rows of the batch of `size` pictures that belongs to a step."""
        start = ((self.seed * 8 + self.stage) << 31) + step * size
        drawn = [self.draw((start + row) % len(TRAIN), row, step) for row in rows]
        views, questions = [views for views, _ in drawn], [questions for _, questions in drawn]
        return Batch(views, label_cells(views, self.patch).to(self.device), questions)

    def draw(self, seed: int, row: int, step: int) -> tuple[tuple[Scene, ...], list[Question]]:
        """The views of one row, as many as others of this step have, and questions about them."""
        shapes, signs = self._contents(row)
        scene = draw_scene(seed, shapes=shapes, signs=signs)
        return (scene,), choose_questions(scene, Stream(~seed), KINDS)

    def _contents(self, row: int) -> tuple[Span, Span]:
        """How many shapes and signs a row may hold."""
        if self.crowded and row % 2:
            return (3, 8), (2, 5)
        return (0, 8) if row % 3 == 0 else (2, 5), (0, 1)


@dataclass(frozen=True)
class ClipSource(Source):
    """Clips instead: of all frames, of every second one or of one alone, by the number of the step."""

    frames: ClassVar[tuple[int, ...]] = (FRAMES, FRAMES // 2, FRAMES, 1)

    def draw(self, seed: int, row: int, step: int) -> tuple[tuple[Scene, ...], list[Question]]:
        stream, apart = Stream(~seed), FRAMES // self.frames[step % len(self.frames)]
        clip = draw_clip(seed).taking(range(stream.integer(0, apart), FRAMES, apart))
        return clip.views, choose_questions(clip.whole, stream, CLIP_KINDS)


def choose_questions(scene: Scene, stream: Stream, kinds: Sequence[str]) -> list[Question]:
    """At most `QUESTIONS` different ones of these kinds, by their odds."""
    first = ask(scene, stream)
    more = [question for _ in range(2) for question in ask(scene, stream) if question.kind in _VARIED]
    asked = {question.text: question for question in [*first, *more] if question.kind in kinds}
    order = sorted(asked.values(), key=lambda question: _draw(stream, _ODDS[question.kind]), reverse=True)
    return order[:QUESTIONS]


def _draw(stream: Stream, odds: int) -> float:
    """A key whose largest values come in proportion to the odds (weighted sampling without replacement)."""
    return float((stream.integer(1, 1 << 30) / (1 << 30)) ** (1 / odds))
