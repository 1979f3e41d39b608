"""Writing the report of a prefill."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vtprune.estimates import Shape, kv_bytes_per_token, prefill_flops
from vtprune.inside.keeping import Keeping
from vtprune.inside.walk import Walk
from vtprune.pipeline import Pipeline
from vtprune.report import DROPPED, PruneReport, SegmentReport
from vtprune.runtime.calls import Call
from vtprune.runtime.decide import Decision
from vtprune.runtime.evidence import Given, readings_of
from vtprune.runtime.reading import Prompt


class Reports:
    """Writes the report of every prefill; `history` remembers the last ones."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: Any,
        *,
        family: str,
        positions: str,
        history: int,
        on_report: Callable[[PruneReport], None] | None,
    ) -> None:
        self.history: deque[PruneReport] = deque(maxlen=history)
        self._pipeline = pipeline
        self._family = family
        self._positions = positions
        self._on_report = on_report
        self._layers = int(config.num_hidden_layers)
        self._kv_bytes = kv_bytes_per_token(config, 1)
        self._shape = Shape.of(config) if hasattr(config, "intermediate_size") else None

    def publish(
        self,
        call: Call,
        embeds: Tensor,
        decision: Decision | None = None,
        *,
        given: Given | None = None,
        passed: Walk | Keeping | None = None,
    ) -> None:
        """Write the report of a prefill; without a prompt and a decision that of one without pictures, padding counted
        in. `passed` is what was cut between decoder layers, or of their caches."""
        report = self._report(call, embeds, decision, given, passed)
        self.history.append(report)
        if self._on_report is not None:
            self._on_report(report)

    def _report(
        self,
        call: Call,
        embeds: Tensor,
        decision: Decision | None,
        given: Given | None,
        passed: Walk | Keeping | None,
    ) -> PruneReport:
        B, L = embeds.shape[:2]
        prompt = call.prompt
        walk = passed if isinstance(passed, Walk) else None
        before = after = (L,) * B
        stored: float = L
        segments: tuple[SegmentReport, ...] = ()
        if prompt is not None and decision is not None:
            before, after = prompt.layout.row_lengths, decision.row_lengths
            stored = L if before == after else decision.size
            if passed is not None:
                stored = passed.average_stored
            if walk is not None:
                after = walk.lengths[-1]
            segments = _segments(prompt, decision, passed)
            for entry in prompt.encoded.values():
                call.stopwatch.absorb(entry.stopwatch)
                call.use.absorb(entry.use)
        edit = self._pipeline.attention
        return PruneReport(
            method=self._pipeline.name,
            family=self._family,
            backend=str(call.use),
            positions=self._positions,
            importance=", ".join(sorted(_sources(prompt, self._pipeline, given))) or None,
            attention=None if edit is None or edit.neutral else edit.name,
            picks=tuple(pick.name for pick in self._pipeline.all_picks) or ("all",),
            segments=segments,
            length_before=before,
            length_after=after,
            kv_bytes_saved=round(B * (L - stored) * self._kv_bytes * embeds.itemsize),
            layers=self._layers,
            flops_before=self._flops(before, None),
            flops_after=self._flops(after, walk),
            patches=_patches(prompt),
            stopwatch=call.stopwatch,
            adaptive=self._pipeline.adaptive,
            sound=None if decision is None else decision.sound,
        )

    def _flops(self, lengths: tuple[int, ...], walk: Walk | None) -> int:
        """Estimate for rows of these lengths, or of those of a walk from layer to layer; 0 elsewhere."""
        if self._shape is None:
            return 0
        of_layers = [lengths] * self._layers if walk is None else walk.lengths_of_layers
        return sum(prefill_flops(self._shape, row) for row in zip(*of_layers, strict=True))


def _segments(prompt: Prompt, decision: Decision, passed: Walk | Keeping | None) -> tuple[SegmentReport, ...]:
    walk = passed if isinstance(passed, Walk) else None
    nothing = (None,) * len(decision.stages)
    depths = nothing if walk is None else decision.per_segment(walk.depths)
    cached = nothing if passed is None or passed.cached is None else decision.per_segment(passed.cached)
    into, held = (decision.into, decision.held) if walk is None else decision.holders(walk.into)
    taken = decision.stages if walk is None else decision.per_segment(walk.taken)
    columns = (taken, into or nothing, held or nothing, depths, cached)
    return tuple(
        SegmentReport(
            row=segment.row,
            kind=segment.kind,
            parts=segment.parts,
            stages=stages if walk is None or depth is None else stages.masked_fill(depth < walk.depth, DROPPED),
            into=into,
            held=held,
            depths=depth,
            cached=stored,
        )
        for segment, stages, into, held, depth, stored in zip(prompt.layout.segments, *columns, strict=True)
    )


def _sources(prompt: Prompt | None, pipeline: Pipeline, given: Given | None) -> set[str]:
    """Where the evidence of the vision encoder came from."""
    readings = readings_of(pipeline)
    if given is not None and readings.keys() & given.values.keys():
        return {"given"} if prompt is not None else set()
    return {
        reading.source(entry.has_cls)
        for entry in (() if prompt is None else prompt.encoded.values())
        for name, reading in readings.items()
        if name in entry.names
    }


def _patches(prompt: Prompt | None) -> tuple[int, ...]:
    """Patches left after each block of the encoder; empty where nothing was cut there."""
    entries = () if prompt is None else prompt.encoded.values()
    return next((entry.patches for entry in entries if entry.cut is not None), ())
