"""From a prompt to a decision: gather the evidence, run the pipeline on stacks of equal units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vtprune.errors import MissingEvidence, UnsupportedCall
from vtprune.kernels import host
from vtprune.kernels import reference as kernels
from vtprune.pipeline import Pipeline
from vtprune.report import DROPPED, PROTECTED
from vtprune.runtime.encoder_cut import HOLDERS
from vtprune.runtime.evidence import Forced, Given, forced_tokens, readings_of
from vtprune.runtime.reading import Prompt
from vtprune.runtime.segments import Holders, holders_per_segment, per_segment
from vtprune.runtime.stacking import Stack, Stacker, soundness, stacks_of
from vtprune.runtime.units import Unit, make_units, split_unit
from vtprune.types import Budget, Layout, Merged, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What became of a stack: `stages` (S, N), `keep` (S, K), `into` (S, N) where the method merges.

    `merged` is what came of it, None where all tokens stay or it happened inside the encoder; `sound` see `soundness`.
    """

    stages: Tensor
    keep: Tensor
    into: Tensor | None = None
    merged: Merged | None = None
    sound: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The choice of one stack, made of the units of these numbers, which lie in these rows of the prompt."""

    numbers: list[int]
    prompt_rows: tuple[int, ...]
    stack: Stack
    choice: Choice


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What stays: `kept` (B, L) bool, at most `size` a row; `stages` (n,) per segment, -2 where dropped.

    `merged` are rows (m, D) that take the place of tokens, each with where they are, (m,), counted through all B * L.
    `into` (n,) per segment says which of its tokens swallowed each one, counted through all pictures where they share
    one budget, and `held` (n,) how many live in each; empty where nothing is merged. `sound` is False where what was
    chosen by is not finite; None where that was looked at already.
    """

    kept: Tensor
    size: int
    row_lengths: tuple[int, ...]
    stages: tuple[Tensor, ...]
    merged: tuple[tuple[Tensor, Tensor], ...] = ()
    into: tuple[Tensor, ...] = ()
    held: tuple[Tensor, ...] = ()
    sound: Tensor | None = None
    chosen: tuple[Chosen, ...] = ()
    units: tuple[Unit, ...] = ()

    def per_segment(self, of_units: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Of one (N,) for each unit, one (n,) per segment."""
        return per_segment(self.units, of_units, len(self.stages))

    def holders(self, into: Holders) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """`into` and `held` of these holders of the tokens of its units; both empty where nothing merges."""
        return holders_per_segment(self.units, into, len(self.stages))


def decide(
    prompt: Prompt,
    embeds: Tensor,
    *,
    pipeline: Pipeline,
    budget: Budget,
    given: Given | None,
    counts: Callable[[int], tuple[int, ...]] | None = None,
) -> Decision:
    """Run the pipeline on every stack of equal units; counts are known from shapes, nothing waits for the device.

    Args:
        embeds: (B, L, D), what the language model is about to get.
        given: evidence from the user.
        counts: where cuts lie between layers, how many of n tokens enter the language model and stay behind each cut.

    Raises:
        UnsupportedCall: on the CPU where features or evidence hold NaN or infinity; elsewhere `Decision.sound` says so.
    """
    layout = prompt.layout
    units = make_units(layout, budget, prompt.seen)
    if counts is not None:
        units = [replace(unit, k=counts(len(unit.at))[0]) for unit in units]
    if not budget.keeps_all:
        _check_evidence_fits(pipeline, given)

    def cuts(unit: Unit) -> tuple[int, ...]:
        every = (unit.k,) if counts is None else counts(len(unit.at))
        return every if pipeline.picks else every[1:] or every

    forced = forced_tokens(units, given, layout, cuts)
    adaptive = pipeline.counter is not None and not budget.keeps_all
    deep = bool(pipeline.inside) and not budget.keeps_all
    pruned = adaptive or deep or any(unit.k < len(unit.at) for unit in units)
    scores = _evidence(prompt, pipeline, given, embeds.device) if pruned else {}
    stacker = Stacker(embeds=embeds, scores=scores, survivors=pipeline.survivors)
    if adaptive:
        units = _counted(pipeline, budget, units, forced, stacker)
    if pruned and pipeline.frames is not None:
        units = _shared(pipeline, units, stacker)
        forced = forced_tokens(units, given, layout, cuts)
    chosen = []
    for numbers in stacks_of(units, forced):
        stack = stacker.stack([units[number] for number in numbers], [forced[number] for number in numbers])
        rows = tuple(units[number].row for number in numbers)
        chosen.append(Chosen(numbers=numbers, prompt_rows=rows, stack=stack, choice=_choose(pipeline, stack)))
    return _collected(layout, units, chosen, embeds.device)


def _collected(layout: Layout, units: list[Unit], chosen: list[Chosen], device: torch.device) -> Decision:
    """What was chosen of every stack, brought back to rows and segments."""
    base = layout.valid.copy()
    for unit in units:
        base.reshape(-1)[unit.at] = False
    row_lengths = [int(np.count_nonzero(row)) for row in base]
    for unit in units:
        row_lengths[unit.row] += unit.k
    kept = torch.from_numpy(base).to(device, non_blocking=True)
    stages: dict[int, Tensor] = {}
    merged: list[tuple[Tensor, Tensor]] = []
    for one in chosen:
        at, choice = one.stack.at, one.choice
        kept.view(-1).scatter_(0, at.view(-1), (choice.stages > DROPPED).view(-1))
        stages.update(zip(one.numbers, choice.stages.unbind(), strict=True))
        if choice.merged is not None:
            merged.append((choice.merged.rows.flatten(0, 1), at.gather(1, choice.keep).flatten()))
    sound = [flag for one in chosen for flag in one.choice.sound]
    count = len(layout.segments)
    holders = [(one.numbers, one.choice.into) for one in chosen if one.choice.into is not None]
    into, held = holders_per_segment(units, holders, count)
    return Decision(
        kept=kept,
        size=max(row_lengths),
        row_lengths=tuple(row_lengths),
        stages=per_segment(units, stages, count),
        merged=tuple(merged),
        into=into,
        held=held,
        sound=torch.stack(sound).all() if sound else None,
        chosen=tuple(chosen),
        units=tuple(units),
    )


def _check_evidence_fits(pipeline: Pipeline, given: Given | None) -> None:
    """Raise `UnsupportedCall` where tokens are forced that nobody can: patches are gone already, or stored by heads."""
    if pipeline.cache is not None and given is not None and {"protect", "forbid"} & given.values.keys():
        raise UnsupportedCall(f"using(...): method {pipeline.name!r} cuts the cache, where no token can be forced")
    if pipeline.encoder is None or given is None:
        return
    if {"protect", "forbid", pipeline.survivors} & given.values.keys():
        raise UnsupportedCall(
            f"using(...): method {pipeline.name!r} prunes inside the encoder, before a token can be forced in or out"
        )


def _counted(
    pipeline: Pipeline, budget: Budget, units: list[Unit], forced: list[Forced], stacker: Stacker
) -> list[Unit]:
    """The units with as many tokens as an adaptive method wants, floor and forced ones at least."""
    found = dict(enumerate(units))
    for numbers in stacks_of(units, forced):
        stack = stacker.stack([units[number] for number in numbers], [forced[number] for number in numbers])
        with torch.no_grad(), kernels.exact(stack.at.device):
            counts = host.read_counts(pipeline.count(stack.tokens, stack.k))
        for number, count in zip(numbers, counts, strict=True):
            least = max(budget.floor, len(forced[number].protect))
            found[number] = replace(units[number], k=min(stack.k, max(least, count)))
    return list(found.values())


def _shared(pipeline: Pipeline, units: list[Unit], stacker: Stacker) -> list[Unit]:
    """A unit for every part of those that have several, with its share of the budget."""
    found: list[Unit] = []
    for numbers in stacks_of(units, [Forced()] * len(units)):
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


def _choose(pipeline: Pipeline, stack: Stack) -> Choice:
    """Run the pipeline on one stack; only merged rows are differentiable."""
    stages = torch.full(stack.at.shape, DROPPED, device=stack.at.device)
    if stack.k == stack.at.shape[1]:
        own = torch.arange(stack.k, device=stack.at.device).expand(stack.at.shape)
        sound = soundness(stack.tokens) if pipeline.inside or pipeline.cache or pipeline.attention else ()
        stages.zero_()
        if "protect" in stack.tokens.evidence:
            stages.scatter_(1, stack.tokens.evidence["protect"], PROTECTED)
        return Choice(stages=stages, keep=own, into=own if pipeline.merges else None, sound=sound)
    sound = soundness(stack.tokens)
    with kernels.exact(stack.at.device):
        with torch.no_grad():
            selection = pipeline.run(stack.tokens, stack.k)
        merged = pipeline.merge(stack.tokens, selection) if stack.k else None
    stages = stages.scatter_(1, selection.keep, selection.taken)
    into = _into(pipeline, stack.tokens, stages, selection, merged)
    return Choice(stages=stages, keep=selection.keep, into=into, merged=merged, sound=sound)


def _into(
    pipeline: Pipeline, tokens: VisualTokens, stages: Tensor, selection: Selection, merged: Merged | None
) -> Tensor | None:
    """The token (S, N) that took each over, inside the encoder or behind it; None where the method never merges."""
    if pipeline.encoder is not None:
        return _holders(stages, tokens.evidence[HOLDERS])
    if not pipeline.merges:
        return None
    lost = torch.full_like(stages, -1)
    if merged is None:
        return lost.scatter(1, selection.keep, selection.keep)
    return selection.keep.gather(1, merged.into.clamp(min=0)).masked_fill(merged.into < 0, -1)


def _holders(stages: Tensor, steps: Tensor) -> Tensor:
    """Of steps (S, N) from each token to the one that holds it, the holders; -1 where those or it are gone."""
    own = torch.arange(stages.shape[1], device=stages.device).expand_as(stages)
    into = own + steps.long()
    lives = ((stages > DROPPED) | (into != own)) & (stages.gather(1, into) > DROPPED)
    return into.masked_fill(~lives, -1)


def _evidence(prompt: Prompt, pipeline: Pipeline, given: Given | None, device: torch.device) -> dict[str, list[Tensor]]:
    """Everything the pipeline reads, per segment: (n,), or (n, C) where a row has several numbers."""
    found: dict[str, list[Tensor]] = {}
    readings = readings_of(pipeline)
    if pipeline.encoder is not None:
        found[HOLDERS] = [rows[:, 0] for rows in prompt.read(HOLDERS, device)]
    for name in pipeline.asked:
        if given is not None and name in given.values:
            found[name] = given.scores(name, prompt.layout, device)
        elif name in readings:
            found[name] = [rows[:, 0] if rows.shape[1] == 1 else rows for rows in prompt.read(name, device)]
        else:
            raise MissingEvidence(f"this method reads {name!r}: give it with `with model.vtprune.using({name}=[...])`")
    return found
