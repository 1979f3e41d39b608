"""Questions about drawn scenes and clips, and the truth about them: which of their tokens show a thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.tiny.clips import ask_clip, draw_clip
from vtprune.tiny.drawing import Stream
from vtprune.tiny.scenes import DEVELOPMENT, NUMBERS, TEST, Question, Scene, ask, draw_scene
from vtprune.types import Modality, Part

QUESTIONS = 8
"""At most so many of one scene."""
SPLITS = {"dev": DEVELOPMENT, "test": TEST}
OBJECT_SHARE = 0.15
"""From this share on, a token whose cell is covered by things counts as an object token."""

_WHOLE = ("image", "thumbnail", "crop")
_DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """One question about a scene, or about a clip, whose `views` are its frames.

    `number` counts the scenes or clips of the run; `other` is the one after it, for blind answers.
    """

    modality: Modality
    number: int
    seed: int
    views: tuple[Scene, ...]
    other: tuple[Scene, ...]
    question: Question


def draw_items(split: str, first: int, samples: int, modality: Modality = "image") -> tuple[Item, ...]:
    """Questions about the scenes (or clips) `first` to `first + samples - 1` of a split, at most `QUESTIONS` of each.

    Raises:
        InvalidOption: for an unknown split, or numbers outside of it.
    """
    if split not in SPLITS:
        raise InvalidOption(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    seeds = SPLITS[split]
    if samples < 1 or first < 0 or first + samples >= len(seeds):
        raise InvalidOption(
            f"scenes {first} to {first + samples - 1}: expected at least one, and numbers from 0 to {len(seeds) - 2}"
        )
    draw = _draw_clip if modality == "video" else _draw_scene
    drawn = [draw(seeds[first + i]) for i in range(samples + 1)]
    return tuple(
        Item(
            modality=modality,
            number=i,
            seed=seeds[first + i],
            views=drawn[i][0],
            other=drawn[i + 1][0],
            question=question,
        )
        for i in range(samples)
        for question in drawn[i][1][:QUESTIONS]
    )


def _draw_scene(seed: int) -> tuple[tuple[Scene, ...], list[Question]]:
    scene = draw_scene(seed)
    return (scene,), ask(scene, Stream(~seed))


def _draw_clip(seed: int) -> tuple[tuple[Scene, ...], list[Question]]:
    clip = draw_clip(seed)
    return clip.views, ask_clip(clip, Stream(~seed))


def judged(text: str) -> str:
    """What counts of an answer: its first word, in small letters, without punctuation; numbers as digits."""
    words = text.casefold().split()
    word = words[0].strip(".,;:!?\"'*()") if words else ""
    return _DIGITS.get(word, word)


def coverage(views: Sequence[Scene], parts: Sequence[Part]) -> NDArray[np.float64]:
    """Share of every token's cell that each thing covers, (things, N), for square pictures seen whole.

    Several frames of a clip that make one part count by their mean.

    Raises:
        UnsupportedCall: for tiles, and for frames that were left out or repeated: it is not known what they show.
    """
    frames = [part for part in parts if part.kind == "frame"]
    if frames and len(views) % len(frames):
        raise UnsupportedCall(f"it is not known which of {len(views)} frames {len(frames)} parts show")
    found = []
    for part in parts:
        if part.kind == "frame":
            apart = len(views) // len(frames)
            turn = frames.index(part)
            painted = np.mean([view.coverage(1) for view in views[turn * apart : (turn + 1) * apart]], axis=0)
        elif part.kind in _WHOLE or len(parts) == 1:
            painted = views[0].coverage(1)
        else:
            raise UnsupportedCall(f"it is not known which cells of the picture the tokens of a {part.kind} show")
        rows, columns = (_overlap(cells, painted.shape[-1]) for cells in part.grid)
        found.append((rows @ painted @ columns.T).reshape(len(painted), part.tokens))
    return np.concatenate(found, axis=1)


def _overlap(cells: int, pixels: int) -> NDArray[np.float64]:
    """Share of every cell that lies in every pixel, (cells, pixels), along one side."""
    edges = np.arange(cells + 1) * (pixels / cells)
    left = np.arange(pixels)
    inside = np.minimum(edges[1:, None], left + 1) - np.maximum(edges[:-1, None], left)
    share: NDArray[np.float64] = inside.clip(min=0) * (cells / pixels)
    return share


def object_tokens(views: Sequence[Scene], parts: Sequence[Part]) -> NDArray[np.bool_]:
    """Which tokens show things, (N,)."""
    covered: NDArray[np.bool_] = coverage(views, parts).sum(axis=0) >= OBJECT_SHARE
    return covered


def in_turn(covered: NDArray[np.float64]) -> list[int]:
    """Tokens that show anything, best first, in rounds: every thing gets one before any gets its next.

    In a round each thing names the token it covers most of those that are left; large shares come first.

    Args:
        covered: (things, N), see `coverage`.
    """
    queues = [[int(i) for i in np.argsort(-row, kind="stable") if row[i] > 0] for row in covered]
    order: list[int] = []
    while any(queues):
        named = sorted((-covered[thing][queue[0]], thing) for thing, queue in enumerate(queues) if queue)
        for _, thing in named:
            token = next((token for token in queues[thing] if token not in order), None)
            if token is not None:
                order.append(token)
        queues = [[token for token in queue if token not in order] for queue in queues]
    return order
