"""Pictures of a pane, and clicks on them, through `vtprune.viz`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtprune.demo.media import Media
from vtprune.demo.panes import Outcome
from vtprune.demo.scoring import Scored
from vtprune.errors import InvalidOption
from vtprune.report import PruneReport, SegmentReport
from vtprune.viz import Box, cells_of, framing_of, heatmap, in_rows, marked, overlay, strip, token_at, with_bar

_DRAWN = 896
"""Pixels that the longest side of a picture in a pane has at most."""
_FRAME = 256
"""The same of a frame of a clip."""
_FRAMES_A_ROW = 4
_STRIP = 128
"""Pixels from top to bottom of a frame of a strip."""
_BOARD = 640
"""Pixels that the longest side of a board has at least."""
_Drawer = Callable[..., Image.Image]
"""Draws a picture, or frames of a clip, given with its number; `framing`, `labels` and `columns` by name."""


class Pictures(Mapping[str, Image.Image]):
    """Pictures by the names of `VIEWS`, drawn whenever one is looked at: held, they would take megabytes each."""

    def __init__(self, drawers: Mapping[str, Callable[[], Image.Image]]) -> None:
        self._drawers = dict(drawers)

    def __getitem__(self, view: str) -> Image.Image:
        return self._drawers[view]()

    def __contains__(self, view: object) -> bool:
        return view in self._drawers

    def __iter__(self) -> Iterator[str]:
        return iter(self._drawers)

    def __len__(self) -> int:
        return len(self._drawers)


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """Pictures by the names of `VIEWS`, and why others are missing."""

    pictures: Mapping[str, Image.Image]
    missing: dict[str, str]


def framing_for(processor: Any, media: Media, segment: SegmentReport) -> tuple[Box | None, str]:
    """What the encoder sees of a picture, or None and why that is not known."""
    try:
        return framing_of(processor, media.size, segment.parts), ""
    except InvalidOption as error:
        return None, f"patches may be drawn out of place: {error}"


def views_of(report: PruneReport, media: Media, framing: Box | None, scored: Scored | None = None) -> Views:
    """The pictures of a pane; raises `InvalidOption` where its tokens do not fit what was shown."""
    missing = {} if scored is None else dict(scored.missing)
    if not report.segments:
        return Views(pictures={}, missing={"kept": "the model was shown no picture"})
    for segment in report.segments:
        cells_of(segment, media.size, framing)
    whole = report.average == report.tokens
    if whole:
        missing |= dict.fromkeys(("stages", "groups"), "nothing was dropped")
    elif not report.merged:
        missing["groups"] = f"{report.method} merged nothing"
    drawers: dict[str, _Drawer] = {"kept": _kept(report, scored)}
    if not whole:
        drawers["stages"] = _kept(report, scored, stages=True)
    if report.merged:
        drawers["groups"] = functools.partial(overlay, report, groups=True)
    pictures = {name: functools.partial(_drawn, draw, report, media, framing) for name, draw in drawers.items()}
    for name, scores in () if scored is None else (("scores", scored.scores), ("debiased", scored.debiased)):
        if scores is not None and scored is not None:
            pictures[name] = functools.partial(_heat, report, media, framing, scores, scored.names[name])
    if media.kind == "video":
        pictures["strip"] = functools.partial(_strip, report, media, framing, scored)
    else:
        missing["strip"] = "there is one picture, and no frames"
    return Views(pictures=Pictures(pictures), missing=missing)


def _drawn(draw: _Drawer, report: PruneReport, media: Media, framing: Box | None) -> Image.Image:
    """Every picture of a prompt; frames of clips in rows, with their numbers and seconds."""
    media, framing = _for_drawing(media, framing, _FRAME if media.kind == "video" else _DRAWN)
    count, labels = len(report.segments), _labels(report, media)
    if report.segments[0].parts[0].kind == "frame":
        return draw(_shown(report, media, 0), 0, framing=framing, labels=labels, columns=_FRAMES_A_ROW)
    found = [draw(_shown(report, media, number), number, framing=framing) for number in range(count)]
    return found[0] if count == 1 else in_rows(found, labels, columns=_FRAMES_A_ROW)


def _kept(report: PruneReport, scored: Scored | None, *, stages: bool = False) -> _Drawer:
    def draw(own: Any, number: int, **how: Any) -> Image.Image:
        low = sum(segment.n for segment in report.segments[:number])
        high = low + report.segments[number].n
        ins, outs = ((), ()) if scored is None else (scored.forced_in, scored.forced_out)
        into, out_of = ([token - low for token in tokens if low <= token < high] for tokens in (ins, outs))
        return overlay(report, own, number, stages=stages, forced_in=into, forced_out=out_of, **how)

    return draw


def _heat(report: PruneReport, media: Media, framing: Box | None, scores: Sequence[Tensor], name: str) -> Image.Image:
    """Scores over every picture of a prompt, on one scale."""
    span = torch.cat(list(scores))

    def draw(own: Any, number: int, **how: Any) -> Image.Image:
        return heatmap(scores[number], report, own, number, span=span, **how)

    return with_bar(_drawn(draw, report, media, framing), span, name)


def _strip(report: PruneReport, media: Media, framing: Box | None, scored: Scored | None) -> Image.Image:
    labels = _labels(report, media)
    media, framing = _for_drawing(media, framing, _FRAME)
    shown = _shown(report, media, 0)
    frames = shown if isinstance(shown, list) else list(media.pictures)
    return strip(
        report,
        frames,
        framing=framing,
        height=_STRIP,
        columns=_FRAMES_A_ROW,
        labels=labels,
        forced_in=() if scored is None else scored.forced_in,
        forced_out=() if scored is None else scored.forced_out,
    )


def _labels(report: PruneReport, media: Media) -> tuple[str, ...]:
    """The number of every frame that is encoded, and its second if it is known; none of pictures."""
    if media.kind == "image":
        return ()
    parts, count = report.segments[0].parts, len(media.pictures)
    shown = len(parts) if parts[0].kind == "frame" else len(report.segments)
    joined = -(-count // shown)
    found = []
    for place in range(shown):
        first = min(place * joined, count - 1)
        last = min(first + joined, count)
        name = f"#{first + 1}" if last == first + 1 else f"#{first + 1}-{last}"
        found.append(f"{name}  {media.times[first]:.1f} s" if len(media.times) == count else name)
    return tuple(found)


def _for_drawing(media: Media, framing: Box | None, most: int) -> tuple[Media, Box | None]:
    """The same, scaled down where it is larger than what is drawn."""
    factor = most / max(media.size)
    if factor >= 1:
        return media, framing
    width, height = (max(1, round(side * factor)) for side in media.size)
    small = tuple(picture.resize((width, height), Image.Resampling.LANCZOS) for picture in media.pictures)
    if framing is not None:
        across, down = width / media.size[0], height / media.size[1]
        framing = Box(framing.left * across, framing.top * down, framing.right * across, framing.bottom * down)
    return replace(media, pictures=small), framing


def _shown(report: PruneReport, media: Media, number: int) -> Image.Image | list[Image.Image]:
    """The picture of a segment, or its frames, as many times as many as it has parts."""
    if media.kind == "image":
        return media.pictures[0]
    parts = report.segments[number].parts
    if parts[0].kind != "frame":
        return media.pictures[number]
    return _whole_multiple(media.pictures, len(parts))


def _whole_multiple(pictures: Sequence[Image.Image], parts: int) -> list[Image.Image]:
    """With the last one again, as processors do where they join frames."""
    wanted = -(-len(pictures) // parts) * parts
    return [*pictures, *[pictures[-1]] * (wanted - len(pictures))]


def panel_of(segment: SegmentReport, media: Media, frame: int = 0) -> int:
    """The panel that a click on a frame, or on the picture, means: of several on one picture that with most tokens."""
    parts = segment.parts
    if parts[0].kind == "frame":
        return min(frame, len(media.pictures) - 1) // -(-len(media.pictures) // len(parts))
    if any(part.kind == "tile" for part in parts):
        return 0
    return int(np.argmax([part.tokens for part in parts]))


def _shown_by(outcome: Outcome, frame: int) -> tuple[SegmentReport, int]:
    """The segment of a frame, where frames are pictures of their own, and the tokens of those before it."""
    segments = outcome.segments
    number = min(frame, len(segments) - 1)
    return segments[number], sum(segment.n for segment in segments[:number])


def token_under(outcome: Outcome, x: float, y: float, *, frame: int = 0) -> int | None:
    """The token under a pixel of the picture, or of a frame of the clip; None where the encoder sees nothing of it.

    Tokens are counted through all pictures of the prompt.
    """
    if not outcome.segments:
        return None
    media = outcome.ask.media
    segment, before = _shown_by(outcome, frame)
    token = token_at(segment, media.size, x, y, part=panel_of(segment, media, frame), framing=outcome.framing)
    return None if token is None else before + token


def board_scale(media: Media) -> int:
    """By what `board` enlarges a picture."""
    return max(1, _BOARD // max(media.size))


def board(
    media: Media,
    outcome: Outcome | None = None,
    *,
    forced_in: Collection[int] = (),
    forced_out: Collection[int] = (),
    frame: int = 0,
) -> Image.Image:
    """The picture, or a frame, to click on, with marks on forced tokens; a pixel of it is one of `board_scale`."""
    scale = board_scale(media)
    picture = media.pictures[min(frame, len(media.pictures) - 1)]
    if outcome is None or not outcome.segments:
        return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    segment, before = _shown_by(outcome, frame)
    return marked(
        picture,
        segment,
        panel_of(segment, media, frame),
        scale=scale,
        framing=outcome.framing,
        forced_in=[token - before for token in forced_in],
        forced_out=[token - before for token in forced_out],
    )
