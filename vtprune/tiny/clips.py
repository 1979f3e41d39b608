"""Short drawn clips with questions: most of what is asked for shows up in one or two frames only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtprune.tiny.drawing import Pixels, Stream, add_grain, paint_background
from vtprune.tiny.scenes import SIZE, Question, Scene, Span, Thing, ask, place_things

FRAMES = 8
CLIP_KINDS = ("color", "shape", "where", "exist", "left", "number")
_SHOWN = (1, 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Clip:
    """Frames, (T, SIZE, SIZE, 3); everything that is in any of them; and which thing painted a pixel of which frame."""

    frames: Pixels
    things: tuple[Thing, ...]
    owner: NDArray[np.int8]

    def frame(self, index: int) -> Scene:
        """One frame as a picture; only what is visible in it counts as being there."""
        return self.taking([index]).views[0]

    def taking(self, indices: Sequence[int]) -> Clip:
        """The clip of those frames; only what is visible in any of them counts as being there."""
        things, owner = _visible(self.things, self.owner[indices])
        return Clip(frames=self.frames[indices], things=things, owner=owner)

    @property
    def views(self) -> tuple[Scene, ...]:
        """Every frame with all things of the clip, seen or not, so that they have the same numbers everywhere."""
        return tuple(
            Scene(pixels=pixels, things=self.things, owner=owner)
            for pixels, owner in zip(self.frames, self.owner, strict=True)
        )

    @property
    def whole(self) -> Scene:
        """All that is ever seen at once, for questions about the clip."""
        return Scene(pixels=self.frames[0], things=self.things, owner=self.owner.max(axis=0))

    def frames_with(self, thing: int) -> list[int]:
        """In which frames a thing is to be seen."""
        return [t for t, owner in enumerate(self.owner) if (owner == thing).any()]


def draw_clip(seed: int, *, shapes: Span = (2, 4), signs: Span = (0, 1), frames: int = FRAMES) -> Clip:
    """The clip of a seed: one thing stays all the time, every other one is shown in one or two frames in a row.

    No two things ever share a place, so that questions about places have one answer.
    """
    stream = Stream(seed)
    ground = paint_background(stream, SIZE)
    full, things, owner = place_things(stream, ground, shapes, signs)
    order = stream.shuffled(len(things))
    shown = np.zeros((len(things), frames), dtype=bool)
    for turn, thing in enumerate(order):
        length = frames if turn == 0 else stream.integer(_SHOWN[0], _SHOWN[1] + 1)
        first = stream.integer(0, frames - length + 1)
        shown[thing, first : first + length] = True
    owners = np.stack([np.where((owner >= 0) & _flags(shown[:, t], owner), owner, -1) for t in range(frames)])
    pictures = np.where((owners >= 0)[..., None], full, ground)
    grainy = np.stack([add_grain(picture, stream) for picture in pictures])
    return Clip(frames=grainy, things=tuple(things), owner=owners.astype(np.int8))


def _flags(shown: NDArray[np.bool_], owner: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Whether the owner of a pixel is shown; anything where nobody owns it."""
    return np.append(shown, False)[owner]


def _visible(things: tuple[Thing, ...], owner: NDArray[np.int8]) -> tuple[tuple[Thing, ...], NDArray[np.int8]]:
    """The things one can see, and the owners renumbered accordingly."""
    there = [i for i in range(len(things)) if (owner == i).any()]
    renumbered = np.full(len(things) + 1, -1, dtype=np.int8)
    renumbered[there] = range(len(there))
    return tuple(things[i] for i in there), renumbered[owner]


def ask_clip(clip: Clip, stream: Stream) -> list[Question]:
    """Questions about a whole clip; how many there are is not asked, since things come and go."""
    return [question for question in ask(clip.whole, stream) if question.kind in CLIP_KINDS]


def ask_frame(clip: Clip, index: int, stream: Stream) -> list[Question]:
    """What of the clip is there in one frame, and what is not: the questions that frames are scored by."""
    return [question for question in ask(clip.frame(index), stream) if question.kind == "exist"]
