"""Where a token lies in the picture: the one place that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtprune.errors import InvalidOption
from vtprune.types import Part
from vtprune.viz.framing import Box, Size

OUTSIDE = -1
"""Of pixels that no token shows."""


class Packed(Protocol):
    """What is made of parts, like a `SegmentReport`."""

    @property
    def parts(self) -> tuple[Part, ...]: ...


def cells_of(segment: Packed, size: Size, framing: Box | None = None) -> list[Box]:
    """The box of every token of a segment, separators left out, in pixels of the original picture.

    Args:
        segment: one of `report.segments`.
        size: width and height of the picture, or of a frame of the clip.
        framing: what the encoder saw of it (`framing_of`), all by default.

    Raises:
        InvalidOption: for a size or a framing without an inside.
    """
    left, top, right, bottom = checked_framing(size, framing)
    found: dict[int, Box] = {}
    for grid in token_grids(segment.parts, size):
        rows, columns = grid.shape
        across, down = (right - left) / columns, (bottom - top) / rows
        for (row, column), token in np.ndenumerate(grid):
            x, y = left + column * across, top + row * down
            found[int(token)] = Box(x, y, x + across, y + down)
    return [found[token] for token in sorted(found)]


def token_at(
    segment: Packed, size: Size, x: float, y: float, *, part: int = 0, framing: Box | None = None
) -> int | None:
    """Which token shows the pixel (x, y) of the picture, None outside of the grid.

    Args:
        segment: one of `report.segments`.
        size: width and height of the picture, or of a frame of the clip.
        x: pixels from the left edge.
        y: pixels from the top edge.
        part: which panel of `overlay`: a part, or all tiles together, which come first.
        framing: what the encoder saw of the picture (`framing_of`), all by default.

    Raises:
        InvalidOption: for a panel that is not there, or a size or a framing without an inside.
    """
    grids = token_grids(segment.parts, size)
    if isinstance(part, bool) or not isinstance(part, int) or not 0 <= part < len(grids):
        raise InvalidOption(f"part={part!r}: expected a panel from 0 to {len(grids) - 1}")
    grid = grids[part]
    left, top, right, bottom = checked_framing(size, framing)
    row = int(_cells(np.array([y], dtype=float), top, bottom, grid.shape[0])[0])
    column = int(_cells(np.array([x], dtype=float), left, right, grid.shape[1])[0])
    return None if OUTSIDE in (row, column) else int(grid[row, column])


def cells_of_pixels(size: Size, grid: tuple[int, int], framing: Box) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """The row of the grid that every pixel row shows (height,), and the column of every pixel column (width,)."""
    width, height = size
    rows = _cells(np.arange(height), framing.top, framing.bottom, grid[0])
    return rows, _cells(np.arange(width), framing.left, framing.right, grid[1])


def _cells(pixels: NDArray[np.float64] | NDArray[np.int_], begin: float, end: float, count: int) -> NDArray[np.int_]:
    cells = np.floor((pixels - begin) * count / (end - begin)).astype(int)
    return np.where((cells >= 0) & (cells < count), cells, OUTSIDE)


def checked_framing(size: Size, framing: Box | None) -> Box:
    """The framing, the whole picture by default. Raises `InvalidOption` where either has no inside."""
    width, height = size
    if width < 1 or height < 1:
        raise InvalidOption(f"size={size!r}: expected width and height in pixels, 1 or more each")
    if framing is None:
        return Box(0, 0, width, height)
    left, top, right, bottom = framing
    if not all(map(math.isfinite, framing)) or right <= left or bottom <= top:
        raise InvalidOption(f"framing={tuple(framing)}: expected left < right and top < bottom, in pixels")
    return Box(left, top, right, bottom)


def token_grids(parts: Sequence[Part], size: Size) -> list[NDArray[np.int_]]:
    """The tokens of every panel, (h, w) each: one panel for a part, and one for all tiles together, which comes first.

    Tiles are put together in the arrangement that suits the shape of the picture best.
    """
    ends = np.cumsum([part.tokens for part in parts])
    flat = np.split(np.arange(ends[-1]), ends[:-1])
    grids = [tokens.reshape(part.grid) for tokens, part in zip(flat, parts, strict=True)]
    tiles = [grid for part, grid in zip(parts, grids, strict=True) if part.kind == "tile"]
    if not tiles or len({tile.shape for tile in tiles}) > 1:
        return grids
    rows, columns = _arrangement(len(tiles), size[0] / size[1])
    stitched = np.block([tiles[row * columns : (row + 1) * columns] for row in range(rows)])
    return [stitched, *(grid for part, grid in zip(parts, grids, strict=True) if part.kind != "tile")]


def _arrangement(count: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of `count` tiles whose aspect is nearest to that of the picture."""
    choices = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(choices, key=lambda choice: abs(choice[1] / choice[0] - aspect))


def panels_of(
    parts: Sequence[Part], image: Image.Image | Sequence[Image.Image]
) -> list[tuple[Image.Image, NDArray[np.int_]]]:
    """Every panel: the picture it is drawn on, and the tokens of its grid (h, w).

    Raises:
        InvalidOption: for pictures that do not fit the parts.
    """
    if parts[0].kind == "frame":
        frames = _frames_for(image, len(parts))
        return list(zip(frames, token_grids(parts, frames[0].size), strict=True))
    if not isinstance(image, Image.Image):
        raise InvalidOption("this segment is one picture: expected one PIL image, got a sequence")
    return [(image, grid) for grid in token_grids(parts, image.size)]


def _frames_for(image: Image.Image | Sequence[Image.Image], parts: int) -> list[Image.Image]:
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if not frames or len(frames) % parts:
        raise InvalidOption(
            f"the clip was encoded as {parts} frames: expected {parts} pictures or a multiple, got {len(frames)}"
        )
    return frames[:: len(frames) // parts]
