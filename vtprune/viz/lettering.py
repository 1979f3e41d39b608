"""Letters in pictures: how large, how wide, and what is left out where there is no room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vtprune.viz.drawing import Colour

INK: Colour = (34, 38, 46)
FAINT: Colour = (96, 102, 112)
_LEADING = 1.3
_ELLIPSIS = "..."
_NARROW = 390
"""Pixels across the narrowest screen that letters are made for."""
_LEAST = 14
"""Pixels of letters on it."""


def font(size: int) -> Any:
    """The letters that come with pillow."""
    return ImageFont.load_default(size)


def line(size: int) -> int:
    """Pixels from one line to the next."""
    return math.ceil(size * _LEADING)


def legible(width: float) -> int:
    """Pixels of letters in a picture of that width that can still be read where it fills a narrow screen."""
    return max(_LEAST, math.ceil(_LEAST * width / _NARROW))


def fitted(text: str, room: float, size: int) -> str:
    """As much of a line as fits into that many pixels, ended by dots where something is left out."""
    letters = font(size)
    if letters.getlength(text) <= room:
        return text
    shown = text
    while shown and letters.getlength(shown + _ELLIPSIS) > room:
        shown = shown[:-1]
    return shown.rstrip() + _ELLIPSIS


def broken(text: str, room: float, size: int, most: int = 0) -> list[str]:
    """A text in lines that fit into that many pixels; no more than `most`, if it is given, the last ended by dots."""
    letters = font(size)
    lines: list[str] = []
    for word in text.split():
        if lines and letters.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if most and len(lines) > most:
        lines[most - 1 :] = [" ".join(lines[most - 1 :])]
    return [fitted(line, room, size) for line in lines]


def write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    room: float,
    size: int,
    colour: Colour = INK,
    *,
    middle: bool = False,
) -> None:
    """Write a line into so many pixels from `at`, its left upper corner."""
    letters = font(size)
    shown = fitted(text, room, size)
    indent = (room - letters.getlength(shown)) / 2 if middle else 0
    pen.text((at[0] + indent, at[1]), shown, fill=colour, font=letters)


def labelled(panels: Sequence[Image.Image], labels: Sequence[str], size: int) -> list[Image.Image]:
    """Panels with a label above each; as they are where there are no labels."""
    if not labels:
        return list(panels)
    found = []
    for panel, label in zip(panels, labels, strict=True):
        made = Image.new("RGB", (panel.width, panel.height + line(size)), "white")
        made.paste(panel, (0, line(size)))
        write(ImageDraw.Draw(made), (0, 0), label, panel.width, size)
        found.append(made)
    return found
