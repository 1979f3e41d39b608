"""From a prompt to a decision: gather the evidence, run the pipeline on stacks of equal units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtprune.errors import MissingEvidence
from vtprune.kernels import reference as kernels
from vtprune.pipeline import Pipeline
from vtprune.report import DROPPED
from vtprune.runtime.evidence import FROM_ENCODER, Forced, Given, forced_tokens
from vtprune.runtime.reading import Prompt
from vtprune.runtime.units import Unit, make_units
from vtprune.types import Budget, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What stays: `kept` (B, L) bool, at most `size` a row; `stages` (n,) per segment, -2 where dropped."""

    kept: Tensor
    size: int
    row_lengths: tuple[int, ...]
    stages: tuple[Tensor, ...]


@torch.no_grad()
def decide(
    prompt: Prompt,
    embeds: Tensor,
    *,
    pipeline: Pipeline,
    budget: Budget,
    given: Given | None,
) -> Decision:
    """Run the pipeline on every stack of equal units; counts are known from shapes, nothing waits for the device.

    Args:
        embeds: (B, L, D), what the language model is about to get.
        given: evidence from the user.
    """
    layout = prompt.layout
    units = make_units(layout, budget, prompt.seen)
    forced = forced_tokens(units, given, layout)
    base = layout.valid.copy()
    for unit in units:
        base.reshape(-1)[unit.at] = False
    row_lengths = [int(np.count_nonzero(row)) for row in base]
    for unit in units:
        row_lengths[unit.row] += unit.k
    kept = torch.from_numpy(base).to(embeds.device, non_blocking=True)
    pruned = any(unit.k < len(unit.at) for unit in units)
    scores = _evidence(prompt, pipeline, given, embeds.device) if pruned else {}
    decided: dict[int, Tensor] = {}
    for numbers in _stacks(units, forced):
        stacked = [units[number] for number in numbers]
        where = np.array([unit.at for unit in stacked])
        at = torch.from_numpy(where).to(embeds.device, non_blocking=True)
        decision = _decide_stack(pipeline, stacked, [forced[number] for number in numbers], embeds, where, at, scores)
        kept.view(-1).scatter_(0, at.view(-1), (decision > DROPPED).view(-1))
        decided.update(zip(numbers, decision.unbind(), strict=True))
    return Decision(
        kept=kept,
        size=max(row_lengths),
        row_lengths=tuple(row_lengths),
        stages=_per_segment(units, decided, len(layout.segments)),
    )


def _per_segment(units: list[Unit], decided: Mapping[int, Tensor], count: int) -> tuple[Tensor, ...]:
    stages: dict[int, list[Tensor]] = defaultdict(list)
    for number, unit in enumerate(units):
        start = 0
        for piece in unit.pieces:
            stop = start + piece.stop - piece.start
            stages[piece.segment].append(decided[number][start:stop])
            start = stop
    return tuple(kernels.joined(stages[segment]) for segment in range(count))


def _stacks(units: list[Unit], forced: list[Forced]) -> list[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, (unit, force) in enumerate(zip(units, forced, strict=True)):
        groups[(*unit.shape, force.shape)].append(number)
    return list(groups.values())


def _decide_stack(
    pipeline: Pipeline,
    units: list[Unit],
    forced: list[Forced],
    embeds: Tensor,
    where: np.ndarray,
    at: Tensor,
    scores: Mapping[str, list[Tensor]],
) -> Tensor:
    """The pick that took each token (S, N), -2 where dropped; `where` is `at` on the host."""
    S, N = at.shape
    k = units[0].k
    decision = torch.full((S, N), DROPPED, device=at.device)
    if k == N:
        return decision.zero_()
    evidence = {name: _of_units(units, per_segment) for name, per_segment in scores.items()}
    if forced[0].protect:
        evidence["protect"] = torch.tensor([force.protect for force in forced]).to(at.device, non_blocking=True)
    if forced[0].forbid:
        banned = torch.tensor([force.forbid for force in forced]).to(at.device, non_blocking=True)
        evidence["forbid"] = torch.zeros(S, N, dtype=torch.bool, device=at.device).scatter_(1, banned, True)
    visual = VisualTokens(
        features=_features(embeds, where, at),
        parts=units[0].parts,
        ordinals=tuple(unit.ordinal for unit in units),
        evidence=evidence,
    )
    with kernels.exact(embeds.device):
        selection = pipeline.run(visual, k)
    return decision.scatter_(1, selection.keep, selection.taken)


def _features(embeds: Tensor, where: np.ndarray, at: Tensor) -> Tensor:
    """Tokens (S, N, D); those that lie one after the other need no copy."""
    order = where.reshape(-1)
    if not (order[1:] - order[:-1] == 1).all():
        return kernels.take_rows(embeds, at)
    start, D = int(order[0]), embeds.shape[-1]
    return embeds.reshape(-1, D)[start : start + len(order)].view(*where.shape, D)


def _of_units(units: list[Unit], per_segment: list[Tensor]) -> Tensor:
    """Scores (S, N) of stacked units, from scores per segment."""
    pieces = [per_segment[piece.segment][piece.start : piece.stop] for unit in units for piece in unit.pieces]
    return kernels.joined(pieces).reshape(len(units), -1)


def _evidence(prompt: Prompt, pipeline: Pipeline, given: Given | None, device: torch.device) -> dict[str, list[Tensor]]:
    """Scores per segment of everything the pipeline reads."""
    scores: dict[str, list[Tensor]] = {}
    for name in pipeline.needs:
        if given is not None and name in given.values:
            scores[name] = given.scores(name, prompt.layout, device)
        elif name in FROM_ENCODER:
            scores[name] = prompt.encoder_scores(device)
        else:
            raise MissingEvidence(f"this method reads {name!r}: give it with `with model.vtprune.using({name}=[...])`")
    return scores
