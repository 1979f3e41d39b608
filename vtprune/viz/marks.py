"""Marks of tokens that were forced in and out by hand; they are told apart without colours, on any picture."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtprune.viz.drawing import Canvas, Colour, Pixels, canvas_of
from vtprune.viz.framing import Box
from vtprune.viz.placing import Packed, checked_framing, token_grids

IN: Colour = (255, 255, 255)
OUT: Colour = (26, 28, 34)
"""The outer frame of what was forced in, and the ground of what was forced out."""
_DARK, _LIGHT, _STRIPE = OUT, IN, (78, 82, 92)
_LEFT = 0.12
"""How much is left of a picture under the hatch."""


def mark_forced(
    drawn: Pixels,
    canvas: Canvas,
    grid: NDArray[np.int_],
    forced_in: Collection[int] = (),
    forced_out: Collection[int] = (),
) -> Pixels:
    """With a light and a dark frame around what was forced in, and a dark hatch with a cross on what was forced out.

    `grid` (h, w) holds the tokens of the cells.
    """
    if not forced_in and not forced_out:
        return drawn
    made = drawn.copy()
    for rows, columns in _cells(canvas, grid, forced_out):
        cell = made[rows, columns]
        made[rows, columns] = _crossed(cell)
    for rows, columns in _cells(canvas, grid, forced_in):
        cell = made[rows, columns]
        made[rows, columns] = _framed(cell)
    return made


def marked(
    picture: Image.Image,
    segment: Packed,
    panel: int,
    *,
    scale: int = 1,
    framing: Box | None = None,
    forced_in: Collection[int] = (),
    forced_out: Collection[int] = (),
) -> Image.Image:
    """A picture as it is, enlarged by a whole factor, with the marks of one panel of `overlay`."""
    grid = token_grids(segment.parts, picture.size)[panel]
    canvas = canvas_of(picture, grid.shape, checked_framing(picture.size, framing), scale)
    return Image.fromarray(mark_forced(canvas.pixels, canvas, grid, forced_in, forced_out))


def _cells(canvas: Canvas, grid: NDArray[np.int_], tokens: Collection[int]) -> Iterator[tuple[slice, slice]]:
    """Pixel rows and columns of the cells of tokens, as far as they are in the picture."""
    for row, column in np.argwhere(np.isin(grid, list(tokens))):
        down, across = np.flatnonzero(canvas.rows == row), np.flatnonzero(canvas.columns == column)
        if down.size and across.size:
            yield slice(down[0], down[-1] + 1), slice(across[0], across[-1] + 1)


def _width(cell: Pixels) -> int:
    return max(1, min(8, round(min(cell.shape[:2]) / 11)))


def _framed(cell: Pixels) -> Pixels:
    made, width = cell.copy(), _width(cell)
    made[_edge(cell, 2 * width)] = _DARK
    made[_edge(cell, width)] = _LIGHT
    return made


def _edge(cell: Pixels, width: int) -> NDArray[np.bool_]:
    edge = np.ones(cell.shape[:2], dtype=bool)
    edge[width:-width, width:-width] = False
    return edge


def _crossed(cell: Pixels) -> Pixels:
    height, length = cell.shape[:2]
    width = _width(cell)
    down, across = np.mgrid[:height, :length]
    ground = _LEFT * cell + (1 - _LEFT) * np.array(_DARK)
    ground[(down + across) % (4 * width) < width] = _STRIPE
    reach = 0.75 * width * max(height, length) / min(height, length)
    along = (across + 0.5) * height / length - 0.5
    cross = np.minimum(np.abs(down - along), np.abs(height - 1 - down - along)) < reach
    inner = ~_edge(cell, width)
    ground[cross & inner] = _LIGHT
    made: Pixels = ground.astype(np.uint8)
    return made
