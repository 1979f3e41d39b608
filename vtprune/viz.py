"""Show which tokens of a picture or clip were kept, from a report alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from vtprune.errors import InvalidOption
from vtprune.types import Part

_GAP = 4
_PER_ROW = 8
_SMALL = 384
_LIFT = 56
_DROPPED = -2
_PROTECTED = (255, 255, 255)
_OF_PICKS = ((255, 140, 0), (0, 190, 255), (120, 220, 60), (235, 70, 180))
"""Frames of the patches that were protected, and of those that each pick took; a fifth pick begins anew."""


class _Segment(Protocol):
    @property
    def parts(self) -> tuple[Part, ...]: ...
    @property
    def keep(self) -> Tensor: ...
    @property
    def taken(self) -> Tensor: ...


class _Report(Protocol):
    @property
    def segments(self) -> Sequence[_Segment]: ...


def overlay(
    report: _Report,
    image: Image.Image | Sequence[Image.Image],
    segment: int = 0,
    *,
    dim: float = 0.25,
    upscale: int | None = None,
    stages: bool = False,
) -> Image.Image:
    """The picture with kept patches as they are and dropped ones in dim greys, which differ from kept dark ones.

    A segment of several parts is drawn as panels side by side: thumbnail, crops (on the whole picture), frames. Tiles
    are put together in the arrangement that suits the shape of the picture best.

    Args:
        report: a `PruneReport`, for example `model.vtprune.last`.
        image: the picture of that segment, framed as the encoder saw it (a processor that crops sees less); for a clip
            its frames, a whole multiple of the frames the model encodes.
        segment: which picture or clip of the report.
        dim: how much is left of dropped patches, 0 (one dark grey) to 1 (as they are).
        upscale: whole factor by which pixels are repeated; by default small pictures grow to about 384 pixels.
        stages: frame each kept patch in the colour of the pick that took it: orange, blue, green, pink in the order of
            `report.picks`, white where the user protected it.

    Raises:
        InvalidOption: for a report without that segment, an option out of range, or pictures that do not fit the parts.
    """
    chosen = _segment_of(report, segment)
    if isinstance(dim, bool) or not 0 <= dim <= 1:
        raise InvalidOption(f"dim={dim!r}: expected a share in [0, 1]")
    if upscale is not None and (isinstance(upscale, bool) or not isinstance(upscale, int) or upscale < 1):
        raise InvalidOption(f"upscale={upscale!r}: expected a whole factor, 1 or more")
    masks = _part_masks(chosen)
    frames = chosen.parts[0].kind == "frame"
    if frames:
        pictures = _frames_for(image, len(masks))
    elif isinstance(image, Image.Image):
        masks = _put_tiles_together(chosen.parts, masks, image.size)
        pictures = [image] * len(masks)
    else:
        raise InvalidOption("this segment is one picture: expected one PIL image, got a sequence")
    panels = [
        _panel(picture, mask, dim, upscale or _default_upscale(picture, len(masks)), stages)
        for picture, mask in zip(pictures, masks, strict=True)
    ]
    return _side_by_side(panels)


def _segment_of(report: _Report, segment: int) -> _Segment:
    segments = getattr(report, "segments", None)
    if segments is None:
        raise InvalidOption(f"expected a PruneReport, got {type(report).__name__}: run the wrapped model first")
    if isinstance(segment, bool) or not isinstance(segment, int) or not 0 <= segment < len(segments):
        there = f"0 to {len(segments) - 1}" if segments else "no picture in this prompt"
        raise InvalidOption(f"segment={segment!r}: the report has {len(segments)} ({there})")
    chosen: _Segment = segments[segment]
    return chosen


def _part_masks(segment: _Segment) -> list[np.ndarray]:
    """Which pick took a token, -1 where it was protected, -2 where dropped: one grid (h, w) for each part."""
    ends = np.cumsum([part.tokens for part in segment.parts])
    stages = np.full(ends[-1], _DROPPED)
    stages[segment.keep.cpu().numpy()] = segment.taken.cpu().numpy()
    flat = np.split(stages, ends[:-1])
    return [mask.reshape(part.grid) for mask, part in zip(flat, segment.parts, strict=True)]


def _put_tiles_together(parts: Sequence[Part], masks: list[np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    tiles = [mask for part, mask in zip(parts, masks, strict=True) if part.kind == "tile"]
    if not tiles or len({tile.shape for tile in tiles}) > 1:
        return masks
    rows, columns = _arrangement(len(tiles), size[0] / size[1])
    stitched = np.block([tiles[row * columns : (row + 1) * columns] for row in range(rows)])
    return [stitched, *(mask for part, mask in zip(parts, masks, strict=True) if part.kind != "tile")]


def _arrangement(count: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of `count` tiles whose aspect is nearest to that of the picture."""
    choices = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(choices, key=lambda choice: abs(choice[1] / choice[0] - aspect))


