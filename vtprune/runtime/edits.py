"""What looks at decoder layers, or changes attention in them, besides cuts: one door for the `Pruner`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtprune.adapters.base import Host
from vtprune.cache import CacheState
from vtprune.inside.layers import Passage
from vtprune.pipeline import Pipeline
from vtprune.runtime.calls import Call
from vtprune.runtime.heads import Heads
from vtprune.runtime.shorten import Cut
from vtprune.runtime.sinks import Sinks
from vtprune.schedule import AnySchedule


class Edits:
    """Sinks and heads of one pipeline; with nothing to do it does nothing."""

    def __init__(self, pipeline: Pipeline, schedule: AnySchedule | None, inner: Host, lm: Host, owner: str) -> None:
        self._sinks = Sinks(pipeline, schedule, inner, lm, owner)
        self._heads = Heads(pipeline, inner, lm)

    def hook(self) -> None:
        """Register the hooks, behind those that cut between layers."""
        self._sinks.hook()
        self._heads.hook()

    def remove(self) -> None:
        """Undo `hook`."""
        self._sinks.remove()
        self._heads.remove()

    def prefill(
        self, call: Call, given: Mapping[str, Any], cut: Cut | None = None, passage: Passage | None = None
    ) -> None:
        """In a call with pictures, which was shortened by `cut` and is cut on in a `passage`."""
        self._sinks.prefill(call, given, cut, passage)
        self._heads.prefill(call, given, cut, passage)

    def resume(self, call: Call, given: Mapping[str, Any]) -> None:
        """In a call without pictures."""
        self._sinks.resume(call, given)

    def finish(self, state: CacheState | None, *, done: bool) -> None:
        """Leave later calls alone; `state` learns what is to be remembered, but not where the call raised."""
        self._heads.finish(done=done)
        self._sinks.finish(state, done=done)
