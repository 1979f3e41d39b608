"""Pixels: kept and dropped patches, frames of picks, outlines of groups, heat, and what the encoder did not see."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtprune.viz.framing import Box
from vtprune.viz.placing import OUTSIDE, cells_of_pixels

Colour = tuple[int, int, int]
Pixels = NDArray[np.uint8]

DROPPED = -2
PROTECTED: Colour = (255, 255, 255)
OF_PICKS: tuple[Colour, ...] = ((255, 140, 0), (0, 190, 255), (120, 220, 60), (235, 70, 180))
"""Frames of the patches that were protected, and of those that each pick took; a fifth pick begins anew."""

OF_CUTS: tuple[Colour, ...] = ((230, 60, 60), (240, 228, 66), (150, 90, 230), (0, 170, 150), (170, 110, 50))
"""Tints of what each cut between layers dropped; a sixth cut begins anew."""

_GAP = 4
PER_ROW = 8
_CUT_TINT = 0.55
_LIFT = 56
_NO_GROUP = -1
_HUE_STEP = 0.381966
"""The golden angle: hues of neighbouring numbers lie far apart, however many there are."""
_TINT = 0.16
_HEAT = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 74, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (110, 206, 88),
        (181, 222, 43),
        (253, 231, 37),
    ],
    dtype=float,
)
"""From low to high, evenly apart: dark violet, blue, green, yellow, each clearly lighter than the one before."""
_HEAT_SHARE = 0.7


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """A picture (H, W, 3), and the row and the column of the grid that its pixels show, (H,) and (W,), or OUTSIDE."""

    pixels: Pixels
    rows: NDArray[np.int_]
    columns: NDArray[np.int_]

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Where a cell lies, (H, W)."""
        seen: NDArray[np.bool_] = (self.rows > OUTSIDE)[:, None] & (self.columns > OUTSIDE)[None, :]
        return seen

    def of_cells(self, values: NDArray[np.int_], outside: int) -> NDArray[np.int_]:
        """The value (h, w) of the cell that every pixel shows, (H, W)."""
        return np.where(self.seen, values[self.rows[:, None], self.columns[None, :]], outside)


def canvas_of(picture: Image.Image, grid: tuple[int, int], framing: Box, upscale: int) -> Canvas:
    """The picture with its pixels repeated, and the cells of a grid that covers the framing."""
    pixels = np.asarray(picture.convert("RGB"))
    rows, columns = cells_of_pixels(picture.size, grid, framing)
    return Canvas(
        pixels=pixels.repeat(upscale, axis=0).repeat(upscale, axis=1),
        rows=rows.repeat(upscale),
        columns=columns.repeat(upscale),
    )


def kept_and_dropped(canvas: Canvas, stages: NDArray[np.int_], dim: float) -> Pixels:
    """Kept patches as they are, dropped ones in dim greys; `stages` (h, w) is `DROPPED` or which pick took one."""
    kept = canvas.of_cells(stages, DROPPED) > DROPPED
    return np.where(kept[..., None], canvas.pixels, _dimmed(canvas.pixels, dim))


def frame_picks(drawn: Pixels, canvas: Canvas, stages: NDArray[np.int_]) -> Pixels:
    """With a frame around each kept patch, in the colour of the pick that took it."""
    stage = canvas.of_cells(stages, DROPPED)
    edge = _begins(canvas.rows)[:, None] | _begins(canvas.columns)[None, :]
    colours = np.array([*OF_PICKS, PROTECTED], dtype=np.uint8)
    number = np.where(stage < 0, len(OF_PICKS), stage % len(OF_PICKS))
    return np.where((edge & (stage > DROPPED))[..., None], colours[number], drawn)


def tint_cuts(drawn: Pixels, canvas: Canvas, cuts: NDArray[np.int_]) -> Pixels:
    """With what each cut dropped in the colour of that cut; `cuts` (h, w) numbers them from 0 on, -1 elsewhere."""
    cut = canvas.of_cells(cuts, -1)
    colours = np.array(OF_CUTS, dtype=float)[cut % len(OF_CUTS)]
    tinted = (drawn * (1 - _CUT_TINT) + colours * _CUT_TINT + 0.5).astype(np.uint8)
    return np.where((cut >= 0)[..., None], tinted, drawn)


def heat_bar(width: int, height: int, grey: float) -> Pixels:
    """The colours of `heated` from the lowest on the left to the highest, over one grey."""
    at = np.linspace(0, 1, width)
    colours = np.stack([np.interp(at, np.linspace(0, 1, len(_HEAT)), channel) for channel in _HEAT.T], axis=-1)
    row = (_HEAT_SHARE * colours + (1 - _HEAT_SHARE) * grey + 0.5).astype(np.uint8)
    return np.broadcast_to(row, (height, width, 3)).copy()


