"""Drawn scenes with questions: coloured shapes and a number sign on a cluttered ground.

Everything follows from an integer seed. The seeds of training, development and test scenes are apart: recipes are
chosen on development scenes, tables are made on test scenes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtprune.tiny.drawing import Mask, Pixels, Stream, digit_mask, paint_background, shape_mask

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "diamond", "heart")
PLURALS = ("circles", "squares", "triangles", "crosses", "stars", "rings", "diamonds", "hearts")
COLORS = {
    "red": (225, 30, 30),
    "green": (30, 170, 40),
    "blue": (35, 60, 230),
    "yellow": (240, 225, 30),
    "purple": (150, 40, 190),
    "orange": (250, 140, 20),
    "white": (250, 250, 250),
    "black": (8, 8, 8),
}
PLACES = ("topleft", "topright", "bottomleft", "bottomright")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
KINDS = ("color", "shape", "where", "exist", "left", "number", "count")

TRAIN = range(0, 1 << 40)
DEVELOPMENT = range(1 << 40, (1 << 40) + (1 << 20))
TEST = range(1 << 41, (1 << 41) + (1 << 20))

SIZE = 128
RADII = (6, 11)
_PLATE, _INK = (236, 222, 186), (48, 32, 16)
_GAP = 3
_NOTHING = -1

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A shape or a number sign. `box`: left, top, and, exclusive, right and bottom, in pixels."""

    shape: str | None = None
    color: str | None = None
    digit: int | None = None
    box: tuple[int, int, int, int]

    @property
    def x(self) -> int:
        """Column of the centre."""
        return (self.box[0] + self.box[2]) // 2

    @property
    def y(self) -> int:
        """Row of the centre."""
        return (self.box[1] + self.box[3]) // 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """A picture, (SIZE, SIZE, 3); what is in it; and `owner`, (SIZE, SIZE): which thing painted a pixel, or -1."""

    pixels: Pixels
    things: tuple[Thing, ...]
    owner: NDArray[np.int8]

    def coverage(self, patch: int) -> NDArray[np.float64]:
        """Share of every patch that each thing covers; (things, rows, columns)."""
        side = len(self.owner) // patch
        cells = self.owner[: side * patch, : side * patch].reshape(side, patch, side, patch)
        return np.array([(cells == i).mean(axis=(1, 3)) for i in range(len(self.things))]).reshape(-1, side, side)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with a one-word answer. `about`: indices of the things one has to see to answer."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


def draw_scene(seed: int, *, shapes: Span = (2, 5), signs: Span = (0, 1)) -> Scene:
    """The scene of a seed.

    Args:
        shapes: least and largest number of shapes; fewer are drawn where no room is left.
        signs: least and largest number of number signs.
    """
    stream = Stream(seed)
    pixels, things, owner = place_things(stream, paint_background(stream, SIZE), shapes, signs)
    return Scene(pixels=pixels, things=tuple(things), owner=owner)


def place_things(
    stream: Stream, ground: Pixels, shapes: Span, signs: Span
) -> tuple[Pixels, list[Thing], NDArray[np.int8]]:
    """Shapes and signs on a copy of the ground, with what they are and which pixels are whose."""
    pixels = ground.copy()
    owner = np.full(pixels.shape[:2], _NOTHING, dtype=np.int8)
    things: list[Thing] = []
    wanted = stream.integer(shapes[0], shapes[1] + 1)
    for _ in range(stream.integer(signs[0], signs[1] + 1)):
        _place_sign(stream, pixels, owner, things)
    for _ in range(wanted):
        _place_shape(stream, pixels, owner, things)
    return pixels, things, owner


def _place_shape(stream: Stream, pixels: Pixels, owner: NDArray[np.int8], things: list[Thing]) -> None:
    radius = stream.integer(*RADII)
    shape = SHAPES[stream.integer(0, len(SHAPES))]
    known = [thing.shape for thing in things if thing.shape]
    if known and stream.chance(35):
        shape = known[stream.integer(0, len(known))]
    color = tuple(COLORS)[stream.integer(0, len(COLORS))]
    paint = np.clip(np.array(COLORS[color]) + stream.integers(-14, 15, 3), 0, 255)
    mask = shape_mask(shape, radius)
    spot = _find_room(stream, owner, mask.shape)
    if spot is not None:
        _stamp(pixels, owner, spot, mask, paint, len(things))
        things.append(Thing(shape=shape, color=color, box=_box(spot, mask)))


def _place_sign(stream: Stream, pixels: Pixels, owner: NDArray[np.int8], things: list[Thing]) -> None:
    digit = stream.integer(0, 10)
    ink = np.pad(digit_mask(digit), ((3, 3), (4, 4)))
    spot = _find_room(stream, owner, ink.shape)
    if spot is not None:
        _stamp(pixels, owner, spot, np.ones_like(ink), np.array(_PLATE), len(things))
        _stamp(pixels, owner, spot, ink, np.array(_INK), len(things))
        things.append(Thing(digit=digit, box=_box(spot, ink)))


