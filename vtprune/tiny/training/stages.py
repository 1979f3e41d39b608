"""The stages of a training: the tower learns to see, the language model to read ideal tokens; then they meet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from vtprune.tiny.scenes import KINDS
from vtprune.tiny.training.batches import Batch, Chance
from vtprune.tiny.training.concepts import Cells, label_things
from vtprune.tiny.training.dropping import choose_cells
from vtprune.tiny.training.packing import pack_questions
from vtprune.tiny.training.probing import place_loss, places_right, probe_loss, thing_loss
from vtprune.tiny.training.student import Shown, Sight, Student
from vtprune.tiny.words import END

Metrics = dict[str, float]


class Stage(ABC):
    """A loss over some parts of the student."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    crowded: ClassVar[bool] = False
    """Whether every second scene is full of things."""

    def begin(self, student: Student, batch: Batch) -> None:  # noqa: B027
        """Before the first step; `batch` is all of its pictures, the same for every worker."""

    @abstractmethod
    def loss(self, student: Student, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        """The loss of one batch, to be minimised, and what the learning curve shows."""


@dataclass(frozen=True)
class See(Stage):
    """Tower: name what every cell shows, and what the whole picture holds. Every second scene is crowded."""

    name: ClassVar[str] = "see"
    parts: ClassVar[tuple[str, ...]] = ("tower", "probes")
    crowded: ClassVar[bool] = True

    def loss(self, student: Student, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        loss, right = probe_loss(student, student.look(batch.pixels()), batch)
        return loss, {"loss": loss.item(), **right}


@dataclass(frozen=True)
class Read(Stage):
    """Language model: answer from ideal tokens, some of them dropped, all of them blurred."""

    name: ClassVar[str] = "read"
    parts: ClassVar[tuple[str, ...]] = ("language", "ideal", "places", "things")
    shares: ClassVar[tuple[int, ...]] = (14, 28, 48, 64, 96)
    """How many of every 256 cells are kept: one of them for all pictures of a step."""
    blur: ClassVar[float] = 0.3

    def loss(self, student: Student, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        index = drop(student, batch.cells, self.shares, chance)
        tokens = student.ideal(batch.cells.at(index), index)
        noise = torch.randn(tokens.shape, generator=chance.own)
        tokens = tokens + self.blur * tokens.detach().std() * noise.to(tokens)
        return answer_loss(student, batch, tokens, index, chance)


@dataclass(frozen=True)
class Meet(Stage):
    """Projector: turn the tower's tokens into the ideal ones."""

    name: ClassVar[str] = "meet"
    parts: ClassVar[tuple[str, ...]] = ("projector",)

    def begin(self, student: Student, batch: Batch) -> None:
        """Scale the projector to what it gets and to what it is to give: these differ by orders of magnitude."""
        with torch.no_grad():
            given, wanted = student.look(batch.pixels()).cells, student.ideal(batch.cells, _every(batch.cells))
            student.scale_projector(given.std().item(), wanted.std().item())

    def loss(self, student: Student, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            sight = student.look(batch.pixels())
        loss = ideal_loss(student, student.project(sight.cells), batch.cells)
        return loss, {"loss": loss.item()}


@dataclass(frozen=True)
class Join(Stage):
    """Everything at once: answer from the pictures, with tokens dropped in two steps of three."""

    name: ClassVar[str] = "join"
    parts: ClassVar[tuple[str, ...]] = ("tower", "projector", "language", "probes", "places", "things")

    def loss(self, student: Student, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        sight = student.look(batch.pixels())
        loss, metrics = seen_loss(student, batch, sight, chance)
        probes, right = probe_loss(student, sight, batch)
        return loss + 0.3 * probes, {**metrics, **right}


@dataclass(frozen=True)
class Watch(Stage):
    """The same for a tower that can see already and stays as it is."""

    name: ClassVar[str] = "watch"
    parts: ClassVar[tuple[str, ...]] = ("projector", "language")

    def loss(self, student: Student, batch: Batch, chance: Chance) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            sight = student.look(batch.pixels())
        return seen_loss(student, batch, sight, chance)


SHARES = (256, 256, 256, 192, 128, 96, 64, 28, 14)
"""How many of every 256 cells a step may keep that learns to answer from what is seen."""


def seen_loss(student: Student, batch: Batch, sight: Sight, chance: Chance) -> tuple[Tensor, Metrics]:
    """That of the answers from what is left of the projected tokens, and half that of the tokens themselves."""
    tokens = student.project(sight.cells)
    index = drop(student, batch.cells, SHARES, chance)
    kept = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    answers, metrics = answer_loss(student, batch, kept, index, chance)
    return answers + 0.5 * ideal_loss(student, tokens, batch.cells), metrics


def drop(student: Student, cells: Cells, shares: tuple[int, ...], chance: Chance) -> Tensor:
    """Ascending indices of the cells a step goes on with, (B, K), for one K out of `shares` of 256."""
    share = shares[int(torch.randint(len(shares), (), generator=chance.shared))]
    return choose_cells(cells.share, max(1, share * cells.share.shape[1] // 256), chance.own, student.side)


def _toss(chance: Chance) -> bool:
    return bool(torch.randint(2, (), generator=chance.shared))


def answer_loss(
    student: Student, batch: Batch, tokens: Tensor, index: Tensor, chance: Chance
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the answers, of the end behind them, and of the answers asked for two words early.

    Questions about things that no kept cell shows have no say: nobody can answer them.
    """
    blocks = pack_questions(batch.questions, tokens.device)
    answerable = batch.answerable(batch.cells.at(index).owner)
    sighted = blocks.masked(answerable)
    shown = Shown(tokens=tokens, index=index, of=batch.cells.what.shape[1], compact=student.compacts and _toss(chance))
    reading = student.read(shown, blocks)
    hidden = reading.blocks
    at, early = sighted.answer >= 0, sighted.early >= 0
    logits, target = student.words(hidden[at]), sighted.answer[at]
    ends = target == END
    answers = _entropy(logits[~ends], target[~ends])
    loss = answers + 0.1 * _entropy(logits[ends], target[ends])
    loss = loss + 0.5 * _entropy(student.words(hidden[early]), sighted.early[early])
    metrics = {"loss": answers.item()} if answerable.any() else {}
    if reading.places:
        loss = loss + 0.2 * place_loss(reading.places, index)
        metrics["places right"] = places_right(reading.places, index)
    named = sighted.named >= 0
    if student.things is not None and reading.things is not None and named.any():
        known = label_things(batch.scenes, student.patch).to(named.device)
        asked = known.gather(1, sighted.named.clamp(min=0)[..., None].expand(-1, -1, 3))
        aided, shares = thing_loss(student.things, reading.things[named], asked[named])
        loss, metrics = loss + 0.5 * aided, metrics | shares
    right = (logits.argmax(dim=-1) == target)[~ends]
    return loss, metrics | _by_kind(batch, answerable, right)


def _entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, 0 where there is nothing to answer."""
    return cross_entropy(logits, target, reduction="sum") / max(1, len(target))


def _by_kind(batch: Batch, answerable: Tensor, right: Tensor) -> Metrics:
    """Share of right answers of every kind. `right` runs over the answerable questions, picture by picture."""
    kinds = [q.kind for i, row in enumerate(batch.questions) for k, q in enumerate(row) if answerable[i, k]]
    marks: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind, mark in zip(kinds, right.tolist(), strict=True):
        marks[kind].append(mark)
    return {kind: sum(found) / len(found) for kind, found in marks.items() if found}


def ideal_loss(student: Student, tokens: Tensor, cells: Cells) -> Tensor:
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
