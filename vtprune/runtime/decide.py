"""From a prompt to a decision: gather the evidence, run the pipeline on stacks of equal units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vtprune.errors import MissingEvidence, UnsupportedCall
from vtprune.kernels import host
from vtprune.kernels import reference as kernels
from vtprune.pipeline import Pipeline
from vtprune.report import DROPPED
from vtprune.runtime.evidence import Forced, Given, forced_tokens, readings_of
from vtprune.runtime.reading import Prompt
from vtprune.runtime.units import Unit, make_units, split_unit
from vtprune.types import Budget, Merged, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What stays: `kept` (B, L) bool, at most `size` a row; `stages` (n,) per segment, -2 where dropped.

    `merged` are rows (m, D) that take the place of tokens, each with where they are, (m,), counted through all B * L.
    `into` (n,) per segment says which of its tokens swallowed each one, counted through all pictures where they share
    one budget; empty where nothing is merged.
    """

    kept: Tensor
    size: int
    row_lengths: tuple[int, ...]
    stages: tuple[Tensor, ...]
    merged: tuple[tuple[Tensor, Tensor], ...] = ()
    into: tuple[Tensor, ...] = ()


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
    adaptive = pipeline.counter is not None and not budget.keeps_all
    pruned = adaptive or any(unit.k < len(unit.at) for unit in units)
    if pruned:
        _check_encoder_decides(pipeline, given, forced)
    scores = _evidence(prompt, pipeline, given, embeds.device) if pruned else {}
    stacker = _Stacker(embeds=embeds, scores=scores, survivors=pipeline.survivors)
    if adaptive:
        units = _counted(pipeline, budget, units, forced, stacker)
    if pruned and pipeline.frames is not None:
        units = _shared(pipeline, units, stacker)
        forced = forced_tokens(units, given, layout)
    base = layout.valid.copy()
    for unit in units:
        base.reshape(-1)[unit.at] = False
    row_lengths = [int(np.count_nonzero(row)) for row in base]
    for unit in units:
        row_lengths[unit.row] += unit.k
    kept = torch.from_numpy(base).to(embeds.device, non_blocking=True)
    decided: dict[int, Tensor] = {}
    swallowed: dict[int, Tensor] = {}
    merged: list[tuple[Tensor, Tensor]] = []
    for numbers in _stacks(units, forced):
        stack = stacker.stack([units[number] for number in numbers], [forced[number] for number in numbers])
        choice = _choose(pipeline, stack)
        kept.view(-1).scatter_(0, stack.at.view(-1), (choice.stages > DROPPED).view(-1))
        decided.update(zip(numbers, choice.stages.unbind(), strict=True))
        if choice.into is not None:
            starts = torch.tensor([units[number].pieces[0].start for number in numbers])[:, None]
            into = choice.into + starts.to(stack.at.device, non_blocking=True) * (choice.into >= 0)
            swallowed.update(zip(numbers, into.unbind(), strict=True))
        if choice.merged is not None:
            merged.append((choice.merged.rows.flatten(0, 1), stack.at.gather(1, choice.keep).flatten()))
    return Decision(
        kept=kept,
        size=max(row_lengths),
        row_lengths=tuple(row_lengths),
        stages=_per_segment(units, decided, len(layout.segments)),
        merged=tuple(merged),
        into=_per_segment(units, swallowed, len(layout.segments)) if swallowed else (),
    )


def _check_encoder_decides(pipeline: Pipeline, given: Given | None, forced: list[Forced]) -> None:
    """Raise `UnsupportedCall` where evidence would bring back patches that are gone from the encoder already."""
    if pipeline.encoder is None or given is None:
        return
    if pipeline.survivors in given.values or any(force != Forced() for force in forced):
        raise UnsupportedCall(
            f"using(...): method {pipeline.name!r} prunes inside the encoder, before a token can be forced in or out"
        )


def _counted(
    pipeline: Pipeline, budget: Budget, units: list[Unit], forced: list[Forced], stacker: _Stacker
) -> list[Unit]:
    """The units with as many tokens as an adaptive method wants, floor and forced ones at least."""
    found = dict(enumerate(units))
    for numbers in _stacks(units, forced):
        stack = stacker.stack([units[number] for number in numbers], [forced[number] for number in numbers])
        with torch.no_grad(), kernels.exact(stack.at.device):
            counts = host.read_counts(pipeline.count(stack.tokens, stack.k))
        for number, count in zip(numbers, counts, strict=True):
            least = max(budget.floor, len(forced[number].protect))
            found[number] = replace(units[number], k=min(stack.k, max(least, count)))
    return list(found.values())


