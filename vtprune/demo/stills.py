"""A picture of a visitor as the page takes it: upright, RGB, 8 bits, on white, and no larger than is looked at."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vtprune._pictures import in_8_bits, orientation, strips, upright
from vtprune.errors import InvalidOption

LONGEST_SIDE = 1536
"""Pixels of a picture; larger ones are scaled down."""
SHORTEST_SIDE = 8
"""Pixels, once it is scaled."""
LONGEST_SHAPE = 16
"""How many times the short side the long one may be."""


def tidied(picture: Image.Image, name: str, *, own: bool = False) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture, and what was changed on the way.

    It is scaled before anything else, so that a large one is hardly held twice. `own` pictures come from a file that
    nobody else reads: those of JPEG are decoded at a lower resolution where that is enough.

    Raises:
        InvalidOption: for a strip that no model makes sense of, and what Pillow raises over damaged files.
    """
    told = picture.size
    check_sides(told, name)
    notes: tuple[str, ...] = ()
    if getattr(picture, "is_animated", False):  # to count them would be to read the whole file
        notes += ("the first of several pictures of the file is taken",)
    if own and max(told) > LONGEST_SIDE:
        # Twice as large as needed, so that scaling smooths as it does elsewhere.
        width, height = fitted(told, LONGEST_SIDE)
        picture.draft(None, (2 * width, 2 * height))
    turn = orientation(picture)
    small = upright(_resized(_plain(picture), fitted(told, LONGEST_SIDE)), turn)
    if small.mode in ("LA", "RGBA"):
        alpha = small.getchannel("A")
        if alpha.getextrema() != (255, 255):
            notes += ("what is transparent is white",)
        small = Image.composite(small.convert("RGB"), Image.new("RGB", small.size, "white"), alpha)
    if max(told) > LONGEST_SIDE:
        before = upright_size(told, turn)
        notes += ("scaled from {} x {} to {} x {} pixels".format(*before, *small.size),)
    return small.convert("RGB"), notes


def check_sides(size: tuple[int, int], name: str) -> None:
    """Raise `InvalidOption` for a picture that is a strip, or hardly a patch."""
    short, long = sorted(size)
    if long > LONGEST_SHAPE * short or min(fitted(size, LONGEST_SIDE)) < SHORTEST_SIDE:
        raise InvalidOption(
            f"{name} is {size[0]} x {size[1]} pixels: expected a long side of at most {LONGEST_SHAPE} times the short "
            f"one, and {SHORTEST_SIDE} pixels at least; crop it first"
        )


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of the same shape, neither of them above `side`."""
    longest = max(size)
    if longest <= side:
        return size
    width, height = (max(1, round(length * side / longest)) for length in size)
    return width, height


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """A picture with no side above that."""
    return _resized(picture, fitted(picture.size, side))


def upright_size(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """Width and height of a picture of that orientation once it is upright."""
    return size[::-1] if turn > 4 else size


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _plain(picture: Image.Image) -> Image.Image:
    """In 8 bits, and of a mode that is scaled as it looks: grey or RGB, where there is any with how opaque it is."""
    flat, clear = in_8_bits(picture), picture.info.get("transparency")
    if flat is not picture and isinstance(clear, int):
        alpha = Image.new("L", flat.size)
        for top, values in strips(picture):
            alpha.paste(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)), (0, top))
        flat.putalpha(alpha)
    if flat.has_transparency_data:
        return flat if flat.mode in ("LA", "RGBA") else flat.convert("RGBA")
    if flat.mode == "1":
        return flat.convert("L")
    return flat if flat.mode in ("L", "RGB") else flat.convert("RGB")
