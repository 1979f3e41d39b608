"""How many visual tokens stay behind which decoder layer, so that the average over all layers is what was asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.errors import InvalidOption
from vtprune.types import Budget, Per

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


class _Budgeted:
    """What has an average over `depth` layers, cut in front of `layers`, and solves shares for one."""

    depth: int
    layers: tuple[int, ...]

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest average there is."""
        raise NotImplementedError

    def solve(self, keep: float) -> tuple[float, ...]:
        """Shares (before, behind each drop point) for an average of `keep`."""
        raise NotImplementedError

    def average(self, shares: tuple[float, ...]) -> float:
        """Share of the tokens at first that a layer sees, on average; `shares` as `solve` gives them."""
        bounds = (0, *self.layers, self.depth)
        passed = [stop - start for start, stop in itertools.pairwise(bounds)]
        return sum(share * layers for share, layers in zip(shares, passed, strict=True)) / self.depth

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
            raise InvalidOption(
                f"keep={budget.keep} of {n} tokens is the average over {self.depth} decoder layers; with cuts in front "
                f"of layers {self._points} this method reaches {lowest:.4g} to {highest:.4g} of them, that is "
                f"{math.ceil((lowest - _ROUNDING) * n)} at least" + self._told("larger")
            )
        return self.solve(min(highest, budget.keep / max(n, 1)))

    def _check(self, keep: float) -> None:
        """Raise `InvalidOption` for an average out of reach."""
        lowest, highest = self.reach
        if not lowest - _ROUNDING <= keep <= highest + _ROUNDING:
            raise InvalidOption(
                f"keep={keep:.4g} is the average over {self.depth} decoder layers; with cuts in front of layers "
                f"{self._points} this method reaches {lowest:.4g} to {highest:.4g}"
                + self._told("smaller" if keep > highest else "larger")
            )

    @property
    def _points(self) -> str:
        return ", ".join(map(str, self.layers))

    def _told(self, way: str) -> str:
        """What an error adds where the layers come from a calibration."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Schedule(_Budgeted):
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
        if keep >= 1 and self.reach[1] == 1:
            return (1.0,) * (1 + len(self.shares))
        self._check(keep)
        low, high = 0.0, 1.0
        while high < _STEEPEST and self.average(self._powered(high)) > keep:
            high *= 2
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.average(self._powered(middle)) > keep else (low, middle)
        return self._powered(high)

    def _told(self, way: str) -> str:
        if not self.measured:
            return ""
        own = ", ".join(f"{name}=..." for name in self.measured)
        return f". Its {' and '.join(self.measured)} came from the calibration: take a {way} keep, or pass {own}"

    def _powered(self, power: float) -> tuple[float, ...]:
        return tuple(max(share**power, _SLIGHT) if share else 0.0 for share in (self.before, *self.shares))


@dataclass(frozen=True, kw_only=True)
class ExitSchedule(_Budgeted):
    """Drop points in front of `layers`, all from the first one on, where tokens may leave: all of a picture or none.

    What the budget decides is the last layer: none goes through more of them than the average pays for, so that it is
    never exceeded. `checks` tells where tokens may leave before; `stages` are the numbers of the stages that cut.
    """

    depth: int
    layers: tuple[int, ...]
    checks: tuple[bool, ...]

    @classmethod
    def of(cls, at: float | int, *, depth: int, first: int = 1, every: int = 1) -> ExitSchedule:
        """Tokens may leave from `at` on, in front of each `every` layers."""
        layers = tuple(range(drop_layer(at, depth, first=first), depth))
        return cls(depth=depth, layers=layers, checks=tuple((layer - layers[0]) % every == 0 for layer in layers))

    @property
    def stages(self) -> tuple[int, ...]:
        """There is one stage, the first."""
        return (0,) * len(self.layers)

    @property
    def reach(self) -> tuple[float, float]:
        """All leave in front of the first of the layers, or none does."""
        return self.layers[0] / self.depth, 1.0

    def solve(self, keep: float) -> tuple[float, ...]:
        """Shares (before, behind each drop point): 1 up to the layers that an average of `keep` pays for, then 0.

        Raises:
            InvalidOption: for an average that does not pay for the layers in front of the first drop point.
        """
        self._check(keep)
        last = int(keep * self.depth + _ROUNDING)
        return (1.0, *(float(layer < last) for layer in self.layers))

    @property
    def _points(self) -> str:
        return f"{self.layers[0]} to {self.layers[-1]}"


AnySchedule = Schedule | ExitSchedule


@dataclass(frozen=True, kw_only=True)
class Front:
    """What a budget of the layers leaves in front of them: the side of `Budget` that an encoder asks."""

    schedule: AnySchedule
    budget: Budget

    @property
    def per(self) -> Per:
        """What the budget applies to."""
        return self.budget.per

    def resolve(self, n: int) -> int:
        """Number of `n` tokens that enter the language model."""
        return self.schedule.counts(n, self.budget)[0]

    def at_least(self, n: int) -> int:
        """As many of `n` tokens as can be left of them where they are a part of a picture, all under a number."""
        if isinstance(self.budget.keep, int):
            return n
        return Budget(keep=self.schedule.solve(self.budget.keep)[0], floor=self.budget.floor).at_least(n)


def in_front(budget: Budget, schedule: AnySchedule | None) -> Budget | Front:
    """What is left in front of the language model: the budget, or what a schedule makes of it."""
    return budget if schedule is None else Front(schedule=schedule, budget=budget)