def _shared(pipeline: Pipeline, units: list[Unit], stacker: _Stacker) -> list[Unit]:
    """A unit for every part of those that have several, with its share of the budget."""
    found: list[Unit] = []
    for numbers in _stacks(units, [Forced()] * len(units)):
        stacked = [units[number] for number in numbers]
        stack = stacker.stack(stacked, [Forced()] * len(stacked))
        if stack.k == stack.at.shape[1] or len(stacked[0].parts) == 1:
            found += stacked
            continue
        with torch.no_grad(), kernels.exact(stack.at.device):
            counts = host.read_counts(pipeline.share(stack.tokens, stack.k))
        parts = len(stacked[0].parts)
        for i, unit in enumerate(stacked):
            found += split_unit(unit, counts[i * parts : (i + 1) * parts])
    return found


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


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Equal units as tensors: `at` (S, N) says where their tokens are, `k` of them stay."""

    tokens: VisualTokens
    at: Tensor
    k: int


@dataclass(frozen=True, kw_only=True)
class _Stacker:
    """Builds stacks from the prompt and the evidence per segment. What is 0 in `survivors` is gone, and forbidden."""

    embeds: Tensor
    scores: Mapping[str, list[Tensor]]
    survivors: str | None = None

    def stack(self, units: list[Unit], forced: list[Forced]) -> _Stack:
        """What a pipeline gets to see of equal units."""
        where = np.array([unit.at for unit in units])
        at = torch.from_numpy(where).to(self.embeds.device, non_blocking=True)
        evidence = {name: _of_units(units, per_segment) for name, per_segment in self.scores.items()}
        if forced[0].protect:
            evidence["protect"] = torch.tensor([force.protect for force in forced]).to(at.device, non_blocking=True)
        if forced[0].forbid:
            banned = torch.tensor([force.forbid for force in forced]).to(at.device, non_blocking=True)
            evidence["forbid"] = torch.zeros(at.shape, dtype=torch.bool, device=at.device).scatter_(1, banned, True)
        if self.survivors in evidence:
            evidence["forbid"] = evidence[self.survivors] == 0
        tokens = VisualTokens(
            features=_features(self.embeds, where, at),
            parts=units[0].parts,
            ordinals=tuple(unit.ordinal for unit in units),
            evidence=evidence,
        )
        return _Stack(tokens=tokens, at=at, k=units[0].k)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What became of a stack: `stages` (S, N), `keep` (S, K); where the method merges, `into` (S, N) and what came of
    it, None where all tokens stay."""

    stages: Tensor
    keep: Tensor
    into: Tensor | None = None
    merged: Merged | None = None


def _choose(pipeline: Pipeline, stack: _Stack) -> _Choice:
    """Run the pipeline on one stack; only merged rows are differentiable."""
    stages = torch.full(stack.at.shape, DROPPED, device=stack.at.device)
    if stack.k == stack.at.shape[1]:
        own = torch.arange(stack.k, device=stack.at.device).expand(stack.at.shape)
        return _Choice(stages=stages.zero_(), keep=own, into=None if pipeline.merger is None else own)
    with kernels.exact(stack.at.device):
        with torch.no_grad():
            selection = pipeline.run(stack.tokens, stack.k)
        merged = pipeline.merge(stack.tokens, selection) if stack.k else None
    stages = stages.scatter_(1, selection.keep, selection.taken)
    if pipeline.merger is None:
        return _Choice(stages=stages, keep=selection.keep)
    if merged is None:
        return _Choice(stages=stages, keep=selection.keep, into=torch.full_like(stages, -1))
    into = selection.keep.gather(1, merged.into.clamp(min=0)).masked_fill(merged.into < 0, -1)
    return _Choice(stages=stages, keep=selection.keep, into=into, merged=merged)


def _features(embeds: Tensor, where: np.ndarray, at: Tensor) -> Tensor:
    """Tokens (S, N, D); those that lie one after the other need no copy."""
    order = where.reshape(-1)
    if not (order[1:] - order[:-1] == 1).all():
        return kernels.take_rows(embeds, at)
    start, D = int(order[0]), embeds.shape[-1]
    return embeds.reshape(-1, D)[start : start + len(order)].view(*where.shape, D)


def _of_units(units: list[Unit], per_segment: list[Tensor]) -> Tensor:
    """Evidence (S, N) or (S, N, C) of stacked units, from that per segment."""
    pieces = [per_segment[piece.segment][piece.start : piece.stop] for unit in units for piece in unit.pieces]
    return kernels.joined(pieces).unflatten(0, (len(units), -1))


def _evidence(prompt: Prompt, pipeline: Pipeline, given: Given | None, device: torch.device) -> dict[str, list[Tensor]]:
    """Everything the pipeline reads, per segment: (n,), or (n, C) where a row has several numbers."""
    found: dict[str, list[Tensor]] = {}
    readings = readings_of(pipeline)
    for name in pipeline.needs:
        if given is not None and name in given.values:
            found[name] = given.scores(name, prompt.layout, device)
        elif name in readings:
            found[name] = [rows[:, 0] if rows.shape[1] == 1 else rows for rows in prompt.read(name, device)]
        else:
            raise MissingEvidence(f"this method reads {name!r}: give it with `with model.vtprune.using({name}=[...])`")
    return found
