"""Cuts between decoder layers, as part of a call: what the hooks on the layers need, and what they leave behind."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache

from vtprune.adapters.base import Host
from vtprune.adapters.decoder import Decoder, decoder_of
from vtprune.cache import CacheState, DeepState, each_once
from vtprune.debiasing import padding_of
from vtprune.errors import UnsupportedCall
from vtprune.inside.caching import trim
from vtprune.inside.glances import MOST_ROWS, rated
from vtprune.inside.layers import LayerCutter, Passage
from vtprune.inside.stacks import Entry, LayerStack
from vtprune.inside.walk import Walk
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.runtime.decide import Decision
from vtprune.runtime.reading import Prompt
from vtprune.runtime.shorten import Shortened
from vtprune.schedule import AnySchedule, ExitSchedule, Schedule
from vtprune.stages.debiasers import BARS
from vtprune.types import Budget

SAMPLED = 64
"""How many rows are looked from at the end of a prompt, and evenly apart in front of that, where a sample will do."""


def schedule_of(pipeline: Pipeline, inner: Host, lm: Host, measured: tuple[str, ...] = ()) -> AnySchedule:
    """The drop points of a pipeline on a model; `measured` names parameters that a calibration brought.

    Raises:
        InvalidOption: for one in front of a layer the model has not, and for rules that were made for another model.
        UnsupportedModel: for a decoder that cannot be cut between layers.
    """
    decoder = _decoder(pipeline, inner, lm)
    depth = len(decoder.layers)
    for glance in pipeline.states.values():
        glance.rule.check(depth=depth, width=lm.config.hidden_size)
    points = [(stage.at, stage.keep) for stage in pipeline.inside if stage.keep is not None]
    if points:
        return Schedule.of(points, depth=depth, first=decoder.first, before=pipeline.before, measured=measured)
    (stage,) = pipeline.inside
    return ExitSchedule.of(stage.at, depth=depth, first=decoder.first, every=stage.every)


def _decoder(pipeline: Pipeline, inner: Host, lm: Host) -> Decoder:
    return decoder_of(inner, lm, glances=bool(pipeline.glances), changes=bool(pipeline.transitions))


def _stages(pipeline: Pipeline, schedule: AnySchedule) -> tuple[LayerStage, ...]:
    """The stage of every drop point; at those of an exit where nobody asks there is no counter."""
    found = [pipeline.inside[number] for number in schedule.stages]
    if isinstance(schedule, ExitSchedule):
        pairs = zip(found, schedule.checks, strict=True)
        found = [stage if checked else replace(stage, counter=None) for stage, checked in pairs]
    return tuple(found)


def _first_picks(pipeline: Pipeline, schedule: AnySchedule) -> tuple[int, ...]:
    """Number of the first pick at every drop point, as `Pipeline.all_picks` counts."""
    counts = (len(pipeline.picks), *(len(stage.picks) for stage in pipeline.inside))
    firsts = tuple(itertools.accumulate(counts))
    return tuple(firsts[number] for number in schedule.stages)


class Deep:
    """The side of a `Pruner` that cuts between layers."""

    def __init__(self, pipeline: Pipeline, budget: Budget, schedule: AnySchedule, inner: Host, lm: Host) -> None:
        self.schedule = schedule
        self.cutter = LayerCutter(
            _decoder(pipeline, inner, lm),
            pipeline,
            schedule.layers,
            lm.config._attn_implementation or "eager",
        )
        self._pipeline = pipeline
        self._budget = budget
        self._stages = _stages(pipeline, schedule)
        self._padding = padding_of(pipeline)
        self._picks = _first_picks(pipeline, schedule)
        self._rows = {glance.rows for glance in pipeline.glances.values()}
        self._rows |= {glance.rows for glance in pipeline.states.values()}

    def prefill(
        self, prompt: Prompt, decision: Decision, short: Shortened, cache: Any, state: CacheState | None
    ) -> None:
        """Let the layers cut in the call that comes now.

        Raises:
            UnsupportedCall: for a static cache, or a prompt without text where the method looks at it.
        """
        check_growing(cache, self._pipeline.name)
        stacks = [self._stack(one, short) for one in decision.chosen]
        entry = entry_of(prompt, decision, short, needs_text=bool(self._rows & {"text", "raters"}))
        walk = Walk(
            stages=self._stages,
            layers=self.schedule.layers,
            depth=self.schedule.depth,
            entry=entry,
            stacks=stacks,
            picks=self._picks,
            trims=self._pipeline.trims and short.arguments.get("use_cache") is not False,
        )
        if "raters" in self._rows:
            walk.entry = rated(entry, short.arguments["inputs_embeds"], walk.visual)
        points = len(self.schedule.layers)
        first, known = known_before(short, state, points=points)
        cached = (0,) * points if known is None else tuple(valid.shape[1] for valid in known)
        padded = state is not None and state.deep is not None and state.deep.padded
        self.cutter.begin(Passage(walk=walk, cached=cached, known=known, known_first=first, padded=padded))

    @property
    def passage(self) -> Passage | None:
        """The call under way."""
        return self.cutter.passage

    def hook(self) -> None:
        """Register the hooks."""
        self.cutter.hook()

    def remove(self) -> None:
        """Undo `hook`."""
        self.cutter.remove()

    def counts(self, n: int) -> tuple[int, ...]:
        """Of `n` tokens of a picture, how many enter the language model and how many stay behind each drop point."""
        return self.schedule.counts(n, self._budget)

    def resume(self, arguments: Mapping[str, Any] | None, state: CacheState | None) -> None:
        """Let the layers mend their masks in a call that cuts nothing, where an earlier one cut between them."""
        begin_later(self.cutter, arguments, state)

    def finish(self, state: CacheState | None, cache: Any) -> Walk | None:
        """What the layers cut, None where they cut nothing; `state` learns what is stored behind each drop point."""
        passage = self.cutter.end()
        walk = None if passage is None else passage.walk
        if passage is None or walk is None:
            return None
        if state is not None and walk.cuts == len(walk.layers):
            if self._pipeline.trims and cache is not None:
                trim(cache, walk, passage.cached)
            blank = walk.valid.new_ones(len(walk.valid), 0)
            known = passage.known or (blank,) * walk.cuts
            valid = each_once(lambda *pair: torch.cat(pair, dim=1), known, tuple(walk.stored))
            ragged = any(len(set(lengths)) > 1 for lengths in walk.lengths)
            state.deep = DeepState(valid=valid, padded=ragged or state.padded or passage.padded)
        return walk

    def _stack(self, one: Any, short: Shortened) -> LayerStack:
        """The tokens of equal units that enter the language model, at their places there."""
        stack, keep = one.stack, one.choice.keep
        at = stack.at.gather(1, keep)
        n = stack.at.shape[1]
        depths = torch.zeros_like(stack.at).scatter(1, keep, self.schedule.depth)
        evidence = dict(stack.tokens.evidence)
        protect = evidence.pop("protect", None)
        if self._padding is not None:
            evidence[BARS] = self._padding.bars(stack.tokens)
        return LayerStack(
            at=short.cut.moved(at),
            origin=keep,
            prompt_rows=one.prompt_rows,
            parts=stack.tokens.parts,
            ordinals=stack.tokens.ordinals,
            evidence={name: value for name, value in evidence.items() if value.shape[:2] == (len(at), n)},
            protect=protect,
            counts=self.counts(n)[1:],
            depths=depths,
            taken=one.choice.stages,
            numbers=tuple(one.numbers),
            into=one.choice.into,
        )


def check_growing(cache: Any, method: str) -> None:
    """Raise `UnsupportedCall` for a static cache."""
    if isinstance(cache, StaticCache):
        raise UnsupportedCall(
            f"method {method!r} stores fewer tokens in some layers, which a static cache has no room for: use the "
            "dynamic cache (the default of generate)"
        )


def known_before(
    short: Shortened, state: CacheState | None, *, points: int
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """Which of the tokens cached before are real, (B, past), in the first layers and behind each of the `points`.

    None where nothing is cached.
    """
    after = short.state.valid
    past = after.shape[1] - short.cut.valid.shape[1]
    if not past:
        return None, None
    first = after[:, :past]
    if state is None or state.deep is None:
        return first, (first,) * points
    tail = after[:, state.valid.shape[1] : past]
    return first, each_once(lambda valid: torch.cat([valid, tail], dim=1), state.deep.valid)


def begin_later(cutter: LayerCutter, arguments: Mapping[str, Any] | None, state: CacheState | None) -> None:
    """Let layers mend their masks in a call that cuts nothing, where they have stored different numbers of tokens."""
    if arguments is None or state is None or state.deep is None:
        return
    new = arguments["inputs_embeds"].shape[1]
    covered, mask = state.valid.shape[1], arguments.get("attention_mask")
    later = state.stored - new - covered
    known = None
    if torch.is_tensor(mask) and mask.ndim == 2:
        tail = mask[:, covered:].bool()
        known = each_once(lambda valid: torch.cat([valid, tail], dim=1), state.deep.valid)
    elif state.deep.padded:
        known = each_once(lambda valid: nn.functional.pad(valid, (0, later + new), value=True), state.deep.valid)
    cutter.begin(Passage(walk=None, cached=state.deep.cached(later), known=known))


def entry_of(prompt: Prompt, decision: Decision, short: Shortened, *, needs_text: bool, sampled: bool = False) -> Entry:
    """The sequence that enters the language model, and where its text behind the last picture is.

    With `sampled`, its rows are the last ones and as many evenly apart in front of them instead.
    """
    layout = prompt.layout
    ends = [0] * len(layout.valid)
    for segment in layout.segments:
        ends[segment.row] = max(ends[segment.row], segment.runs[-1][1])
    found = []
    for number, (valid, end) in enumerate(zip(layout.valid, ends, strict=True)):
        (real,) = valid[: prompt.asked].nonzero()
        behind = real[real >= end]
        if needs_text and end and not len(behind):
            raise UnsupportedCall(
                f"prompt row {number} ends with a picture, and this method looks at the text behind it: ask something "
                "after the picture, or use a method that needs no text"
            )
        text = behind[-MOST_ROWS:] if len(behind) else real[-1:]
        found.append(_sampled(real) if sampled else text)
    width = max(map(len, found))
    rows = np.array([np.pad(own, (width - len(own), 0), mode="edge") for own in found])
    filled = np.array([[place >= width - len(own) for place in range(width)] for own in found])
    device = short.cut.valid.device
    places = torch.from_numpy(rows).to(device, non_blocking=True)
    return Entry(
        valid=short.cut.valid,
        lengths=decision.row_lengths,
        left_padded=short.cut.left_padded,
        rows=short.cut.slots.gather(1, places),
        real=torch.from_numpy(filled).to(device, non_blocking=True),
    )


def _sampled(real: np.ndarray) -> np.ndarray:
    """The last `SAMPLED` of the places of a prompt, and as many evenly apart in front of them."""
    front, last = real[:-SAMPLED], real[-SAMPLED:]
    even = np.linspace(0, max(len(front) - 1, 0), min(SAMPLED, len(front)))
    return np.concatenate([front[(even + 0.5).astype(int)], last])
