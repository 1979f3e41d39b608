"""The contact sheet of `vtprune compare`: a row for each method, a column for each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtprune._compare.lines import Line

if TYPE_CHECKING:
    from PIL import Image

    from vtprune.report import PruneReport

TILE = 240
"""Pixels of the longest side of a picture."""
LETTERS = TILE // 12
CHANGED = (200, 20, 30)
"""Frames and letters of answers that are not that of the unpruned model."""
_GAP = 14
_FRAME = 4
_ANSWER = 3
"""Lines of an answer at most."""
_TALL = 2.0
"""Higher than that many times its width, a sheet gets another block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """A picture with a word on it, which may be empty, and what is written below it."""

    picture: Image.Image
    word: str
    count: str
    answer: str
    changed: bool


Row = tuple[str, Sequence[Tile | None]]
"""A method, and what it did at each budget."""


def draw_sheet(lines: Sequence[Line], picture: Image.Image, processor: Any, title: str) -> Image.Image:
    """The unpruned picture once, then every method in a row, dim where no token reached the last layer.

    Changed answers are red and framed. With many methods there are blocks beside each other.
    """
    from PIL import Image

    unpruned = next((line for line in lines if line.unpruned), None)
    pruned = [line for line in lines if not line.unpruned]
    methods = list(dict.fromkeys(line.row.method for line in pruned))
    budgets = list({repr(line.row.keep): line.row.keep for line in pruned}.values())
    tiles = {(line.row.method, repr(line.row.keep)): tile_of(line, picture, processor) for line in pruned}
    rows = [(name, [tiles.get((name, repr(keep))) for keep in budgets]) for name in methods]
    height = max(map(_height_of, tiles.values()), default=0)
    width = _width_of(rows)
    drawn = [_block(block, budgets, width, height) for block in _blocks(rows, height, width)]
    across, down = sum(one.width for one in drawn), max((one.height for one in drawn), default=0)
    above = _head(unpruned, picture, processor, title, max(across, 3 * TILE))
    made = Image.new("RGB", (above.width, above.height + down), "white")
    made.paste(above)
    for number, one in enumerate(drawn):
        made.paste(one, (number * width, above.height))
    return made


