"""The search: spread first, then steps from the best, inside the cube and the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vtprune.eval.searching import Point, Search, latin, reflected

CENTRE = np.array([0.9, 0.3, 0.5, 0.05])


def close(point: Point) -> float:
    return float(-((point - CENTRE) ** 2).sum())


def found(value: Callable[[Point], float], trials: int, seed: int = 0, start: Point | None = None) -> list[Point]:
    """All points that a search tries."""
    search, tried = Search(axes=4, trials=trials, seed=seed), []
    if start is not None:
        search.tell(start, value(start))
    for _ in range(trials):
        tried.append(search.ask())
        search.tell(tried[-1], value(tried[-1]))
    assert search.value == max(value(point) for point in tried + ([] if start is None else [start]))
    assert search.value == value(search.best)
    return tried


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_every_slice_of_every_axis_is_tried_once(count: int) -> None:
    points = latin(np.random.default_rng(0), count, 4)
    assert points.shape == (count, 4)
    for axis in range(4):
        assert sorted((points[:, axis] * count).astype(int)) == list(range(count))


def test_half_of_the_trials_are_spread_and_the_others_come_close() -> None:
    tried = np.array(found(close, 40))
    for axis in range(4):
        assert sorted((tried[:20, axis] * 20).astype(int)) == list(range(20))
    spread, steps = (max(map(close, own)) for own in (tried[:20], tried[20:]))
    assert steps > spread > close(np.full(4, 0.5)) - 1
    assert steps > -0.02


def test_a_seed_gives_the_same_again_and_another_one_others() -> None:
    first, again, other = (np.array(found(close, 9, seed)) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_points_stay_in_the_cube() -> None:
    tried = np.array(found(lambda point: float(point.sum()), 60))
    assert tried.min() >= 0 and tried.max() <= 1
    assert reflected(np.array([-0.25, 1.25, 2.5, 0.0, 1.0, -1.75])) == pytest.approx([0.25, 0.75, 0.5, 0.0, 1.0, 0.25])


def test_steps_go_from_the_start_where_nothing_is_better() -> None:
    """And become shorter, failure by failure."""
    tried = np.array(found(close, 60, start=CENTRE))
    far = np.abs(tried[30:] - CENTRE).max(axis=1)
    assert far[-10:].max() < 0.02 < far[:5].max()


def test_a_search_of_one_trial_has_one() -> None:
    search = Search(axes=2, trials=1)
    assert search.ask().shape == (2,)
    assert Search(axes=2, trials=0).ask().shape == (2,)
    assert not search.tell(np.zeros(2), float("-inf"))
    assert search.tell(np.zeros(2), 0.5) and not search.tell(np.ones(2), 0.5)
