"""Where all tokens of a picture stay or leave, the budget is the last layer in front of which they must."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.inside.test_schedule import mean, seen_by_layers
from vtprune import Pick, Pipeline
from vtprune.errors import InvalidOption
from vtprune.pipeline import LayerStage
from vtprune.schedule import ExitSchedule
from vtprune.stages.counters import AllOrNone
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import TopK
from vtprune.types import Budget

PICKS = (Pick(name="exit", scorer=Constant(), selector=TopK()),)


def test_the_last_layer_by_hand():
    """Of 32 layers 8 and more: half of them pay for 16, 0.49 of them for 15.68, and 0.999 for all but the last."""
    schedule = ExitSchedule.of(0.25, depth=32)
    assert schedule.layers == tuple(range(8, 32))
    for keep, last in ((0.25, 8), (0.5, 16), (0.49, 15), (0.999, 31)):
        assert schedule.counts(576, Budget(keep=keep)) == (576, *[576 if layer < last else 0 for layer in range(8, 32)])
    assert schedule.counts(576, Budget(keep=288)) == schedule.counts(576, Budget(keep=0.5))


def test_a_number_above_what_there_is_lets_all_stay():
    schedule = ExitSchedule.of(0.25, depth=8)
    for keep in (16, 17, 10_000):
        assert schedule.counts(16, Budget(keep=keep)) == (16,) * 7
    assert schedule.counts(16, Budget(keep=15)) == (16,) * 6 + (0,)


@pytest.mark.parametrize(
    ("at", "every", "first", "layers", "checked"),
    [
        (0.25, 1, 1, range(2, 8), [2, 3, 4, 5, 6, 7]),
        (0.25, 2, 1, range(2, 8), [2, 4, 6]),
        (0.25, 4, 1, range(2, 8), [2, 6]),
        (3, 9, 1, range(3, 8), [3]),
        (0.0, 3, 1, range(1, 8), [1, 4, 7]),
        (0.0, 1, 3, range(3, 8), [3, 4, 5, 6, 7]),
        (0.99, 1, 1, range(7, 8), [7]),
    ],
)
def test_checks_by_hand(at, every, first, layers, checked):
    """Of eight layers; what the budget ends may lie between two checks."""
    schedule = ExitSchedule.of(at, depth=8, first=first, every=every)
    assert schedule.layers == tuple(layers)
    assert [layer for layer, check in zip(layers, schedule.checks, strict=True) if check] == checked
    assert schedule.stages == (0,) * len(layers)


@settings(deadline=None)
@given(
    at=st.floats(0, 0.99),
    depth=st.integers(2, 80),
    n=st.integers(1, 3000),
    keep=st.floats(0.001, 1.0, exclude_max=True),
)
def test_the_average_is_never_exceeded_and_missed_by_less_than_a_layer(at, depth, n, keep):
    schedule = ExitSchedule.of(at, depth=depth)
    assume(keep > schedule.reach[0] + 1e-6)
    counts = schedule.counts(n, Budget(keep=keep))
    assert schedule.average(schedule.solve(keep)) == pytest.approx(mean(seen_by_layers(schedule, counts)) / n)
    missed = keep - mean(seen_by_layers(schedule, counts)) / n
    assert -1e-6 <= missed < 1 / depth
    assert set(counts) <= {0, n} and list(counts) == sorted(counts, reverse=True)


@pytest.mark.parametrize("keep", [0.0001, 0.1, 0.2499])
def test_an_average_that_does_not_pay_for_the_first_layers_names_the_range(keep):
    schedule = ExitSchedule.of(0.25, depth=32)
    with pytest.raises(InvalidOption, match=r"32 decoder layers; .* layers 8 to 31 this method reaches 0\.25 to 1"):
        schedule.solve(keep)
    assert schedule.reach == (0.25, 1.0)
    assert math.isclose(schedule.average(schedule.solve(0.25)), 0.25)


@pytest.mark.parametrize("keep", [2, 100, 143])
def test_a_number_that_does_not_pay_for_the_first_layers_names_the_least(keep):
    schedule = ExitSchedule.of(0.25, depth=32)
    with pytest.raises(InvalidOption, match=rf"keep={keep} of 576 tokens .* layers 8 to 31 .* that is 144 at least"):
        schedule.counts(576, Budget(keep=keep))
    assert schedule.counts(576, Budget(keep=144)) == (576,) + (0,) * 24


@pytest.mark.parametrize(
    ("stages", "options"),
    [
        ((LayerStage(at=0.25, keep=None, picks=PICKS), LayerStage(at=0.5, keep=0.5, picks=PICKS)), {}),
        ((LayerStage(at=0.25, keep=None, picks=PICKS), LayerStage(at=0.5, keep=None, picks=PICKS)), {}),
        ((LayerStage(at=0.25, keep=None, picks=PICKS),), {"before": 0.5, "picks": PICKS}),
    ],
)
def test_such_a_stage_shares_the_budget_with_no_other(stages, options):
    with pytest.raises(InvalidOption, match="keep=None has the budget for itself"):
        Pipeline(name="two", inside=stages, **{"picks": (), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience=0"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"patience": True}, "patience=True"),
        ({"every": 0}, "every=0"),
        ({"every": "2"}, "every='2'"),
        ({"every": 2, "keep": 0.5}, "goes with keep=None"),
        ({"keep": 1.5}, "keep=1.5"),
    ],
)
def test_what_a_stage_refuses(options, message):
    with pytest.raises(InvalidOption, match=message):
        LayerStage(**{"at": 0.25, "keep": None, "picks": PICKS, **options})


def test_counters_refuse_other_sums():
    with pytest.raises(InvalidOption, match="reduce='most'"):
        AllOrNone(scorer=Constant(), reduce="most")
