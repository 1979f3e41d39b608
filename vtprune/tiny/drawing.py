"""Pictures from integers alone: the same bytes from every version of every library.

Random numbers come from a counter run through the SplitMix64 mixer, shapes from inequalities between integers, digits
from glyphs kept here. Nothing is taken from a font, a float or a library's stream.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Integers = NDArray[np.signedinteger]

UNIT = 1000
"""A shape reaches from -UNIT to UNIT in both directions."""

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = (1 << 64) - 1


class Stream:
    """Random integers that depend on the seed and on how many were taken before, on nothing else."""

    def __init__(self, seed: int) -> None:
        self._counter = (seed * _FACTORS[0] + _FACTORS[1]) & _WORD

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` words of 64 random bits."""
        steps = np.arange(1, count + 1, dtype=np.uint64)
        with np.errstate(over="ignore"):
            words = np.uint64(self._counter) + steps * np.uint64(_GOLDEN)
            words = (words ^ (words >> np.uint64(30))) * np.uint64(_FACTORS[0])
            words = (words ^ (words >> np.uint64(27))) * np.uint64(_FACTORS[1])
        self._counter = (self._counter + count * _GOLDEN) & _WORD
        return words ^ (words >> np.uint64(31))

    def integers(self, low: int, high: int, count: int) -> Integers:
        """`count` integers from `low` up to, but not including, `high`; both fit in 32 bits."""
        span = np.uint64(high - low)
        return low + (((self.words(count) >> np.uint64(32)) * span) >> np.uint64(32)).astype(np.int64)

    def integer(self, low: int, high: int) -> int:
        """One integer from `low` up to, but not including, `high`."""
        return int(self.integers(low, high, 1)[0])

    def chance(self, percent: int) -> bool:
        """True in so many cases of a hundred."""
        return self.integer(0, 100) < percent

    def shuffled(self, count: int) -> list[int]:
        """The integers below `count` in random order."""
        return [int(i) for i in np.argsort(self.integers(0, 1 << 31, count), kind="stable")]


def paint_background(stream: Stream, size: int) -> Pixels:
    """Blotches, grain and a few thin lines; (size, size, 3)."""
    knots = stream.integer(2, 7)
    light = stream.integers(60, 191, knots * knots).reshape(knots, knots, 1)
    tint = stream.integers(-13, 14, 9 * knots * knots).reshape(knots, knots, 3, 3).sum(axis=3)
    canvas = _stretch((light + tint).astype(np.int32), size)
    canvas = canvas + (_grain(stream, size) * stream.integer(8, 36) >> 8)
    for _ in range(stream.integer(3, 8)):
        _draw_line(canvas, stream, size)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def add_grain(picture: Pixels, stream: Stream) -> Pixels:
    """A faint noise of its own for one frame of a clip."""
    return np.clip(picture + (_grain(stream, len(picture)) * 12 >> 8), 0, 255).astype(np.uint8)


def _grain(stream: Stream, size: int) -> NDArray[np.int32]:
    """Noise between -255 and 255, most of it near zero: the sum of two bytes of a word."""
    octets = stream.words(size * size * 3 // 4).astype("<u8").view(np.uint8).reshape(2, size, size, 3)
    return octets[0].astype(np.int32) + octets[1] - 255


def _stretch(knots: Integers, size: int) -> Integers:
    """Bilinear interpolation in whole numbers; (k, k, 3) to (size, size, 3)."""
    last = len(knots) - 1
    at = np.arange(size, dtype=np.int32) * last
    left, right = at // (size - 1), np.minimum(at // (size - 1) + 1, last)
    rest = at % (size - 1)
    rows = knots[left] * (size - 1 - rest)[:, None, None] + knots[right] * rest[:, None, None]
    both = rows[:, left] * (size - 1 - rest)[None, :, None] + rows[:, right] * rest[None, :, None]
    return np.asarray(both // (size - 1) ** 2)


def _draw_line(canvas: Integers, stream: Stream, size: int) -> None:
    x0, y0, x1, y1 = (int(v) for v in stream.integers(0, size, 4))
    steps = max(abs(x1 - x0), abs(y1 - y0), 1)
    along = np.arange(steps + 1)
    canvas[y0 + (y1 - y0) * along // steps, x0 + (x1 - x0) * along // steps] = stream.integers(0, 256, 3)


def shape_mask(name: str, radius: int) -> Mask:
    """Where a shape covers a square of 2 * radius + 1 pixels; KeyError for a name that is none."""
    span = np.arange(-radius, radius + 1) * UNIT // radius
    return _RULES[name](span[None, :], span[:, None])


def _circle(x: Integers, y: Integers) -> Mask:
    return x * x + y * y <= UNIT * UNIT


def _ring(x: Integers, y: Integers) -> Mask:
    distance = x * x + y * y
    return (distance <= UNIT * UNIT) & (distance >= 560 * 560)


def _square(x: Integers, y: Integers) -> Mask:
    return (abs(x) <= 850) & (abs(y) <= 850)


def _triangle(x: Integers, y: Integers) -> Mask:
    return (y <= 850) & (abs(x) * 1850 <= (y + UNIT) * UNIT)


def _cross(x: Integers, y: Integers) -> Mask:
    return ((abs(x) <= 340) | (abs(y) <= 340)) & (abs(x) <= UNIT) & (abs(y) <= UNIT)


def _diamond(x: Integers, y: Integers) -> Mask:
    return abs(x) * UNIT + abs(y) * 780 <= 780 * UNIT


def _heart(x: Integers, y: Integers) -> Mask:
    lobes = (abs(x) - 470) ** 2 + (y + 400) ** 2 <= 540 * 540
    return lobes | ((y >= -250) & (abs(x) * 1250 <= (UNIT - y) * 960))


_STAR = (
    ((0, -1100), (264, -364), (1046, -340), (428, 139), (647, 890)),
    ((0, 450), (-647, 890), (-428, 139), (-1046, -340), (-264, -364)),
)
"""Corners, clockwise from the tip: alternately at 1100 and at 450 from the centre, every 36 degrees."""


def _star(x: Integers, y: Integers) -> Mask:
    corners = _STAR[0] + _STAR[1]
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        crosses = (y0 > y) != (y1 > y)
        side = (x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)
        inside ^= crosses & ((side < 0) == (y1 > y0))
    return inside


_RULES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "ring": _ring,
    "diamond": _diamond,
    "heart": _heart,
}

_GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
GLYPH_SCALE = 2


def digit_mask(digit: int) -> Mask:
    """Ink of a digit, 0 to 9, on a field of 14 by 10 pixels."""
    rows = [[bit == "1" for bit in row] for row in _GLYPHS[digit].split()]
    return np.kron(np.array(rows), np.ones((GLYPH_SCALE, GLYPH_SCALE), dtype=bool))
