"""Cuts of the KV cache alone, as part of a call: what the hooks on attention need, and what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vtprune._needs import NOTHING
from vtprune.adapters.base import Host
from vtprune.adapters.decoder import decoder_of
from vtprune.cache import CacheState, DeepState, each_once
from vtprune.inside.caching import CacheCutter
from vtprune.inside.glances import rated
from vtprune.inside.keeping import CachedStack, Keeping
from vtprune.inside.layers import LayerCutter, Passage
from vtprune.pipeline import Pipeline
from vtprune.runtime.decide import Decision
from vtprune.runtime.deep import Deep, begin_later, check_growing, entry_of, known_before
from vtprune.runtime.reading import Prompt
from vtprune.runtime.shorten import Shortened
from vtprune.schedule import AnySchedule
from vtprune.types import Budget


class Caching:
    """The side of a `Pruner` that lets all tokens pass and stores fewer.

    Where layers store different numbers of tokens, masks of later calls are mended for each of them.
    """

    def __init__(self, pipeline: Pipeline, budget: Budget, inner: Host, lm: Host) -> None:
        assert pipeline.cache is not None
        decoder = decoder_of(inner, lm, glances=True)
        implementation = lm.config._attn_implementation or "eager"
        self._pipeline = pipeline
        self._stage = pipeline.cache
        self._budget = budget
        self._rows = {glance.rows for glance in self._stage.choice.glances.values()}
        self._cutter = CacheCutter(decoder, self._stage, implementation)
        self._mender = LayerCutter(decoder, NOTHING, tuple(range(1, len(decoder.layers))), implementation)

    passage: None = None
    """Nothing is cut between layers."""

    def hook(self) -> None:
        """Register the hooks."""
        self._cutter.hook()
        self._mender.hook()

    def remove(self) -> None:
        """Undo `hook`."""
        self._cutter.remove()
        self._mender.remove()

    def counts(self, n: int) -> tuple[int, ...]:
        """Of `n` tokens of a picture, how many enter the language model: all."""
        return (n,)

    def prefill(
        self, prompt: Prompt, decision: Decision, short: Shortened, cache: Any, state: CacheState | None
    ) -> None:
        """Let the layers store less in the call that comes now.

        Raises:
            UnsupportedCall: for a static cache, or a prompt without text where the method looks at it.
        """
        check_growing(cache, self._pipeline.name)
        needs_text = bool(self._rows & {"text", "raters"})
        entry = entry_of(prompt, decision, short, needs_text=needs_text, sampled="sampled" in self._rows)
        first, known = known_before(short, state, points=self._mender.points)
        keeping = Keeping(
            stage=self._stage,
            entry=entry,
            stacks=[self._stack(one, short) for one in decision.chosen],
            known=None if known is None or first is None else (first, *known),
        )
        if "raters" in self._rows:
            keeping.entry = rated(entry, short.arguments["inputs_embeds"], keeping.visual)
        self._cutter.begin(keeping)
        if known is not None and state is not None and state.deep is not None and not self._stage.sparse:
            own = short.cut.valid
            real = each_once(lambda valid: torch.cat([valid, own], dim=1), known)
            cached = tuple(valid.shape[1] for valid in known)
            self._mender.begin(Passage(walk=None, cached=cached, known=real))

    def resume(self, arguments: Mapping[str, Any] | None, state: CacheState | None) -> None:
        """Let the layers mend their masks in a call without pictures, where they have stored different numbers."""
        begin_later(self._mender, arguments, state)

    def finish(self, state: CacheState | None, cache: Any) -> Keeping | None:
        """What the layers stored, None where nothing was chosen; `state` learns it."""
        self._mender.end()
        keeping = self._cutter.end()
        if keeping is None or state is None or len(keeping.kept) != self._mender.points + 1:
            return keeping
        first = keeping.kept[0]
        gone = keeping.valid.shape[1] - first.valid.shape[1]
        stored = [
            one.valid if keeping.known is None else torch.cat([keeping.known[layer], one.valid], dim=1)
            for layer, one in enumerate(keeping.kept)
        ]
        ragged = any(len(set(one.lengths)) > 1 for one in keeping.kept)
        state.padded = state.padded or ragged
        state.removed, state.stored = state.removed + gone, state.stored - gone
        state.cut_length, state.valid = state.cut_length - gone, stored[0]
        if self._pipeline.adaptive:
            state.deep = DeepState(valid=tuple(stored[1:]), padded=state.padded)
        return keeping

    def _stack(self, one: Any, short: Shortened) -> CachedStack:
        """The tokens of equal units, at their places in the call."""
        stack = one.stack
        return CachedStack(
            at=short.cut.moved(stack.at),
            prompt_rows=one.prompt_rows,
            parts=stack.tokens.parts,
            ordinals=stack.tokens.ordinals,
            numbers=tuple(one.numbers),
            count=self._budget.resolve(stack.at.shape[1]),
        )


def inside_of(
    pipeline: Pipeline, budget: Budget, schedule: AnySchedule | None, inner: Host, lm: Host
) -> Deep | Caching | None:
    """What hooks the decoder layers of a pipeline that asks for it, None for any other and where everything is kept."""
    if schedule is not None:
        return Deep(pipeline, budget, schedule, inner, lm)
    return None if pipeline.cache is None or budget.keeps_all else Caching(pipeline, budget, inner, lm)
