"""A search among few points: spread over the whole space first, then in steps from the best one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Point = NDArray[np.float64]
_FIRST_STEP = 0.2
_WIDER, _NARROWER = 1.5, 0.85


@dataclass(eq=False)
class Search:
    """Points of the unit cube of so many `axes`, one `ask` after the other, each answered by a `tell`.

    Half of `trials` are a Latin hypercube, the others steps from the best point so far: longer ones after a success,
    shorter ones after a failure, reflected at the sides. Equal for equal `seed` and answers.
    """

    axes: int
    trials: int
    seed: int = 0
    best: Point | None = None
    value: float = -np.inf
    _step: float = _FIRST_STEP
    _stepping: bool = False
    _spread: list[Point] = field(init=False)
    _random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._spread = list(reversed(latin(self._random, (self.trials + 1) // 2, self.axes)))

    def ask(self) -> Point:
        """The next point to try."""
        if self._spread:
            return self._spread.pop()
        if self.best is None:
            return self._random.random(self.axes)
        self._stepping = True
        return reflected(self.best + self._step * self._random.normal(size=self.axes))

    def tell(self, point: Point, value: float) -> bool:
        """What a point is worth, and whether it is the best so far; steps from it follow."""
        better = value > self.value
        if better:
            self.best, self.value = point, value
        if self._stepping:
            self._step *= _WIDER if better else _NARROWER
        return better


def latin(random: np.random.Generator, count: int, axes: int) -> Point:
    """Points (count, axes) of the unit cube, of which each of `count` equal slices of every axis holds one."""
    slices = np.stack([random.permutation(count) for _ in range(axes)], axis=1)
    found: Point = (slices + random.random((count, axes))) / count
    return found


def reflected(point: Point) -> Point:
    """The point of the unit cube that mirrors at its sides show."""
    inside: Point = 1 - np.abs(1 - np.mod(point, 2))
    return inside
