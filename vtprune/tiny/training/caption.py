"""The last stage: the text tower learns to find what questions and descriptions speak of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from vtprune.tiny.scenes import Scene
from vtprune.tiny.training.aligned import AlignedText
from vtprune.tiny.training.batches import Batch, Chance
from vtprune.tiny.training.stages import Stage
from vtprune.tiny.training.student import Student
from vtprune.tiny.training.students import LlavaStudent


@dataclass(frozen=True)
class Caption(Stage):
    """Text tower: questions find their cells, descriptions find their pictures. The vision tower is frozen."""

    name: ClassVar[str] = "caption"
    parts: ClassVar[tuple[str, ...]] = ("aligned",)

    def loss(self, student: Student, batch: Batch, chance: Chance) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(student, LlavaStudent)
        aligned = student.aligned
        with torch.no_grad():
            sight = student.look(batch.pixels())
        norm = student.post_norm
        cells = normalize(aligned.visual(norm(sight.cells)).float(), dim=-1)
        whole = normalize(aligned.visual(sight.last).float(), dim=-1)
        found, right = _find_cells(aligned, batch, cells)
        logits = aligned.scale.exp() * whole @ aligned.embed([describe(scene) for scene in batch.scenes]).T
        target = torch.arange(len(logits), device=logits.device)
        paired = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        return found + 0.2 * paired, {"loss": found.item(), "paired": paired.item(), "cells found": right}


def _find_cells(aligned: AlignedText, batch: Batch, cells: Tensor) -> tuple[Tensor, float]:
    """Which cells show what a question is about, and in what share of the questions the best cell does."""
    asked = [(i, q) for i, row in enumerate(batch.questions) for q in row if q.about]
    texts = aligned.embed([question.text for _, question in asked])
    rows = torch.tensor([i for i, _ in asked], device=cells.device)
    owner = batch.cells.owner[rows]
    shown = torch.stack([sum((row == i for i in q.about), row < -1) for row, (_, q) in zip(owner, asked, strict=True)])
    closeness = torch.einsum("qnd,qd->qn", cells[rows], texts)
    logits = aligned.scale.exp() * closeness + aligned.bias
    loss = binary_cross_entropy_with_logits(logits, shown.float(), pos_weight=logits.new_tensor(5.0))
    return loss, shown.gather(1, closeness.argmax(dim=1)[:, None]).float().mean().item()


def describe(scene: Scene) -> str:
    """All that is in a scene, in words that the tokenizer knows."""
    return " , ".join(
        f"a {thing.color} {thing.shape}" if thing.shape else f"number {thing.digit}" for thing in scene.things
    )
