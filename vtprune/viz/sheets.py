"""Frames of a clip with how much is kept of each, and contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vtprune._checks import check_whole
from vtprune.errors import InvalidOption
from vtprune.viz.drawing import DROPPED, PER_ROW, Colour, canvas_of, hatch_unseen, kept_and_dropped, side_by_side
from vtprune.viz.framing import Box
from vtprune.viz.overlays import Pruned, Reported, check_dim, segment_of, stages_of
from vtprune.viz.placing import checked_framing, panels_of

_INK: Colour = (34, 38, 46)
_FAINT: Colour = (96, 102, 112)
_TRACK: Colour = (222, 225, 230)
_FILL: Colour = (0, 137, 196)
_NUMBERS = 12
_CAPTION = 14
_TITLE = 19
_LEADING = 1.3
_BAR = 6
_PAD = 4
_MARGIN = 14
_NARROWEST = 150
_LANDSCAPE = 1.5
_LEAST_HEIGHT = 16
_ELLIPSIS = "..."

_Frame = tuple[Image.Image, NDArray[np.int_]]
"""A frame, and which pick took each of its tokens (h, w)."""


def strip(
    report: Reported,
    frames: Sequence[Image.Image],
    segment: int = 0,
    *,
    dim: float = 0.25,
    height: int = 96,
    columns: int = PER_ROW,
    framing: Box | None = None,
) -> Image.Image:
    """The frames of a clip in rows, with a bar and a number under each that say how many of its tokens stay.

    Where a family takes the frames of a clip as pictures of their own (InternVL), those from `segment` on are drawn.

    Args:
        report: a `PruneReport`.
        frames: those the model encodes, or a whole multiple of them.
        segment: which clip of the report.
        dim: how much is left of dropped patches, 0 (one dark grey) to 1 (as they are).
        height: of a frame, in pixels.
        columns: frames of a row.
        framing: the box of a frame that the encoder saw (`framing_of`), all of it by default.

    Raises:
        InvalidOption: for a report without that segment, an option out of range, or frames that do not fit the parts.
    """
    check_dim(dim)
    check_whole("height", height, least=_LEAST_HEIGHT)
    check_whole("columns", columns, least=1)
    cells = [_frame_cell(*frame, dim, height, framing) for frame in _frames_of(report, frames, segment)]
    return side_by_side(cells, gap=2 * _PAD, columns=columns)


def _frames_of(report: Reported, frames: Sequence[Image.Image], segment: int) -> list[_Frame]:
    first = segment_of(report, segment)
    pictures = [frames] if isinstance(frames, Image.Image) else list(frames)
    if first.parts[0].kind == "frame":
        return _taken_in(first, pictures)
    own = report.segments[segment : segment + len(pictures)]
    if not pictures or len(own) < len(pictures) or any(len(one.parts) > 1 for one in own):
        raise InvalidOption(
            f"segment={segment!r} is a picture: expected that of a clip, or of the first of {len(pictures)} frames "
            f"that are pictures of one part each; the report has {len(report.segments)} in all"
        )
    return [frame for one, picture in zip(own, pictures, strict=True) for frame in _taken_in(one, picture)]


def _taken_in(segment: Pruned, image: Image.Image | Sequence[Image.Image]) -> list[_Frame]:
    taken = stages_of(segment)
    return [(picture, taken[grid]) for picture, grid in panels_of(segment.parts, image)]


def _frame_cell(
    picture: Image.Image, taken: NDArray[np.int_], dim: float, height: int, framing: Box | None
) -> Image.Image:
    box = checked_framing(picture.size, framing)
    width = max(1, round(picture.width * height / picture.height))
    across, down = width / picture.width, height / picture.height
    scaled = Box(box.left * across, box.top * down, box.right * across, box.bottom * down)
    canvas = canvas_of(
        picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), taken.shape, scaled, upscale=1
    )
    drawn = Image.fromarray(hatch_unseen(kept_and_dropped(canvas, taken, dim), canvas))
    kept, tokens = int(np.count_nonzero(taken > DROPPED)), taken.size
    font, text = _font(_NUMBERS), f"{kept} of {tokens}"
    length = math.ceil(font.getlength(text))
    whole = max(width, length)
    cell = Image.new("RGB", (whole, height + _PAD + _BAR + _line(_NUMBERS) + _PAD), "white")
    left, top = (whole - width) // 2, height + _PAD
    cell.paste(drawn, (left, 0))
    pen = ImageDraw.Draw(cell)
    pen.rectangle((left, top, left + width - 1, top + _BAR - 1), fill=_TRACK)
    filled = math.ceil(width * kept / tokens)
    if filled:
        pen.rectangle((left, top, left + filled - 1, top + _BAR - 1), fill=_FILL)
    pen.text(((whole - length) / 2, top + _BAR + 1), text, fill=_INK, font=font)
    return cell


def sheet(panels: Sequence[tuple[str, Image.Image]], *, columns: int | None = None, title: str = "") -> Image.Image:
    """A contact sheet: panels in the middle of equal cells, with a caption under each.

    Captions may have several lines; a line that is too wide ends in dots.

    Args:
        panels: captions with their pictures, row by row.
        columns: how many beside each other; by default as many as make a landscape sheet.
        title: a line above all of them.

    Raises:
        InvalidOption: for no panels, something else than pictures, or `columns` below 1.
    """
    if not panels or not all(isinstance(picture, Image.Image) for _, picture in panels):
        raise InvalidOption(f"panels: expected one or more (caption, PIL image), got {len(panels)} panels")
    if columns is not None:
        check_whole("columns", columns, least=1)
    lines = [caption.split("\n") if caption else [] for caption, _ in panels]
    width = max(_NARROWEST, *(picture.width for _, picture in panels))
    tallest = max(picture.height for _, picture in panels)
    height = tallest + _PAD + max(map(len, lines)) * _line(_CAPTION)
    columns = min(columns or _landscape(len(panels), width, height), len(panels))
    head = _line(_TITLE) + _MARGIN if title else 0
    rows = -(-len(panels) // columns)
    whole = (columns * (width + _MARGIN) + _MARGIN, head + rows * (height + _MARGIN) + _MARGIN)
    made = Image.new("RGB", whole, "white")
    pen = ImageDraw.Draw(made)
    if title:
        _write(pen, (_MARGIN, _MARGIN), title, whole[0] - 2 * _MARGIN, _TITLE, _INK)
    for number, ((_, picture), written) in enumerate(zip(panels, lines, strict=True)):
        row, column = divmod(number, columns)
        x, y = _MARGIN + column * (width + _MARGIN), head + _MARGIN + row * (height + _MARGIN)
        made.paste(picture.convert("RGB"), (x + (width - picture.width) // 2, y + (tallest - picture.height) // 2))
        for place, line in enumerate(written):
            at = (x, y + tallest + _PAD + place * _line(_CAPTION))
            _write(pen, at, line, width, _CAPTION, _FAINT if place else _INK, middle=True)
    return made


def _landscape(count: int, width: int, height: int) -> int:
    """Columns that bring the sheet nearest to three to two."""

    def off(columns: int) -> float:
        rows = -(-count // columns)
        return abs(math.log(columns * width / (rows * height) / _LANDSCAPE))

    return min(range(1, count + 1), key=off)


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    room: int,
    size: int,
    colour: Colour,
    *,
    middle: bool = False,
) -> None:
    font = _font(size)
    shown = fitted(text, room, size)
    indent = (room - font.getlength(shown)) / 2 if middle else 0
    pen.text((at[0] + indent, at[1]), shown, fill=colour, font=font)


def fitted(text: str, room: float, size: int) -> str:
    """As much of a line as fits into that many pixels, ended by dots where something is left out."""
    font = _font(size)
    if font.getlength(text) <= room:
        return text
    shown = text
    while shown and font.getlength(shown + _ELLIPSIS) > room:
        shown = shown[:-1]
    return shown.rstrip() + _ELLIPSIS


def _line(size: int) -> int:
    return math.ceil(size * _LEADING)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
