"""The schedule of VFlowOpt (arXiv 2508.05211) for one model: searched on hidden states of a calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtprune.adapters.base import language_model
from vtprune.api import pruning
from vtprune.calibration import Setting
from vtprune.catalog import build, describe
from vtprune.errors import InvalidOption
from vtprune.eval.searching import Point, Search
from vtprune.runtime.deep import schedule_of
from vtprune.schedule import Schedule
from vtprune.seam import find_base
from vtprune.types import Budget

METHOD = "vflowopt"
Makers = Sequence[Callable[[], dict[str, Any]]]
_AXES = 4
_MOST = 1.5
_LEAST = 0.02
_ROOM = 0.95
_DIGITS = 6
_THRESHOLDS = (1.0, 50.0)
_RECYCLED = (0.005, 0.5)


@dataclass(frozen=True, kw_only=True)
class Space:
    """Schedules of one average `keep` on a model of `depth` layers, cut in front of two `layers`: the unit cube.

    The axes are the share before the language model, from `keep` to 1.5 times that, as its authors search it; the
    first deep share; the threshold and the recycled share, both on a scale of logarithms. The second deep share
    follows from the average.
    """

    keep: float
    depth: int
    layers: tuple[int, int]

    @classmethod
    def of(cls, inner: nn.Module, keep: float) -> Space:
        """The space of a base model."""
        lm = language_model(inner)
        assert lm is not None
        schedule = schedule_of(build(METHOD), inner, lm)
        return cls(keep=keep, depth=schedule.depth, layers=(schedule.layers[0], schedule.layers[-1]))

    def at(self, point: Point) -> dict[str, Any]:
        """The parameters of a point."""
        before = round(_between(point[0], *self._before), _DIGITS)
        first = min(before, round(_between(point[1], *self._first(before)), _DIGITS))
        return {
            "shares": (before, first, min(first, round(self._second(before, first), _DIGITS))),
            "threshold": _rounded(_between(point[2], *_THRESHOLDS, log=True)),
            "recycled": _rounded(_between(point[3], *_RECYCLED, log=True)),
        }

    def point(self, parameters: dict[str, Any]) -> Point:
        """The point of parameters, their shares raised to the power that meets the average, or the nearest to them."""
        known, *deep = parameters["shares"]
        points = list(zip(self.layers, deep, strict=True))
        solved = Schedule.of(points, depth=self.depth, first=self.layers[0], before=known).solve(self.keep)
        before = min(solved[0], self._before[1])
        return np.array(
            [
                _place(before, *self._before),
                _place(solved[1], *self._first(before)),
                _place(parameters["threshold"], *_THRESHOLDS, log=True),
                _place(parameters["recycled"], *_RECYCLED, log=True),
            ]
        )

    @property
    def _before(self) -> tuple[float, float]:
        """Ends of the share before the language model: the layers up to the first cut leave room for the others."""
        early = self.layers[0]
        return self.keep, min(_MOST * self.keep, (1 + self.keep) / 2, _ROOM * self.keep * self.depth / early)

    def _first(self, before: float) -> tuple[float, float]:
        """Ends of the share behind the first cut: all that stays to the end, and so much that little is left for it."""
        early, late = self.layers
        left = self.keep * self.depth - early * before
        spent = (left - (self.depth - late) * _LEAST * self.keep) / max(late - early, 1)
        return left / (self.depth - early), before if early == late else min(before, spent)

    def _second(self, before: float, first: float) -> float:
        early, late = self.layers
        return (self.keep * self.depth - early * before - (late - early) * first) / (self.depth - late)


def check_search(model: nn.Module, keeps: Sequence[float]) -> None:
    """Raise what stands against a search, before any work: a budget that is no share, or what `wrap` raises."""
    for keep in keeps:
        if not isinstance(Budget(keep=keep).keep, float) or Budget(keep=keep).keeps_all:
            raise InvalidOption(f"keep={keep!r} to search a schedule for: expected a share in (0, 1)")
        with pruning(model, METHOD, keep=keep):
            pass


def search_settings(
    model: nn.Module, batches: Makers, keeps: Sequence[float], *, trials: int, seed: int, on_step: Callable[[], None]
) -> tuple[Setting, ...]:
    """The best settings of `trials` at each of `keeps`, the published ones being the first that are tried.

    What is compared is the hidden state behind the last layer, at the last token of the prompt, with that of the
    unpruned model: the mean of the cosines, of NaN 0.

    Args:
        model: a model that is not wrapped, and that passed `check_search`.
        batches: each makes the inputs of some prompts with one picture each, padded on the left.
        keeps: averages, as shares.
        trials: settings at each of them, 1 or more.
        seed: of the points that are tried.
        on_step: called after each batch, `len(batches) * (1 + trials * len(keeps))` times.
    """
    inner = find_base(model)
    whole = list(_states(inner, batches, on_step))

    def tried(keep: float, parameters: dict[str, Any]) -> tuple[float, float]:
        """The mean cosine, and the tokens that a picture keeps."""
        with pruning(model, METHOD, keep=keep, history=len(batches), **parameters) as pruner:
            states = list(_states(inner, batches, on_step))
            kept = sum(report.average for report in pruner.history) / sum(map(len, states))
        return agreement(states, whole), kept

    return tuple(_searched(Space.of(inner, keep), tried, trials, seed) for keep in dict.fromkeys(keeps))


def _searched(
    space: Space, tried: Callable[[float, dict[str, Any]], tuple[float, float]], trials: int, seed: int
) -> Setting:
    parameters = dict(describe(METHOD).parameters)
    published, kept = tried(space.keep, parameters)
    best = Setting(keep=space.keep, kept=kept, cosine=published, published=published, trials=trials, **parameters)
    search = Search(axes=_AXES, trials=trials - 1, seed=seed)
    search.tell(space.point(parameters), published)
    for _ in range(trials - 1):
        point = search.ask()
        cosine, kept = tried(space.keep, space.at(point))
        if search.tell(point, cosine):
            best = replace(best, cosine=cosine, kept=kept, **space.at(point))
    return best


def _states(inner: nn.Module, batches: Makers, on_step: Callable[[], None]) -> Iterator[Tensor]:
    """Of each batch, the hidden states (B, D) behind the last layer at the last token of the prompts."""
    for make in batches:
        with torch.no_grad():
            yield inner(**make()).last_hidden_state[:, -1].float().cpu()
        on_step()


def agreement(states: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean over all rows of the cosine with the other one, of NaN 0."""
    cosines = torch.cosine_similarity(torch.cat(list(states)).double(), torch.cat(list(others)).double(), dim=1)
    return float(cosines.nan_to_num(nan=0.0).mean())


def _between(share: float, low: float, high: float, *, log: bool = False) -> float:
    return float(low * (high / low) ** share if log else low + (high - low) * share)


def _place(value: float, low: float, high: float, *, log: bool = False) -> float:
    """The inverse of `_between`, in [0, 1]."""
    if high <= low:
        return 0.5
    share = np.log(max(value, low) / low) / np.log(high / low) if log else (value - low) / (high - low)
    return float(min(1.0, max(0.0, share)))


def _rounded(value: float) -> float:
    """To four digits: names of readings tell no more."""
    return float(f"{value:.4g}")
