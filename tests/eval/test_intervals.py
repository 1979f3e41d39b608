"""Intervals of cases that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vtprune.eval.intervals import FEW, Resamples


def everything(values: np.ndarray) -> np.ndarray:
    return np.ones(len(values), dtype=bool)


def test_what_never_happened_may_still_happen_in_three_of_so_many_scenes() -> None:
    resamples = Resamples(range(30), seed=0)
    for value, expected in ((0.0, (0.0, 0.1)), (1.0, (0.9, 1.0))):
        values = np.full(30, value)
        assert resamples.interval(values, everything(values)) == pytest.approx(expected)


def test_a_difference_that_is_always_the_same_leaves_no_room() -> None:
    values = np.full(30, -1.0)
    assert Resamples(range(30), seed=0).interval(values, everything(values), least=-1.0) == (-1.0, -1.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_single_questions_have_the_width_of_a_binomial(seed: int) -> None:
    values = np.arange(400) % 2 == 0
    low, high = Resamples(range(400), seed=seed).interval(values.astype(float), everything(values))
    half = 1.96 * math.sqrt(0.25 / 400)
    assert low == pytest.approx(0.5 - half, abs=0.01)
    assert high == pytest.approx(0.5 + half, abs=0.01)


def test_questions_of_one_scene_count_as_one() -> None:
    scenes = np.arange(400) // 8
    alike = (scenes % 2).astype(float)
    low, high = Resamples(scenes, seed=0).interval(alike, everything(alike))
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 50), abs=0.03)
    mixed = (np.arange(400) % 2).astype(float)
    assert Resamples(scenes, seed=0).interval(mixed, everything(mixed)) == (0.5, 0.5)


def test_only_what_is_chosen_counts() -> None:
    values = np.concatenate([np.ones(20), np.zeros(20)])
    chosen = values == 1
    assert Resamples(np.arange(40) % 20, seed=0).interval(values, chosen) == pytest.approx((1 - 3 / 20, 1.0))


def test_differences_are_paired() -> None:
    first = np.random.default_rng(0).integers(0, 2, 200).astype(float)
    resamples = Resamples(np.arange(200) // 4, seed=0)
    assert resamples.interval(first - first, everything(first), least=-1.0) == (0.0, 0.0)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:10]] = 1
    low, high = resamples.interval(second - first, everything(first), least=-1.0)
    assert 0 <= low < 0.05 < high
    alone = resamples.interval(second, everything(first)), resamples.interval(first, everything(first))
    assert alone[0][0] < alone[1][1]


def test_a_few_scenes_tell_nothing() -> None:
    values = np.ones(FEW - 1)
    resamples = Resamples(range(FEW - 1), seed=0)
    assert resamples.interval(values, everything(values)) == (0.0, 1.0)
    assert resamples.interval(values, everything(values), least=-1.0) == (-1.0, 1.0)


def test_the_draw_follows_from_the_seed() -> None:
    values = (np.arange(50) % 3 == 0).astype(float)
    draws = [Resamples(range(50), seed=seed).interval(values, everything(values)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] == pytest.approx(draws[2], abs=0.05)