def _frames_for(image: Image.Image | Sequence[Image.Image], parts: int) -> list[Image.Image]:
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if not frames or len(frames) % parts:
        raise InvalidOption(
            f"the clip was encoded as {parts} frames: expected {parts} pictures or a multiple, got {len(frames)}"
        )
    return frames[:: len(frames) // parts]


def _default_upscale(picture: Image.Image, panels: int) -> int:
    return max(1, _SMALL // max(picture.size)) if panels <= 2 else 1


def _panel(picture: Image.Image, mask: np.ndarray, dim: float, upscale: int, stages: bool) -> Image.Image:
    pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    rows = (np.arange(height) * mask.shape[0]) // height
    columns = (np.arange(width) * mask.shape[1]) // width
    stage = mask[rows[:, None], columns[None, :]]
    drawn = np.where(stage[..., None] > _DROPPED, pixels, _dimmed(pixels, dim))
    drawn, stage, rows, columns = (_grown(values, upscale) for values in (drawn, stage, rows, columns))
    if stages:
        edge = _begins(rows)[:, None] | _begins(columns)[None, :]
        colours = np.array([*_OF_PICKS, _PROTECTED], dtype=np.uint8)
        number = np.where(stage < 0, len(_OF_PICKS), stage % len(_OF_PICKS))
        drawn = np.where((edge & (stage > _DROPPED))[..., None], colours[number], drawn)
    return Image.fromarray(drawn)


def _grown(values: np.ndarray, factor: int) -> np.ndarray:
    """Every entry repeated along the first axis, and along the second where there is one."""
    values = values.repeat(factor, axis=0)
    return values if values.ndim == 1 else values.repeat(factor, axis=1)


def _begins(cells: np.ndarray) -> np.ndarray:
    """Where a cell begins or ends along a side."""
    changes = cells[1:] != cells[:-1]
    return np.concatenate([[True], changes]) | np.concatenate([changes, [True]])


def _dimmed(pixels: np.ndarray, dim: float) -> np.ndarray:
    """Less colour, less contrast, and lifted off black: kept patches may be black."""
    grey = pixels.mean(axis=2, keepdims=True)
    faded = (1 - dim) * grey + dim * pixels
    return (dim * faded + (1 - dim) * _LIFT + 0.5).astype(np.uint8)


def _side_by_side(panels: list[Image.Image]) -> Image.Image:
    """Panels from left to right, a new row after eight of them."""
    if len(panels) == 1:
        return panels[0]
    width = max(panel.width for panel in panels) + _GAP
    height = max(panel.height for panel in panels) + _GAP
    columns, rows = min(len(panels), _PER_ROW), -(-len(panels) // _PER_ROW)
    sheet = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
    for number, panel in enumerate(panels):
        row, column = divmod(number, _PER_ROW)
        sheet.paste(panel, (column * width, row * height))
    return sheet
