"""Frames of a clip with how much is kept of each, and contact sheets."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vtprune._checks import check_whole
from vtprune.errors import InvalidOption
from vtprune.viz.drawing import (
    DROPPED,
    PER_ROW,
    Colour,
    Pixels,
    canvas_of,
    hatch_unseen,
    kept_and_dropped,
    side_by_side,
)
from vtprune.viz.framing import Box
from vtprune.viz.lettering import FAINT, INK, broken, font, labelled, legible, line, write
from vtprune.viz.marks import mark_forced
from vtprune.viz.overlays import check_dim, check_labels
from vtprune.viz.placing import checked_framing, panels_of
from vtprune.viz.reported import Pruned, Reported, segment_of, stages_of

_TRACK: Colour = (222, 225, 230)
_FILL: Colour = (0, 137, 196)
_NUMBERS = 12
_OF_A_ROW = 4
"""Frames of the row whose numbers can be read on a narrow screen."""
_CAPTION = 14
_TITLE = 19
_LETTERS = 40
"""Letters of captions are at least that part of the width of a panel."""
_BAR = 6
_PAD = 4
_MARGIN = 14
_NARROWEST = 150
_LANDSCAPE = 1.5
_LEAST_HEIGHT = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class _Frame:
    """A frame, its tokens (h, w) counted through all frames, and which pick took each of them (h, w)."""

    picture: Image.Image
    tokens: NDArray[np.int_]
    taken: NDArray[np.int_]


def strip(
    report: Reported,
    frames: Sequence[Image.Image],
    segment: int = 0,
    *,
    dim: float = 0.25,
    height: int = 96,
    columns: int = PER_ROW,
    framing: Box | None = None,
    labels: Sequence[str] = (),
    forced_in: Collection[int] = (),
    forced_out: Collection[int] = (),
) -> Image.Image:
    """The frames of a clip in rows, with a bar and a number under each that say how many of its tokens stay.

    Where a family takes the frames of a clip as pictures of their own (InternVL), those from `segment` on are drawn.
    Letters of rows of up to four frames can still be read where a row is as wide as the screen of a telephone.

    Args:
        report: a `PruneReport`.
        frames: those the model encodes, or a whole multiple of them.
        segment: which clip of the report.
        dim: how much is left of dropped patches, 0 (one dark grey) to 1 (as they are).
        height: of a frame, in pixels.
        columns: frames of a row.
        framing: the box of a frame that the encoder saw (`framing_of`), all of it by default.
        labels: what to write above the frames, one for each that the model encodes.
        forced_in: tokens to mark, counted through all frames.
        forced_out: the same of those that were forced out.

    Raises:
        InvalidOption: for a report without that segment, an option out of range, or frames that do not fit the parts.
    """
    check_dim(dim)
    check_whole("height", height, least=_LEAST_HEIGHT)
    check_whole("columns", columns, least=1)
    shown = _frames_of(report, frames, segment)
    check_labels(labels, len(shown))
    widest = max(round(one.picture.width * height / one.picture.height) for one in shown)
    size = max(_NUMBERS, math.ceil(height / 16), legible(_OF_A_ROW * (widest + 2 * _PAD) - 2 * _PAD))
    forced = functools.partial(mark_forced, forced_in=forced_in, forced_out=forced_out)
    cells = [_frame_cell(one, forced, dim, height, size, framing) for one in shown]
    return side_by_side(labelled(cells, labels, size), gap=2 * _PAD, columns=columns)


def _frames_of(report: Reported, frames: Sequence[Image.Image], segment: int) -> list[_Frame]:
    first = segment_of(report, segment)
    pictures = [frames] if isinstance(frames, Image.Image) else list(frames)
    if first.parts[0].kind == "frame":
        return _taken_in(first, pictures, 0)
    own = report.segments[segment : segment + len(pictures)]
    if not pictures or len(own) < len(pictures) or any(len(one.parts) > 1 for one in own):
        raise InvalidOption(
            f"segment={segment!r} is a picture: expected that of a clip, or of the first of {len(pictures)} frames "
            f"that are pictures of one part each; the report has {len(report.segments)} in all"
        )
    found: list[_Frame] = []
    for one, picture in zip(own, pictures, strict=True):
        found += _taken_in(one, picture, sum(frame.tokens.size for frame in found))
    return found


def _taken_in(segment: Pruned, image: Image.Image | Sequence[Image.Image], before: int) -> list[_Frame]:
    taken = stages_of(segment)
    return [
        _Frame(picture=picture, tokens=grid + before, taken=taken[grid])
        for picture, grid in panels_of(segment.parts, image)
    ]


def _frame_cell(
    frame: _Frame, forced: Callable[..., Pixels], dim: float, height: int, size: int, framing: Box | None
) -> Image.Image:
    picture, taken = frame.picture, frame.taken
    box = checked_framing(picture.size, framing)
    width = max(1, round(picture.width * height / picture.height))
    across, down = width / picture.width, height / picture.height
    scaled = Box(box.left * across, box.top * down, box.right * across, box.bottom * down)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    canvas = canvas_of(small, taken.shape, scaled, upscale=1)
    pixels = forced(kept_and_dropped(canvas, taken, dim), canvas, frame.tokens)
    drawn = Image.fromarray(hatch_unseen(pixels, canvas))
    kept, tokens = int(np.count_nonzero(taken > DROPPED)), taken.size
    text = f"{kept} of {tokens}"
    if font(size).getlength(text) > width:
        text = f"{kept}/{tokens}"
    length = math.ceil(font(size).getlength(text))
    whole, thick = max(width, length), max(_BAR, height // 16)
    cell = Image.new("RGB", (whole, height + _PAD + thick + line(size) + _PAD), "white")
    left, top = (whole - width) // 2, height + _PAD
    cell.paste(drawn, (left, 0))
    pen = ImageDraw.Draw(cell)
    pen.rectangle((left, top, left + width - 1, top + thick - 1), fill=_TRACK)
    filled = math.ceil(width * kept / tokens)
    if filled:
        pen.rectangle((left, top, left + filled - 1, top + thick - 1), fill=_FILL)
    write(pen, (0, top + thick + 1), text, whole, size, middle=True)
    return cell


def sheet(panels: Sequence[tuple[str, Image.Image]], *, columns: int | None = None, title: str = "") -> Image.Image:
    """A contact sheet: panels in the middle of equal cells, with a caption under each.

    Captions may have several lines; a line that is too wide ends in dots. Lines of the title are broken instead.

    Args:
        panels: captions with their pictures, row by row.
        columns: how many beside each other; by default as many as make a landscape sheet.
        title: a line above all of them, and smaller ones below it.

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
    size = max(_CAPTION, width // _LETTERS)
    height = tallest + _PAD + max(map(len, lines)) * line(size)
    columns = min(columns or _landscape(len(panels), width, height), len(panels))
    rows, across = -(-len(panels) // columns), columns * (width + _MARGIN) + _MARGIN
    top = _title(title, across - 2 * _MARGIN, size)
    head = 0 if top is None else top.height + _MARGIN
    made = Image.new("RGB", (across, head + rows * (height + _MARGIN) + _MARGIN), "white")
    pen = ImageDraw.Draw(made)
    if top is not None:
        made.paste(top, (_MARGIN, _MARGIN))
    for number, ((_, picture), written) in enumerate(zip(panels, lines, strict=True)):
        row, column = divmod(number, columns)
        x, y = _MARGIN + column * (width + _MARGIN), head + _MARGIN + row * (height + _MARGIN)
        made.paste(picture.convert("RGB"), (x + (width - picture.width) // 2, y + (tallest - picture.height) // 2))
        for place, text in enumerate(written):
            at = (x, y + tallest + _PAD + place * line(size))
            write(pen, at, text, width, size, FAINT if place else INK, middle=True)
    return made


def _title(title: str, room: int, size: int) -> Image.Image | None:
    """The lines of a title, the first one larger."""
    first = size * _TITLE // _CAPTION
    sizes = [first, *[size] * title.count("\n")]
    lines = [
        (part, own) for text, own in zip(title.split("\n"), sizes, strict=True) for part in broken(text, room, own)
    ]
    if not lines:
        return None
    made = Image.new("RGB", (room, sum(line(own) for _, own in lines)), "white")
    pen, top = ImageDraw.Draw(made), 0
    for text, own in lines:
        write(pen, (0, top), text, room, own, INK if own == first else FAINT)
        top += line(own)
    return made


def _landscape(count: int, width: int, height: int) -> int:
    """Columns that bring the sheet nearest to three to two."""

    def off(columns: int) -> float:
        rows = -(-count // columns)
        return abs(math.log(columns * width / (rows * height) / _LANDSCAPE))

    return min(range(1, count + 1), key=off)
