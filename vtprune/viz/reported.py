"""What a report says about every token: who took it, where it was merged, which cut dropped it, in which colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtprune.errors import InvalidOption
from vtprune.types import Part
from vtprune.viz.drawing import DROPPED, OF_CUTS, OF_PICKS, PROTECTED, Colour

_NO_REPORT = "expected a PruneReport, got {}: run the wrapped model first"


class Pruned(Protocol):
    """One picture or clip of a report, like a `SegmentReport`; what merged tokens went `into` is looked for in it."""

    @property
    def parts(self) -> tuple[Part, ...]: ...
    @property
    def keep(self) -> Tensor: ...
    @property
    def taken(self) -> Tensor: ...


class Reported(Protocol):
    """What holds the pictures of a prefill, like a `PruneReport`."""

    @property
    def segments(self) -> Sequence[Pruned]: ...


class Picked(Reported, Protocol):
    @property
    def picks(self) -> tuple[str, ...]: ...


def legend(report: Picked) -> list[tuple[str, Colour]]:
    """What the colours of `overlay(stages=True)` mean, as far as they are in the picture.

    First the picks that took kept tokens; then "protected", where some tokens were; then the cuts between layers.

    Raises:
        InvalidOption: where there is no report.
    """
    if getattr(report, "segments", None) is None:
        raise InvalidOption(_NO_REPORT.format(type(report).__name__))
    there = {number for segment in report.segments for number in segment.taken.tolist()}
    picks = {number: report.picks[number] for number in sorted(there) if number >= 0}
    depths = _depths(report)
    named = []
    for number, name in picks.items():
        twice = list(picks.values()).count(name) > 1
        told = f"{name}, stage {number + 1}" if twice else name
        named.append((f"kept: {told}" if depths else told, OF_PICKS[number % len(OF_PICKS)]))
    protected = [("protected", PROTECTED)] if any(number < 0 for number in there) else []
    cuts = [
        (f"dropped behind layer {depth}" if depth else "dropped before the first layer", OF_CUTS[place % len(OF_CUTS)])
        for place, depth in enumerate(depths)
    ]
    return [*named, *protected, *cuts]


def _depths(report: Reported) -> list[int]:
    """Behind how many layers something was dropped, ascending; none where nothing is cut between layers."""
    found: set[int] = set()
    for segment in report.segments:
        depths: Tensor | None = getattr(segment, "depths", None)
        if depths is not None:
            found |= set(depths.cpu()[torch.from_numpy(stages_of(segment) <= DROPPED)].tolist())
    return sorted(found)


def cuts_of(report: Reported, segment: Pruned) -> NDArray[np.int_]:
    """Which of the cuts of a report dropped every token (n,), -1 of kept ones, and where nothing is cut that way."""
    stages = stages_of(segment)
    depths: Tensor | None = getattr(segment, "depths", None)
    if depths is None:
        return np.full_like(stages, -1)
    cuts = np.searchsorted(_depths(report), depths.cpu().numpy())
    return np.where(stages <= DROPPED, cuts, -1)


def segment_of(report: Reported, segment: int) -> Pruned:
    """One picture or clip of a report. Raises `InvalidOption` where it is not there."""
    segments = getattr(report, "segments", None)
    if segments is None:
        raise InvalidOption(_NO_REPORT.format(type(report).__name__))
    if isinstance(segment, bool) or not isinstance(segment, int) or not 0 <= segment < len(segments):
        there = f"0 to {len(segments) - 1}" if segments else "no picture in this prompt"
        raise InvalidOption(f"segment={segment!r}: the report has {len(segments)} ({there})")
    chosen: Pruned = segments[segment]
    return chosen


def stages_of(segment: Pruned) -> NDArray[np.int_]:
    """Which pick took every token (n,), -1 where it was protected, `DROPPED` where it was dropped."""
    stages = np.full(sum(part.tokens for part in segment.parts), DROPPED)
    stages[segment.keep.cpu().numpy()] = segment.taken.cpu().numpy()
    return stages


def groups_of(segment: Pruned) -> NDArray[np.int_] | None:
    """A number for every group that tokens were merged to, (n,), -1 in none; None where the method does not merge."""
    into: Tensor | None = getattr(segment, "into", None)
    if into is None:
        return None
    holders = into.cpu().numpy()
    _, number, sizes = np.unique(holders, return_inverse=True, return_counts=True)
    swallowed = (holders >= 0) & (stages_of(segment) <= DROPPED)
    merged = np.isin(holders, holders[swallowed]) | (sizes[number] > 1)
    groups = np.where(merged & (holders >= 0), holders, -1)
    ranks = np.unique(groups, return_inverse=True)[1]
    return ranks - int((groups < 0).any())
