"""Writing the report of a prefill."""

from __future__ import annotations

from torch import Tensor

from vtprune.pipeline import Pipeline
from vtprune.report import PruneReport, SegmentReport, Stopwatch
from vtprune.runtime.decide import Decision
from vtprune.runtime.evidence import Given, readings_of
from vtprune.runtime.reading import Prompt


def report_of(
    prompt: Prompt | None,
    decision: Decision | None,
    embeds: Tensor,
    *,
    given: Given | None,
    pipeline: Pipeline,
    family: str,
    backend: str,
    positions: str,
    kv_bytes_per_element: int,
    stopwatch: Stopwatch,
) -> PruneReport:
    """The report of a prefill; without a prompt and a decision that of one without pictures, padding counted in."""
    B, L = embeds.shape[:2]
    before = after = (L,) * B
    stored = L
    segments: tuple[SegmentReport, ...] = ()
    sources: set[str] = set()
    if prompt is not None and decision is not None:
        before, after = prompt.layout.row_lengths, decision.row_lengths
        stored = L if before == after else decision.size
        nothing = (None,) * len(decision.stages)
        segments = tuple(
            SegmentReport(row=segment.row, kind=segment.kind, parts=segment.parts, stages=stages, into=into, held=held)
            for segment, stages, into, held in zip(
                prompt.layout.segments, decision.stages, decision.into or nothing, decision.held or nothing, strict=True
            )
        )
        readings = readings_of(pipeline)
        if given is not None and readings.keys() & given.values.keys():
            sources = {"given"}
        else:
            sources = {
                reading.source(entry.has_cls)
                for entry in prompt.encoded.values()
                for name, reading in readings.items()
                if name in entry.readings
            }
        for entry in prompt.encoded.values():
            stopwatch.absorb(entry.stopwatch)
    return PruneReport(
        method=pipeline.name,
        family=family,
        backend=backend,
        positions=positions,
        importance=", ".join(sorted(sources)) or None,
        picks=tuple(pick.name for pick in pipeline.picks),
        segments=segments,
        length_before=before,
        length_after=after,
        kv_bytes_saved=B * (L - stored) * kv_bytes_per_element * embeds.itemsize,
        stopwatch=stopwatch,
        adaptive=pipeline.counter is not None,
        sound=None if decision is None else decision.sound,
    )
