"""How many visual tokens stay behind which decoder layer, so that the average over all layers is what was asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.errors import InvalidOption
from vtprune.types import Budget

_STEPS = 60
_STEEPEST = 2.0**12
_ROUNDING = 1e-6
_SLIGHT = 1e-9
"""A share that stands for the fewest a budget allows; at a share of 0 all tokens leave."""


def drop_layer(at: float | int, depth: int, *, first: int = 1) -> int:
    """The first layer that runs on the shorter sequence, out of `depth`: `at` is its number, or its share of the depth.

    A share is rounded half up and moved up to `first`, as few layers as must see everything.

    Raises:
        InvalidOption: for a number of no layer, or one before `first`.
    """
    if isinstance(at, int):
        if not first <= at < depth:
            raise InvalidOption(
                f"a cut in front of decoder layer {at}: this model has layers 0 to {depth - 1} and can be cut in "
                f"front of {first} to {depth - 1}; a share of the depth is written as a float"
            )
        return at
    return min(depth - 1, max(first, int(at * depth + 0.5)))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Drop points of a method on a model of `depth` layers: `layers`, ascending, and the `shares` published for them.

    `stages` are the numbers of the stages that cut there. `before` is the share published for the cut before the
    language model. All are shares of the tokens at first. Other averages are reached by raising all shares to one
    power: order and ratios of their logarithms stay. `measured` names parameters of the method that a calibration
    brought: errors tell of them.
    """

    depth: int
    layers: tuple[int, ...]
    shares: tuple[float, ...]
    stages: tuple[int, ...]
    before: float = 1.0
    measured: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        points: Sequence[tuple[float | int, float]],
        *,
        depth: int,
        first: int = 1,
        before: float = 1.0,
        measured: tuple[str, ...] = (),
    ) -> Schedule:
        """The schedule of published `(at, share)`; where two fall on one layer of a shallow model, the later holds."""
        found: dict[int, int] = {}
        for number, (at, _) in enumerate(points):
            layer = drop_layer(at, depth, first=first)
            if found and layer < max(found):
                raise InvalidOption(f"drop points must ascend, layer {layer} comes after layer {max(found)}")
            found[layer] = number
        stages = tuple(found.values())
        shares = tuple(points[number][1] for number in stages)
        if any(later > earlier for earlier, later in itertools.pairwise((before, *shares))):
            raise InvalidOption(f"shares {(before, *shares)} of a schedule: tokens that left do not come back")
        return cls(depth=depth, layers=tuple(found), shares=shares, stages=stages, before=before, measured=measured)

    def average(self, shares: tuple[float, ...]) -> float:
        """Share of the tokens at first that a layer sees, on average; `shares` as `solve` gives them."""
        bounds = (0, *self.layers, self.depth)
        passed = [stop - start for start, stop in itertools.pairwise(bounds)]
        return sum(share * layers for share, layers in zip(shares, passed, strict=True)) / self.depth

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest average there is: nothing or all stays wherever the shares leave a choice."""
        return self.average(self._powered(_STEEPEST)), self.average(self._powered(0.0))

    def solve(self, keep: float) -> tuple[float, ...]:
        """Shares (before, behind each drop point) whose average is `keep`.

        Raises:
            InvalidOption: for an average below what the layers before the first drop point cost, or above what those
                cost that all tokens have left.
        """
        lowest, highest = self.reach
        if keep >= 1 and highest == 1:
            return (1.0,) * (1 + len(self.shares))
        if not lowest - _ROUNDING <= keep <= highest + _ROUNDING:
            raise InvalidOption(
                f"keep={keep:.4g} is the average over {self.depth} decoder layers; with cuts in front of layers "
                f"{', '.join(map(str, self.layers))} this method reaches {lowest:.4g} to {highest:.4g}"
                + self._told("smaller" if keep > highest else "larger")
            )
        low, high = 0.0, 1.0
        while high < _STEEPEST and self.average(self._powered(high)) > keep:
            high *= 2
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.average(self._powered(middle)) > keep else (low, middle)
        return self._powered(high)

    def counts(self, n: int, budget: Budget) -> tuple[int, ...]:
        """Tokens of `n` that stay before the language model and behind each drop point.

        Each is rounded by itself, so that the average is met to within half a token where the floor asks for no more.
        """
        return tuple(
            Budget(keep=share, floor=budget.floor).resolve(n) if share else 0 for share in self._shares(n, budget)
        )

    def _shares(self, n: int, budget: Budget) -> tuple[float, ...]:
        if isinstance(budget.keep, float):
            return self.solve(budget.keep)
        lowest, highest = self.reach
        if budget.keep < (lowest - _ROUNDING) * n:
            points = ", ".join(map(str, self.layers))
            raise InvalidOption(
                f"keep={budget.keep} of {n} tokens is the average over {self.depth} decoder layers; with cuts in front "
                f"of layers {points} this method reaches {lowest:.4g} to {highest:.4g} of them, that is "
                f"{math.ceil((lowest - _ROUNDING) * n)} at least" + self._told("larger")
            )
        return self.solve(min(highest, budget.keep / max(n, 1)))

    def _told(self, way: str) -> str:
        """What an error adds where the layers come from a calibration."""
        if not self.measured:
            return ""
        own = ", ".join(f"{name}=..." for name in self.measured)
        return f". Its {' and '.join(self.measured)} came from the calibration: take a {way} keep, or pass {own}"

    def _powered(self, power: float) -> tuple[float, ...]:
        return tuple(max(share**power, _SLIGHT) if share else 0.0 for share in (self.before, *self.shares))
