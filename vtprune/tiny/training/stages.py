"""The stages of a training: the tower learns to see, the language model to read ideal tokens; then they meet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from vtprune.tiny.scenes import COLORS, KINDS, SHAPES, Scene, Thing
from vtprune.tiny.training.batches import Batch, Chance
from vtprune.tiny.training.concepts import UNSURE, Cells
from vtprune.tiny.training.dropping import choose_cells
from vtprune.tiny.training.packing import pack_questions
from vtprune.tiny.training.student import COMBINATIONS, LlavaStudent, Sight
from vtprune.tiny.words import END

Metrics = dict[str, float]


class Stage(ABC):
    """A loss over some parts of the student."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    crowded: ClassVar[bool]

    def begin(self, student: LlavaStudent, batch: Batch) -> None:  # noqa: B027
        """Before the first step; `batch` is all of its pictures, the same for every worker."""

    @abstractmethod
    def loss(self, student: LlavaStudent, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        """The loss of one batch, to be minimised, and what the learning curve shows."""


@dataclass(frozen=True)
class See(Stage):
    """Tower: name what every cell shows, and what the whole picture holds. Every second scene is crowded."""

    name: ClassVar[str] = "see"
    parts: ClassVar[tuple[str, ...]] = ("tower", "probes")
    crowded: ClassVar[bool] = True

    def loss(self, student: LlavaStudent, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        loss, right = probe_loss(student, student.look(batch.pixels()), batch)
        return loss, {"loss": loss.item(), **right}


@dataclass(frozen=True)
class Read(Stage):
    """Language model: answer from ideal tokens, some of them dropped, all of them blurred."""

    name: ClassVar[str] = "read"
    parts: ClassVar[tuple[str, ...]] = ("language", "ideal")
    crowded: ClassVar[bool] = False
    counts: ClassVar[tuple[int, ...]] = (14, 28, 48, 64, 96)
    blur: ClassVar[float] = 0.3

    def loss(self, student: LlavaStudent, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        index = drop(batch.cells, self.counts, chance)
        tokens = student.ideal(batch.cells.at(index), index)
        noise = torch.randn(tokens.shape, generator=chance.own)
        tokens = tokens + self.blur * tokens.detach().std() * noise.to(tokens)
        return answer_loss(student, batch, tokens, index, compact=_toss(chance))


@dataclass(frozen=True)
class Meet(Stage):
    """Projector: turn the tower's tokens into the ideal ones."""

    name: ClassVar[str] = "meet"
    parts: ClassVar[tuple[str, ...]] = ("projector",)
    crowded: ClassVar[bool] = False

    def begin(self, student: LlavaStudent, batch: Batch) -> None:
        """Scale the projector to what it gets and to what it is to give: these differ by orders of magnitude."""
        with torch.no_grad():
            given, wanted = student.look(batch.pixels()).cells, student.ideal(batch.cells, _every(batch.cells))
            student.projector.linear_1.weight.div_(given.std())
            student.projector.linear_2.weight.mul_(wanted.std())

    def loss(self, student: LlavaStudent, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            sight = student.look(batch.pixels())
        loss = ideal_loss(student, student.projector(sight.cells), batch.cells)
        return loss, {"loss": loss.item()}


@dataclass(frozen=True)
class Join(Stage):
    """Everything at once: answer from the pictures, with tokens dropped in two steps of three."""

    name: ClassVar[str] = "join"
    parts: ClassVar[tuple[str, ...]] = ("tower", "projector", "language", "probes")
    crowded: ClassVar[bool] = False
    counts: ClassVar[tuple[int, ...]] = (256, 256, 256, 192, 128, 96, 64, 28, 14)

    def loss(self, student: LlavaStudent, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        sight = student.look(batch.pixels())
        tokens = student.projector(sight.cells)
        index = drop(batch.cells, self.counts, chance)
        kept = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
        answers, metrics = answer_loss(student, batch, kept, index, compact=_toss(chance))
        probes, right = probe_loss(student, sight, batch)
        loss = answers + 0.5 * ideal_loss(student, tokens, batch.cells) + 0.3 * probes
        return loss, {**metrics, **right}


def drop(cells: Cells, counts: tuple[int, ...], chance: Chance) -> Tensor:
    """Ascending indices of the cells a step goes on with, (B, K), for one K out of `counts`."""
    count = counts[int(torch.randint(len(counts), (), generator=chance.shared))]
    return choose_cells(cells.share, count, chance.own)


def _toss(chance: Chance) -> bool:
    return bool(torch.randint(2, (), generator=chance.shared))


def answer_loss(
    student: LlavaStudent, batch: Batch, tokens: Tensor, index: Tensor, *, compact: bool
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the answers, of the end behind them, and of the answers asked for two words early.

    Questions about things that no kept cell shows have no say: nobody can answer them.
    """
    blocks = pack_questions(batch.questions, tokens.device)
    answerable = batch.answerable(batch.cells.at(index).owner)
    sighted = blocks.masked(answerable)
    hidden = student.read(tokens, index, blocks, compact)
    at, early = sighted.answer >= 0, sighted.early >= 0
    logits, target = student.words(hidden[at]), sighted.answer[at]
    ends = target == END
    answers = cross_entropy(logits[~ends], target[~ends])
    loss = answers + 0.1 * cross_entropy(logits[ends], target[ends])
    loss = loss + 0.5 * cross_entropy(student.words(hidden[early]), sighted.early[early])
    right = (logits.argmax(dim=-1) == target)[~ends]
    return loss, {"loss": answers.item(), **_by_kind(batch, answerable, right)}


def _by_kind(batch: Batch, answerable: Tensor, right: Tensor) -> Metrics:
    """Share of right answers of every kind. `right` runs over the answerable questions, picture by picture."""
    kinds = [q.kind for i, row in enumerate(batch.questions) for k, q in enumerate(row) if answerable[i, k]]
    marks: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind, mark in zip(kinds, right.tolist(), strict=True):
        marks[kind].append(mark)
    return {kind: sum(found) / len(found) for kind, found in marks.items() if found}


def ideal_loss(student: LlavaStudent, tokens: Tensor, cells: Cells) -> Tensor:
    """Squared distance to the ideal tokens over their variance; cells with a thing and empty ones count alike."""
    with torch.no_grad():
        ideal = student.ideal(cells, _every(cells))
    shown, empty = cells.what > 0, cells.what == 0
    apart = [mse_loss(tokens[where].float(), ideal[where].float()) for where in (shown, empty)]
    return (apart[0] + apart[1]) / ideal.var()


def _every(cells: Cells) -> Tensor:
    """The index of every cell, (B, N)."""
    rows, count = cells.what.shape
    return torch.arange(count, device=cells.what.device).expand(rows, -1)


def probe_loss(student: LlavaStudent, sight: Sight, batch: Batch) -> tuple[Tensor, Metrics]:
    """What the probes get wrong, and the share of shown cells that they read rightly."""
    probes, cells = student.probes, batch.cells
    what = probes.what(sight.cells)
    loss = _balanced(what, cells.what) + 0.5 * _balanced(probes.hue(sight.cells), cells.hue)
    peers = probes.peers(sight.cells)
    loss = loss + _balanced(peers, cells.peers)
    centre = probes.centre(sight.cells).float()[..., 0]
    loss = loss + 0.5 * binary_cross_entropy_with_logits(centre, cells.centre, pos_weight=centre.new_tensor(5.0))
    loss = loss + 0.1 * _place_loss(student, sight.cells)
    held = contents(batch.scenes).to(centre)
    for reading in (probes.whole(sight.whole), probes.last(sight.last)):
        loss = loss + 3 * binary_cross_entropy_with_logits(reading.float(), held)
    shown = cells.what > 0
    return loss, {
        "cells right": (what.argmax(dim=-1) == cells.what)[shown].float().mean().item(),
        "peers right": (peers.argmax(dim=-1) == cells.peers)[cells.peers > 0].float().mean().item(),
    }


def _balanced(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy: three quarters for the cells that show something, however few they are."""
    losses = cross_entropy(logits.float().flatten(0, 1), label.flatten(), reduction="none", ignore_index=UNSURE)
    return 0.75 * losses[label.flatten() > 0].mean() + 0.25 * losses[label.flatten() == 0].mean()


def _place_loss(student: LlavaStudent, cells: Tensor) -> Tensor:
    index = torch.arange(student.side**2, device=cells.device).expand(len(cells), -1).flatten()
    row, column = (probe(cells).float().flatten(0, 1) for probe in (student.probes.row, student.probes.column))
    return cross_entropy(row, index // student.side) + cross_entropy(column, index % student.side)


def contents(scenes: list[Scene]) -> Tensor:
    """Which of all combinations a picture holds, (B, combinations), 0 or 1."""
    held = torch.zeros(len(scenes), COMBINATIONS)
    for i, scene in enumerate(scenes):
        held[i, [_combination(thing) for thing in scene.things]] = 1
    return held


def _combination(thing: Thing) -> int:
    if thing.shape is None or thing.color is None:
        return len(COLORS) * len(SHAPES) + (thing.digit or 0)
    return tuple(COLORS).index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)