def _blocks(rows: Sequence[Row], height: int, width: int) -> list[Sequence[Row]]:
    """Rows in as few blocks beside each other as keep the sheet from being much taller than wide."""
    for count in range(1, len(rows) + 1):
        each = -(-len(rows) // count)
        if each * height <= _TALL * count * width:
            return [rows[first : first + each] for first in range(0, len(rows), each)]
    return []


def tile_of(line: Line, picture: Image.Image, processor: Any) -> Tile:
    """The picture of a line, and its words."""
    from PIL import Image

    from vtprune.viz import framing_of, overlay

    report = line.row.report
    drawn = overlay(report, picture, framing=framing_of(processor, picture.size, report.segments[0].parts))
    factor = TILE / max(drawn.size)
    size = (max(1, round(drawn.width * factor)), max(1, round(drawn.height * factor)))
    return Tile(
        picture=drawn.resize(size, Image.Resampling.LANCZOS),
        word="" if line.unpruned else _word(report),
        count=_count(report),
        answer=line.answer or "(empty)",
        changed=not line.unpruned and line.row.agreement != 1,
    )


def _word(report: PruneReport) -> str:
    """Why a picture is all lit or all dark; empty of others."""
    if report.kept == 0:
        return "behind the last cut: none"
    return "all tokens pass" if report.kept == report.tokens else ""


def _count(report: PruneReport) -> str:
    average = f"{round(report.average, 1):g} of {report.tokens}"
    return average if report.average == report.kept else f"{average} on average"


def _height_of(tile: Tile) -> int:
    """Pixels of a tile with what is written below it."""
    from vtprune.viz.lettering import broken, line

    answer = broken(tile.answer, TILE, LETTERS, most=_ANSWER)
    return tile.picture.height + 2 * _FRAME + (1 + len(answer)) * line(LETTERS) + _GAP


def _width_of(rows: Sequence[Row]) -> int:
    """Pixels of a block: names at the left, and its tiles."""
    columns = max((len(tiles) for _, tiles in rows), default=0)
    return _names_width(rows) + columns * (TILE + 2 * _FRAME + _GAP) + _GAP


def _names_width(rows: Sequence[Row]) -> int:
    from vtprune.viz.lettering import font

    return _GAP + max((round(font(LETTERS).getlength(name)) for name, _ in rows), default=0) + _GAP


def _block(rows: Sequence[Row], budgets: Sequence[float | int], width: int, height: int) -> Image.Image:
    """Budgets in a head, and a row for each method."""
    from PIL import Image, ImageDraw

    from vtprune.viz.lettering import line, write

    head, step = line(LETTERS) + _GAP, TILE + 2 * _FRAME + _GAP
    names = width - len(budgets) * step - _GAP
    made = Image.new("RGB", (width, head + len(rows) * height), "white")
    pen = ImageDraw.Draw(made)
    for column, keep in enumerate(budgets):
        write(pen, (names + column * step, 0), f"keep {keep}", TILE, LETTERS)
    for number, (name, tiles) in enumerate(rows):
        top = head + number * height
        write(pen, (_GAP, top), name, names - _GAP, LETTERS)
        for column, tile in enumerate(tiles):
            if tile is not None:
                _paste(made, tile, names + column * step, top)
    return made


def _paste(made: Image.Image, tile: Tile, left: int, top: int) -> None:
    from PIL import ImageDraw

    from vtprune.viz.lettering import FAINT, INK, broken, font, line, write

    pen = ImageDraw.Draw(made)
    wide, high = tile.picture.size
    if tile.changed:
        pen.rectangle((left, top, left + wide + 2 * _FRAME - 1, top + high + 2 * _FRAME - 1), fill=CHANGED)
    made.paste(tile.picture, (left + _FRAME, top + _FRAME))
    if tile.word:
        length = font(LETTERS).getlength(tile.word)
        x, y = left + _FRAME + (wide - length) / 2, top + _FRAME + high / 2 - line(LETTERS) / 2
        pen.rectangle((x - 5, y - 2, x + length + 5, y + line(LETTERS) + 2), fill="white", outline=INK)
        write(pen, (x, y), tile.word, length + 1, LETTERS)
    below = top + high + 2 * _FRAME
    write(pen, (left, below), tile.count, TILE, LETTERS, FAINT)
    for number, text in enumerate(broken(tile.answer, TILE, LETTERS, most=_ANSWER), 1):
        write(pen, (left, below + number * line(LETTERS)), text, TILE, LETTERS, CHANGED if tile.changed else INK)


def _head(unpruned: Line | None, picture: Image.Image, processor: Any, title: str, width: int) -> Image.Image:
    """The question, what the marks mean, and the unpruned picture with its answer."""
    from PIL import Image, ImageDraw

    from vtprune.viz.lettering import FAINT, INK, broken, line, write

    room = width - 2 * _GAP - (TILE + 2 * _GAP if unpruned is not None else 0)
    told = (
        "rows are methods, columns budgets; dim: no token reached the last layer; red: another answer than all tokens"
    )
    lines = [(text, INK) for text in broken(title, room, LETTERS)]
    lines += [(text, FAINT) for text in broken(told, room, LETTERS)]
    tile = None if unpruned is None else tile_of(unpruned, picture, processor)
    own = 0 if tile is None else line(LETTERS) + _height_of(tile)
    made = Image.new("RGB", (width, _GAP + max(own, len(lines) * line(LETTERS) + _GAP)), "white")
    pen = ImageDraw.Draw(made)
    left = _GAP
    if tile is not None:
        write(pen, (left, _GAP), "all tokens", TILE, LETTERS)
        _paste(made, tile, left, _GAP + line(LETTERS))
        left += TILE + 2 * _GAP
    for number, (text, colour) in enumerate(lines):
        write(pen, (left, _GAP + number * line(LETTERS)), text, room, LETTERS, colour)
    return made
