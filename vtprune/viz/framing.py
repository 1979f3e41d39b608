"""Which box of a picture the encoder saw, by the settings of its processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vtprune.errors import InvalidOption
from vtprune.types import Part

Size = tuple[int, int]
"""Width and height in pixels."""

_WHOLE = ("thumbnail", "crop", "tile")


class Box(NamedTuple):
    """Pixels of the original picture; beyond its edges where the processor pads."""

    left: float
    top: float
    right: float
    bottom: float


def framing_of(processor: Any, size: Size, parts: Sequence[Part]) -> Box:
    """The box of a picture, or of a frame, of that `size` (width, height) that the grids of its parts cover.

    All of it where the processor stretches it, fits its own resolution to it, or cuts it into crops or tiles; the
    square around it where that is filled up first; the middle where the processor crops, which may reach beyond the
    edges. Patches that the sides do not fill are not encoded and not in it.

    Raises:
        InvalidOption: where the settings do not tell which box that is.
    """
    width, height = size
    if not parts or parts[0].kind in _WHOLE:
        return Box(0, 0, width, height)
    settings = _settings_of(processor, parts[0].kind == "frame")
    canvas = _canvas(settings, size, parts[0].grid)
    padded = (round(canvas.right - canvas.left), round(canvas.bottom - canvas.top))
    resized = _resized(settings, padded)
    if not getattr(settings, "do_center_crop", None):
        return canvas if resized is None else _whole_patches(processor, canvas, resized, parts[0].grid)
    crop = _pair(getattr(settings, "crop_size", None))
    if crop is None or resized is None:
        raise InvalidOption(
            f"it is not known how the processor crops this picture of {width} x {height}: expected a crop_size of "
            "height and width, and a size of height and width or of a shortest_edge; crop the picture yourself"
        )
    cropped = _middle(canvas, resized, crop)
    return _whole_patches(processor, cropped, crop, parts[0].grid)


def _settings_of(processor: Any, clip: bool) -> Any:
    names = ("video_processor", "image_processor") if clip else ("image_processor",)
    own = (getattr(processor, name, None) for name in names)
    return next((settings for settings in own if settings is not None), processor)


def _canvas(settings: Any, size: Size, grid: tuple[int, int]) -> Box:
    """The picture, or the square that it was filled up to before it was resized."""
    width, height = size
    whole = Box(0, 0, width, height)
    rows, columns = grid
    square_off = abs(rows * width - columns * height) > max(width, height)
    pads = getattr(settings, "do_pad", None) and not getattr(settings, "image_grid_pinpoints", None)
    if not pads or width == height:
        return whole
    if hasattr(settings, "pad_to_square"):
        side = max(size)
        left, top = -((side - width) // 2), -((side - height) // 2)
        return Box(left, top, left + side, top + side)
    if square_off:
        raise InvalidOption(
            f"it is not known where the processor pads this picture of {width} x {height}: give it a square one"
        )
    return whole


def _resized(settings: Any, size: Size) -> Size | None:
    """Width and height before the crop; None where that is not known."""
    if not getattr(settings, "do_resize", None):
        return size
    wanted = getattr(settings, "size", None)
    both = _pair(wanted)
    if both is not None:
        return both
    shortest = _named(wanted, "shortest_edge")
    if shortest and not _named(wanted, "longest_edge"):
        width, height = (int(shortest * side / min(size)) for side in size)
        return width, height
    return None


def _middle(canvas: Box, resized: Size, crop: Size) -> Box:
    """The centre crop, whose offset is a whole number of resized pixels.

    Where it reaches beyond the edges, transformers rounds the margin down with torchvision, and up without.
    """
    found = []
    for begin, end, side, kept in zip(canvas[:2], canvas[2:], resized, crop, strict=True):
        scale = (end - begin) / side
        first = begin + int((side - kept) / 2) * scale
        found.append((first, first + kept * scale))
    (left, right), (top, bottom) = found
    return Box(left, top, right, bottom)


def _whole_patches(processor: Any, box: Box, encoded: Size, grid: tuple[int, int]) -> Box:
    """Without what is left at the right and the bottom of so many encoded pixels once they are cut into patches."""
    patch = getattr(processor, "patch_size", None)
    if not isinstance(patch, int) or patch < 1 or grid != (encoded[1] // patch, encoded[0] // patch):
        return box
    across, down = (side // patch * patch / side for side in encoded)
    return box._replace(
        right=box.left + (box.right - box.left) * across, bottom=box.top + (box.bottom - box.top) * down
    )


def _pair(size: Any) -> Size | None:
    width, height = _named(size, "width"), _named(size, "height")
    return (width, height) if height and width else None


def _named(size: Any, name: str) -> int:
    found = size.get(name) if hasattr(size, "get") else getattr(size, name, None)
    return int(found) if found else 0