def outline_groups(drawn: Pixels, canvas: Canvas, groups: NDArray[np.int_], stages: NDArray[np.int_]) -> Pixels:
    """With an outline around each group of cells, in a colour of its own that also tints what was dropped of it.

    `groups` (h, w) numbers them from 0 on, -1 where a cell belongs to none; `stages` as of `kept_and_dropped`.
    """
    if groups.max() <= _NO_GROUP:
        return drawn
    group = canvas.of_cells(groups, _NO_GROUP)
    edge = _borders(group, _width_of_lines(canvas, groups.shape))
    colours = np.array([_colour_of(number) for number in range(groups.max() + 1)], dtype=np.uint8)[group]
    dropped = canvas.of_cells(stages, DROPPED) <= DROPPED
    tinted = (drawn * (1 - _TINT) + colours * _TINT + 0.5).astype(np.uint8)
    filled = np.where(((group > _NO_GROUP) & dropped)[..., None], tinted, drawn)
    return np.where((edge & (group > _NO_GROUP))[..., None], colours, filled)


def _width_of_lines(canvas: Canvas, grid: tuple[int, int]) -> int:
    across = np.count_nonzero(canvas.columns > OUTSIDE) / grid[1]
    down = np.count_nonzero(canvas.rows > OUTSIDE) / grid[0]
    return max(1, min(3, round(min(across, down) / 12)))


def _borders(group: NDArray[np.int_], width: int) -> NDArray[np.bool_]:
    """Where another group, or the edge of the picture, is no further away than `width`."""
    height, length = group.shape
    around = np.pad(group, width, constant_values=_NO_GROUP - 1)
    steps = (0, width, 2 * width)
    found = np.zeros(group.shape, dtype=bool)
    for down in steps:
        for right in steps:
            found |= around[down : down + height, right : right + length] != group
    return found


def _colour_of(number: int) -> Colour:
    hue = (0.07 + number * _HUE_STEP) % 1.0
    saturation, value = ((0.85, 1.0), (0.55, 1.0), (0.9, 0.85))[number % 3]
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def heated(canvas: Canvas, levels: NDArray[np.float64]) -> Pixels:
    """The picture in greys under the colours of `levels` (h, w) in [0, 1]; NaN: no colour."""
    anchors = np.linspace(0, 1, len(_HEAT))
    filled = np.nan_to_num(levels)
    cells = np.stack([np.interp(filled, anchors, channel) for channel in _HEAT.T], axis=-1)
    number = canvas.of_cells(np.arange(levels.size).reshape(levels.shape), 0)
    grey = canvas.pixels.mean(axis=2, keepdims=True)
    coloured = _HEAT_SHARE * cells.reshape(-1, 3)[number] + (1 - _HEAT_SHARE) * grey
    told = ~np.isnan(levels).reshape(-1)[number]
    mixed: Pixels = (np.where(told[..., None], coloured, grey) + 0.5).clip(0, 255).astype(np.uint8)
    return mixed


def hatch_unseen(drawn: Pixels, canvas: Canvas) -> Pixels:
    """Dark and hatched where the encoder did not look."""
    seen = canvas.seen
    if seen.all():
        return drawn
    height, width = seen.shape
    period = max(6, min(height, width) // 40)
    across = np.arange(height)[:, None] + np.arange(width)[None, :]
    stripe = (across % period) < max(1, period // 4)
    dark = canvas.pixels.mean(axis=2) * 0.16 + np.where(stripe, 84, 10)
    return np.where(seen[..., None], drawn, dark[..., None].astype(np.uint8))


def _begins(cells: NDArray[np.int_]) -> NDArray[np.bool_]:
    """Where a cell begins or ends along a side."""
    changes = cells[1:] != cells[:-1]
    return np.concatenate([[True], changes]) | np.concatenate([changes, [True]])


def _dimmed(pixels: Pixels, dim: float) -> Pixels:
    """Less colour, less contrast, and lifted off black: kept patches may be black."""
    grey = pixels.mean(axis=2, keepdims=True)
    faded = (1 - dim) * grey + dim * pixels
    dimmed: Pixels = (dim * faded + (1 - dim) * _LIFT + 0.5).astype(np.uint8)
    return dimmed


def side_by_side(panels: list[Image.Image], *, gap: int = _GAP, columns: int = PER_ROW) -> Image.Image:
    """Panels from left to right, a new row after eight of them."""
    if len(panels) == 1:
        return panels[0]
    width = max(panel.width for panel in panels) + gap
    height = max(panel.height for panel in panels) + gap
    columns = min(len(panels), columns)
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        sheet.paste(panel, (column * width, row * height))
    return sheet
