"""A picture or clip with what was kept of it, or with scores, from a report alone."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vtprune.errors import InvalidOption
from vtprune.types import Part
from vtprune.viz.drawing import (
    DROPPED,
    OF_PICKS,
    PROTECTED,
    Colour,
    canvas_of,
    frame_picks,
    hatch_unseen,
    heated,
    kept_and_dropped,
    outline_groups,
    side_by_side,
)
from vtprune.viz.framing import Box
from vtprune.viz.placing import checked_framing, panels_of

_SMALL = 384
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


class _Picked(Reported, Protocol):
    @property
    def picks(self) -> tuple[str, ...]: ...


def overlay(
    report: Reported,
    image: Image.Image | Sequence[Image.Image],
    segment: int = 0,
    *,
    dim: float = 0.25,
    upscale: int | None = None,
    stages: bool = False,
    groups: bool = False,
    framing: Box | None = None,
) -> Image.Image:
    """The picture with kept patches as they are and dropped ones in dim greys, which differ from kept dark ones.

    A segment of several parts is drawn as panels side by side: thumbnail, crops (on the whole picture), frames. Tiles
    are put together in the arrangement that suits the shape of the picture best.

    Args:
        report: a `PruneReport`, for example `model.vtprune.last`.
        image: the picture of that segment; for a clip its frames, a whole multiple of the frames the model encodes.
        segment: which picture or clip of the report.
        dim: how much is left of dropped patches, 0 (one dark grey) to 1 (as they are).
        upscale: whole factor by which pixels are repeated; by default small pictures grow to about 384 pixels.
        stages: frame each kept patch in the colour of the pick that took it: orange, blue, green, pink in the order of
            `report.picks`, white where the user protected it (`legend`).
        groups: outline the tokens that were merged into one, each group in its own colour; nothing where the method
            does not merge.
        framing: the box of the picture that the encoder saw (`framing_of`), all of it by default. The rest is drawn
            dark and hatched.

    Raises:
        InvalidOption: for a report without that segment, an option out of range, or pictures that do not fit the parts.
    """
    chosen = segment_of(report, segment)
    check_dim(dim)
    _check_upscale(upscale)
    taken, joined = stages_of(chosen), _groups_of(chosen)
    panels = panels_of(chosen.parts, image)
    drawn = []
    for picture, grid in panels:
        box = checked_framing(picture.size, framing)
        canvas = canvas_of(picture, grid.shape, box, upscale or _default_upscale(picture, len(panels)))
        pixels = kept_and_dropped(canvas, taken[grid], dim)
        if groups and joined is not None:
            pixels = outline_groups(pixels, canvas, joined[grid], taken[grid])
        if stages:
            pixels = frame_picks(pixels, canvas, taken[grid])
        drawn.append(Image.fromarray(hatch_unseen(pixels, canvas)))
    return side_by_side(drawn)


def heatmap(
    scores: Tensor,
    report: Reported,
    image: Image.Image | Sequence[Image.Image],
    segment: int = 0,
    *,
    framing: Box | None = None,
    upscale: int | None = None,
) -> Image.Image:
    """Scores of tokens over the picture in greys: dark violet for the lowest, yellow for the highest.

    Panels are those of `overlay`, and the scale is one for all of them. Equal scores are drawn in its middle, infinite
    ones at its ends; a token whose score is NaN gets no colour.

    Args:
        scores: (n,) one number for every token of the segment, separators left out.
        report: a `PruneReport`.
        image: the picture of that segment, or the frames of the clip.
        segment: which picture or clip of the report.
        framing: the box of the picture that the encoder saw (`framing_of`), all of it by default.
        upscale: whole factor by which pixels are repeated; by default small pictures grow to about 384 pixels.

    Raises:
        InvalidOption: for scores of another shape, and where `overlay` raises it.
    """
    chosen = segment_of(report, segment)
    _check_upscale(upscale)
    tokens = sum(part.tokens for part in chosen.parts)
    if not isinstance(scores, Tensor) or scores.shape != (tokens,) or scores.is_complex():
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InvalidOption(f"scores: got {got}, expected a tensor ({tokens},): one real number for every token")
    levels = _levels(scores.detach().cpu().double().numpy())
    panels = panels_of(chosen.parts, image)
    drawn = []
    for picture, grid in panels:
        box = checked_framing(picture.size, framing)
        canvas = canvas_of(picture, grid.shape, box, upscale or _default_upscale(picture, len(panels)))
        drawn.append(Image.fromarray(hatch_unseen(heated(canvas, levels[grid]), canvas)))
    return side_by_side(drawn)


def legend(report: _Picked) -> list[tuple[str, Colour]]:
    """Names of the picks with the colours in which `overlay(stages=True)` frames what they took.

    "protected" comes last, where some tokens were.

    Raises:
        InvalidOption: where there is no report.
    """
    if getattr(report, "segments", None) is None:
        raise InvalidOption(_NO_REPORT.format(type(report).__name__))
    named = [(name, OF_PICKS[number % len(OF_PICKS)]) for number, name in enumerate(report.picks)]
    some = any(bool((segment.taken < 0).any()) for segment in report.segments)
    return [*named, ("protected", PROTECTED)] if some else named


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


def _groups_of(segment: Pruned) -> NDArray[np.int_] | None:
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


def _levels(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores from 0 (lowest) to 1 (highest), NaN where they are."""
    finite = scores[np.isfinite(scores)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low == high:
        levels = np.where(np.isnan(scores), np.nan, 0.5)
    else:
        levels = (scores.clip(low, high) / 2 - low / 2) / (high / 2 - low / 2)
    return np.where(np.isposinf(scores), 1.0, np.where(np.isneginf(scores), 0.0, levels))


def check_dim(dim: float) -> None:
    """Raise `InvalidOption` for what is no share in [0, 1]."""
    if isinstance(dim, bool) or not isinstance(dim, Real) or not 0 <= dim <= 1:
        raise InvalidOption(f"dim={dim!r}: expected a share in [0, 1]")


def _check_upscale(upscale: int | None) -> None:
    if upscale is not None and (isinstance(upscale, bool) or not isinstance(upscale, int) or upscale < 1):
        raise InvalidOption(f"upscale={upscale!r}: expected a whole factor, 1 or more")


def _default_upscale(picture: Image.Image, panels: int) -> int:
    return max(1, _SMALL // max(picture.size)) if panels <= 2 else 1