def _find_room(stream: Stream, owner: NDArray[np.int8], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Top and left of a field of that shape that touches nothing yet, or None after sixty tries."""
    height, width = shape
    for _ in range(60):
        top = stream.integer(0, len(owner) - height + 1)
        left = stream.integer(0, len(owner) - width + 1)
        around = owner[max(0, top - _GAP) : top + height + _GAP, max(0, left - _GAP) : left + width + _GAP]
        if (around == _NOTHING).all():
            return top, left
    return None


def _stamp(
    pixels: Pixels, owner: NDArray[np.int8], spot: tuple[int, int], mask: Mask, paint: NDArray[np.int64], index: int
) -> None:
    field = np.s_[spot[0] : spot[0] + mask.shape[0], spot[1] : spot[1] + mask.shape[1]]
    pixels[field][mask] = paint
    owner[field][mask] = index


def _box(spot: tuple[int, int], mask: Mask) -> tuple[int, int, int, int]:
    (top, left), (height, width) = spot, mask.shape
    return left, top, left + width, top + height


def ask(scene: Scene, stream: Stream) -> list[Question]:
    """Every unambiguous question about a scene, in random order; some of them ask for what is not there."""
    questions = [
        *_ask_attributes(scene),
        *_ask_existence(scene, stream),
        *_ask_order(scene, stream),
        *_ask_count(scene, stream),
    ]
    return [questions[i] for i in stream.shuffled(len(questions))]


def _ask_attributes(scene: Scene) -> Iterator[Question]:
    shapes = [thing.shape for thing in scene.things]
    colors = [thing.color for thing in scene.things]
    middle = len(scene.pixels) // 2
    for i, thing in enumerate(scene.things):
        if thing.shape is None or thing.color is None:
            if len(scene.things) - sum(shape is not None for shape in shapes) == 1:
                yield Question(kind="number", text="what number is shown ?", answer=str(thing.digit), about=(i,))
            continue
        if shapes.count(thing.shape) == 1:
            text = f"what color is the {thing.shape} ?"
            yield Question(kind="color", text=text, answer=thing.color, about=(i,))
            if min(abs(thing.x - middle), abs(thing.y - middle)) > middle // 8:
                place = PLACES[(thing.x > middle) + 2 * (thing.y > middle)]
                yield Question(kind="where", text=f"where is the {thing.shape} ?", answer=place, about=(i,))
        if colors.count(thing.color) == 1:
            text = f"what shape is {thing.color} ?"
            yield Question(kind="shape", text=text, answer=thing.shape, about=(i,))


def _ask_existence(scene: Scene, stream: Stream) -> Iterator[Question]:
    """One thing that is there and one that is not: half of the time the shape of one and the colour of another."""
    there = [(thing.color, thing.shape) for thing in scene.things if thing.shape]
    if there:
        color, shape = there[stream.integer(0, len(there))]
        about = tuple(i for i, thing in enumerate(scene.things) if (thing.color, thing.shape) == (color, shape))
        yield Question(kind="exist", text=f"is there a {color} {shape} ?", answer="yes", about=about)
    every = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in there]
    colors, shapes = {color for color, _ in there}, {shape for _, shape in there}
    mixed = [pair for pair in every if pair[0] in colors and pair[1] in shapes]
    choice = mixed if mixed and stream.chance(50) else every
    color, shape = choice[stream.integer(0, len(choice))]
    yield Question(kind="exist", text=f"is there a {color} {shape} ?", answer="no")


def _ask_order(scene: Scene, stream: Stream) -> Iterator[Question]:
    """Whether one shape is left of another, for a random pair that is clearly apart."""
    shapes = [thing.shape for thing in scene.things]
    single = [i for i, thing in enumerate(scene.things) if thing.shape and shapes.count(thing.shape) == 1]
    if len(single) < 2:
        return
    first, second = (single[i] for i in stream.shuffled(len(single))[:2])
    one, other = scene.things[first], scene.things[second]
    if abs(one.x - other.x) > len(scene.pixels) // 12:
        text = f"is the {one.shape} left of the {other.shape} ?"
        answer = "yes" if one.x < other.x else "no"
        yield Question(kind="left", text=text, answer=answer, about=(first, second))


def _ask_count(scene: Scene, stream: Stream) -> Iterator[Question]:
    """How many there are of one shape: mostly of the commonest, at times of one that may be absent."""
    shapes = [thing.shape for thing in scene.things if thing.shape]
    chosen = SHAPES[stream.integer(0, len(SHAPES))]
    if shapes and not stream.chance(20):
        chosen = max(shapes, key=shapes.count) if stream.chance(60) else shapes[stream.integer(0, len(shapes))]
    about = tuple(i for i, thing in enumerate(scene.things) if thing.shape == chosen)
    text = f"how many {PLURALS[SHAPES.index(chosen)]} ?"
    yield Question(kind="count", text=text, answer=NUMBERS[len(about)], about=about)
