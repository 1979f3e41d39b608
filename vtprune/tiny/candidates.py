"""What a question about drawn scenes may be about: every thing that would answer it or that it names."""

from __future__ import annotations

import itertools

from vtprune.tiny.scenes import COLORS, PLURALS, SHAPES

_NAMED = {**{shape: shape for shape in SHAPES}, **dict(zip(PLURALS, SHAPES, strict=True))}


def candidates(question: str) -> tuple[str, ...]:
    """Things such as "red circle", one of which must be seen to answer; empty where none is named.

    A shape without a colour stands for that shape in every colour, and a colour alone for every shape.
    """
    words = question.casefold().replace("?", " ").split()
    colors = [word for word in words if word in COLORS]
    shapes = [_NAMED[word] for word in words if word in _NAMED]
    if not colors and not shapes:
        return ()
    return tuple(f"{color} {shape}" for shape, color in itertools.product(shapes or SHAPES, colors or COLORS))
