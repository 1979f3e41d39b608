"""A picture or clip with what was kept of it, or with scores, from a report alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Real

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from vtprune._checks import check_whole
from vtprune.errors import InvalidOption
from vtprune.viz.drawing import (
    PER_ROW,
    canvas_of,
    frame_picks,
    hatch_unseen,
    heat_bar,
    heated,
    kept_and_dropped,
    outline_groups,
    side_by_side,
    tint_cuts,
)
from vtprune.viz.framing import Box
from vtprune.viz.lettering import broken, font, labelled, legible, line, write
from vtprune.viz.marks import mark_forced
from vtprune.viz.placing import checked_framing, panels_of
from vtprune.viz.reported import Reported, cuts_of, groups_of, segment_of, stages_of

_SMALL = 384
_OF_A_ROW = 4
_PAD = 4
_GREY = 128


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
    columns: int = PER_ROW,
    labels: Sequence[str] = (),
    forced_in: Collection[int] = (),
    forced_out: Collection[int] = (),
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
            `report.picks`, white where the user protected it; what each cut between layers dropped gets a tint
            (`legend`).
        groups: outline the tokens that were merged into one, each group in its own colour; nothing where the method
            does not merge.
        framing: the box of the picture that the encoder saw (`framing_of`), all of it by default. The rest is drawn
            dark and hatched.
        columns: panels of a row.
        labels: what to write above the panels, one for each.
        forced_in: tokens of the segment to mark by two frames.
        forced_out: tokens of the segment to mark by a hatch and a cross.

    Raises:
        InvalidOption: for a report without that segment, an option out of range, or pictures that do not fit the parts.
    """
    chosen = segment_of(report, segment)
    check_dim(dim)
    _check_upscale(upscale)
    taken, joined, cuts = stages_of(chosen), groups_of(chosen), cuts_of(report, chosen)
    panels = panels_of(chosen.parts, image)
    drawn = []
    for picture, grid in panels:
        box = checked_framing(picture.size, framing)
        canvas = canvas_of(picture, grid.shape, box, upscale or _default_upscale(picture, len(panels)))
        pixels = kept_and_dropped(canvas, taken[grid], dim)
        if groups and joined is not None:
            pixels = outline_groups(pixels, canvas, joined[grid], taken[grid])
        if stages:
            pixels = frame_picks(tint_cuts(pixels, canvas, cuts[grid]), canvas, taken[grid])
        pixels = mark_forced(pixels, canvas, grid, forced_in, forced_out)
        drawn.append(Image.fromarray(hatch_unseen(pixels, canvas)))
    return in_rows(drawn, labels, columns=columns)


def heatmap(
    scores: Tensor,
    report: Reported,
    image: Image.Image | Sequence[Image.Image],
    segment: int = 0,
    *,
    framing: Box | None = None,
    upscale: int | None = None,
    columns: int = PER_ROW,
    labels: Sequence[str] = (),
    span: Tensor | None = None,
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
        columns: panels of a row.
        labels: what to write above the panels, one for each.
        span: scores whose lowest and highest are the ends of the scale, those of the segment by default.

    Raises:
        InvalidOption: for scores of another shape, and where `overlay` raises it.
    """
    chosen = segment_of(report, segment)
    _check_upscale(upscale)
    tokens = sum(part.tokens for part in chosen.parts)
    if not isinstance(scores, Tensor) or scores.shape != (tokens,) or scores.is_complex():
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InvalidOption(f"scores: got {got}, expected a tensor ({tokens},): one real number for every token")
    levels = _levels(scores.detach().cpu().double().numpy(), _ends(scores if span is None else span))
    panels = panels_of(chosen.parts, image)
    drawn = []
    for picture, grid in panels:
        box = checked_framing(picture.size, framing)
        canvas = canvas_of(picture, grid.shape, box, upscale or _default_upscale(picture, len(panels)))
        drawn.append(Image.fromarray(hatch_unseen(heated(canvas, levels[grid]), canvas)))
    return in_rows(drawn, labels, columns=columns)


def in_rows(panels: list[Image.Image], labels: Sequence[str] = (), *, columns: int = PER_ROW) -> Image.Image:
    """Panels in rows, with labels that can still be read where a row is as wide as the screen of a telephone."""
    check_whole("columns", columns, least=1)
    check_labels(labels, len(panels))
    size = legible(min(columns, _OF_A_ROW) * max(panel.width for panel in panels))
    return side_by_side(labelled(panels, labels, size), columns=columns)


def with_bar(picture: Image.Image, scores: Tensor, name: str) -> Image.Image:
    """A `heatmap` with a bar of its colours below, the lowest score and the highest, and what is scored in lines."""
    low, high = (f"{end:.3g}" for end in _ends(scores))
    size = legible(picture.width)
    lines = [part for text in name.split("\n") for part in broken(text, picture.width, size)]
    bar = Image.fromarray(heat_bar(picture.width, line(size) // 2, _GREY))
    made = Image.new(
        "RGB", (picture.width, picture.height + bar.height + (1 + len(lines)) * line(size) + _PAD), "white"
    )
    made.paste(picture)
    pen, top = ImageDraw.Draw(made), picture.height + _PAD
    for text in lines:
        write(pen, (0, top), text, picture.width, size)
        top += line(size)
    made.paste(bar, (0, top))
    top += bar.height
    write(pen, (0, top), low, picture.width / 2, size)
    length = font(size).getlength(high)
    write(pen, (picture.width - length, top), high, length + 1, size)
    return made


def _ends(scores: Tensor) -> tuple[float, float]:
    """The lowest and the highest score that is finite; zeros where none is."""
    known = scores.detach().cpu().double()
    finite = known[known.isfinite()]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def _levels(scores: NDArray[np.float64], ends: tuple[float, float]) -> NDArray[np.float64]:
    """Scores from 0 (lowest) to 1 (highest), NaN where they are."""
    low, high = ends
    if low == high:
        levels = np.where(np.isnan(scores), np.nan, 0.5)
    else:
        levels = (scores.clip(low, high) / 2 - low / 2) / (high / 2 - low / 2)
    return np.where(np.isposinf(scores), 1.0, np.where(np.isneginf(scores), 0.0, levels))


def check_labels(labels: Sequence[str], panels: int) -> None:
    """Raise `InvalidOption` where there are some, and not one for each panel."""
    if labels and len(labels) != panels:
        raise InvalidOption(f"labels: expected one for each of {panels} panels, got {len(labels)}")


def check_dim(dim: float) -> None:
    """Raise `InvalidOption` for what is no share in [0, 1]."""
    if isinstance(dim, bool) or not isinstance(dim, Real) or not 0 <= dim <= 1:
        raise InvalidOption(f"dim={dim!r}: expected a share in [0, 1]")


def _check_upscale(upscale: int | None) -> None:
    if upscale is not None and (isinstance(upscale, bool) or not isinstance(upscale, int) or upscale < 1):
        raise InvalidOption(f"upscale={upscale!r}: expected a whole factor, 1 or more")


def _default_upscale(picture: Image.Image, panels: int) -> int:
    return max(1, _SMALL // max(picture.size)) if panels <= 2 else 1
