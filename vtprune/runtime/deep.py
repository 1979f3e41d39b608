"""Cuts between decoder layers, as part of a call: what the hooks on the layers need, and what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache

from vtprune.adapters.base import Host
from vtprune.adapters.decoder import decoder_of
from vtprune.cache import CacheState, DeepState
from vtprune.errors import UnsupportedCall
from vtprune.inside.glances import MOST_ROWS, find_raters
from vtprune.inside.layers import LayerCutter, Passage
from vtprune.inside.walk import Entry, LayerStack, Walk
from vtprune.pipeline import Pipeline
from vtprune.runtime.decide import Decision
from vtprune.runtime.reading import Prompt
from vtprune.runtime.shorten import Shortened
from vtprune.schedule import Schedule
from vtprune.types import Budget


def schedule_of(pipeline: Pipeline, inner: Host, lm: nn.Module, measured: tuple[str, ...] = ()) -> Schedule:
    """The drop points of a pipeline on a model; `measured` names parameters that a calibration brought.

    Raises:
        InvalidOption: for one in front of a layer the model has not.
        UnsupportedModel: for a decoder that cannot be cut between layers.
    """
    decoder = decoder_of(inner, lm, glances=bool(pipeline.glances))
    points = [(stage.at, stage.keep) for stage in pipeline.inside]
    return Schedule.of(
        points, depth=len(decoder.layers), first=decoder.first, before=pipeline.before, measured=measured
    )


class Deep:
    """The side of a `Pruner` that cuts between layers."""

    def __init__(self, pipeline: Pipeline, budget: Budget, schedule: Schedule, inner: Host, lm: Host) -> None:
        self.schedule = schedule
        self.cutter = LayerCutter(
            decoder_of(inner, lm, glances=bool(pipeline.glances)),
            pipeline,
            schedule.layers,
            lm.config._attn_implementation or "eager",
        )
        self._pipeline = pipeline
        self._budget = budget
        self._rows = {glance.rows for glance in pipeline.glances.values()}

    def prefill(
        self, prompt: Prompt, decision: Decision, short: Shortened, cache: Any, state: CacheState | None
    ) -> None:
        """Let the layers cut in the call that comes now.

        Raises:
            UnsupportedCall: for a static cache, or a prompt without text where the method looks at it.
        """
        if isinstance(cache, StaticCache):
            raise UnsupportedCall(
                f"method {self._pipeline.name!r} stores fewer tokens in later layers, which a static cache has no "
                "room for: use the dynamic cache (the default of generate)"
            )
        stacks = [self._stack(one, short) for one in decision.chosen]
        entry = _entry(prompt, decision, short, needs_text=bool(self._rows & {"text", "raters"}))
        walk = Walk(
            stages=tuple(self._pipeline.inside[number] for number in self.schedule.stages),
            layers=self.schedule.layers,
            depth=self.schedule.depth,
            entry=entry,
            stacks=stacks,
        )
        if "raters" in self._rows:
            raters = find_raters(short.arguments["inputs_embeds"], entry.rows, entry.real, walk.visual)
            walk.entry = replace(entry, raters=raters)
        after = short.state.valid
        past = after.shape[1] - walk.valid.shape[1]
        points = len(self.schedule.layers)
        first = after[:, :past] if past else None
        known: tuple[Tensor, ...] | None = None if first is None else (first,) * points
        if state is not None and state.deep is not None:
            tail = after[:, state.valid.shape[1] : past]
            known = tuple(torch.cat([valid, tail], dim=1) for valid in state.deep.valid)
        cached = (0,) * points if known is None else tuple(valid.shape[1] for valid in known)
        padded = state is not None and state.deep is not None and state.deep.padded
        self.cutter.begin(Passage(walk=walk, cached=cached, known=known, known_first=first, padded=padded))

    def before(self, n: int) -> int:
        """Of `n` tokens of a picture, how many enter the language model."""
        return self.schedule.counts(n, self._budget)[0]

    def resume(self, arguments: Mapping[str, Any] | None, state: CacheState | None) -> None:
        """Let the layers mend their masks in a call that cuts nothing, where an earlier one cut between them."""
        if arguments is None or state is None or state.deep is None:
            return
        new = arguments["inputs_embeds"].shape[1]
        stored = state.stored - new
        covered, mask = state.valid.shape[1], arguments.get("attention_mask")
        later = stored - covered
        known = None
        if torch.is_tensor(mask) and mask.ndim == 2:
            tail = mask[:, covered:].bool()
            known = tuple(torch.cat([valid, tail], dim=1) for valid in state.deep.valid)
        elif state.deep.padded:
            known = tuple(nn.functional.pad(valid, (0, later + new), value=True) for valid in state.deep.valid)
        self.cutter.begin(Passage(walk=None, cached=state.deep.cached(later), known=known))

    def finish(self, state: CacheState | None) -> Walk | None:
        """What the layers cut, None where they cut nothing; `state` learns what is stored behind each drop point."""
        passage = self.cutter.end()
        walk = None if passage is None else passage.walk
        if passage is None or walk is None:
            return None
        if state is not None and walk.cuts == len(walk.layers):
            blank = walk.valid.new_ones(len(walk.valid), 0)
            known = passage.known or (blank,) * walk.cuts
            valid = tuple(torch.cat(pair, dim=1) for pair in zip(known, walk.stored, strict=True))
            ragged = any(len(set(lengths)) > 1 for lengths in walk.lengths)
            state.deep = DeepState(valid=valid, padded=ragged or state.padded or passage.padded)
        return walk

    def _stack(self, one: Any, short: Shortened) -> LayerStack:
        """The tokens of equal units that enter the language model, at their places there."""
        stack, keep = one.stack, one.choice.keep
        L, K = short.cut.slots.shape[1], short.cut.valid.shape[1]
        at = stack.at.gather(1, keep)
        n = stack.at.shape[1]
        depths = torch.zeros_like(stack.at).scatter(1, keep, self.schedule.depth)
        return LayerStack(
            at=at // L * K + short.cut.slots.reshape(-1)[at],
            origin=keep,
            prompt_rows=one.prompt_rows,
            parts=stack.tokens.parts,
            ordinals=stack.tokens.ordinals,
            evidence={name: value for name, value in stack.tokens.evidence.items() if value.shape[:2] == (len(at), n)},
            counts=self.schedule.counts(n, self._budget)[1:],
            depths=depths,
            numbers=tuple(one.numbers),
        )


def _entry(prompt: Prompt, decision: Decision, short: Shortened, *, needs_text: bool) -> Entry:
    """The sequence that enters the language model, and where its text behind the last picture is."""
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
        found.append(behind[-MOST_ROWS:] if len(behind) else real[-1:])
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
