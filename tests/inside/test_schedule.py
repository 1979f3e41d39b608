"""Which layers are cut, and how many tokens stay behind each cut so that the average over layers is `keep`."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vtprune.errors import InvalidOption
from vtprune.schedule import Schedule, drop_layer
from vtprune.types import Budget

PYRAMID = ((0.25, 0.5), (0.5, 0.25), (0.75, 0.125))
HORIZON = ((0.5, 0.25), (0.75, 0.0))
SHARES = {
    "fastv": ((0.0625, 0.5),),
    "pyramiddrop": PYRAMID,
    "sparsevlm_plus": ((3 / 32, 238 / 576), (7 / 32, 108 / 576), (16 / 32, 60 / 576)),
    "adaptinfer": ((2 / 32, 290 / 576), (11 / 32, 72 / 576), (21 / 32, 18 / 576)),
}


def seen_by_layers(schedule, behind):
    """What each layer sees, of what enters and what is left behind each drop point: a loop over layers."""
    return [behind[sum(point <= layer for point in schedule.layers)] for layer in range(schedule.depth)]


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("points", "layers", "average"),
    [
        (PYRAMID, (8, 16, 24), 0.46875),
        (SHARES["fastv"], (2,), 0.53125),
        (SHARES["sparsevlm_plus"], (3, 7, 16), (3 * 576 + 4 * 238 + 9 * 108 + 16 * 60) / 576 / 32),
        (SHARES["adaptinfer"], (2, 11, 21), (2 * 576 + 9 * 290 + 10 * 72 + 11 * 18) / 576 / 32),
        (HORIZON, (16, 24), 0.5 + 0.25 * 0.25),
    ],
)
def test_published_shares_come_back_at_their_own_average(points, layers, average):
    schedule = Schedule.of(points, depth=32)
    assert schedule.layers == layers
    assert schedule.average((1.0, *(share for _, share in points))) == pytest.approx(average)
    assert schedule.solve(average) == pytest.approx((1.0, *(share for _, share in points)), abs=1e-9)


def test_a_published_share_before_the_language_model_comes_back_too():
    schedule = Schedule.of(((16, 0.25),), depth=32, before=0.5)
    assert schedule.solve(0.375) == pytest.approx((0.5, 0.25))
    assert schedule.counts(576, Budget(keep=0.375)) == (288, 144)


def test_counts_by_hand():
    """FastV at 32 layers: 2 x 576 + 30 x 288 is 0.53125 of 32 x 576. A quarter of them asked for leaves 0.2 behind."""
    schedule = Schedule.of(SHARES["fastv"], depth=32)
    assert schedule.counts(576, Budget(keep=0.53125)) == (576, 288)
    assert schedule.counts(576, Budget(keep=0.25)) == (576, 115)  # (8 - 2) / 30 x 576 = 115.2
    assert schedule.counts(576, Budget(keep=144)) == (576, 115)
    assert Schedule.of(PYRAMID, depth=32).counts(576, Budget(keep=0.46875)) == (576, 288, 144, 72)


def test_the_shares_keep_the_ratios_of_their_logarithms():
    """One power for all: at other averages 0.5, 0.25, 0.125 stay a geometric row."""
    schedule = Schedule.of(PYRAMID, depth=32)
    for keep in (0.3, 0.4, 0.7, 0.95):
        _, first, second, third = schedule.solve(keep)
        assert second == pytest.approx(first**2)
        assert third == pytest.approx(first**3)


points = st.lists(
    st.tuples(st.floats(0.01, 0.95), st.floats(0.02, 0.95)), min_size=1, max_size=4, unique_by=lambda point: point[0]
).map(lambda drawn: list(zip(sorted(at for at, _ in drawn), sorted((keep for _, keep in drawn), reverse=True))))


@settings(deadline=None)
@given(points=points, depth=st.integers(2, 80), n=st.integers(1, 3000), keep=st.floats(0.001, 1.0))
def test_the_average_is_met_within_half_a_token(points, depth, n, keep):
    schedule = Schedule.of(points, depth=depth)
    assume(keep > schedule.reach[0] + 1e-6)
    shares = schedule.solve(keep)
    assert mean(seen_by_layers(schedule, shares)) == pytest.approx(keep, abs=1e-6)
    counts = schedule.counts(n, Budget(keep=keep, floor=0))
    assert all(isinstance(count, int) and 0 <= count <= n for count in counts)
    assert abs(mean(seen_by_layers(schedule, counts)) - keep * n) <= 0.5 + 1e-4
    assert mean(seen_by_layers(schedule, schedule.counts(n, Budget(keep=keep)))) < keep * n + 1


@settings(deadline=None)
@given(depth=st.integers(4, 80), n=st.integers(1, 3000), keep=st.floats(0.3, 1.0), more=st.floats(0, 0.3))
def test_more_budget_never_means_fewer_tokens_and_no_cut_brings_any_back(depth, n, keep, more):
    schedule = Schedule.of(PYRAMID, depth=depth)
    assume(keep > schedule.reach[0] + 1e-6)
    few = schedule.counts(n, Budget(keep=keep))
    many = schedule.counts(n, Budget(keep=min(1.0, keep + more)))
    assert all(a <= b for a, b in zip(few, many, strict=True))
    assert list(few) == sorted(few, reverse=True)


@settings(deadline=None)
@given(depth=st.integers(2, 80), n=st.integers(1, 600), name=st.sampled_from(sorted(SHARES)))
def test_a_number_of_tokens_is_the_share_it_is_of_a_picture(depth, n, name):
    schedule = Schedule.of(SHARES[name], depth=depth)
    k = n - n // 3
    assume(k / n > schedule.reach[0] + 1e-6)
    assert schedule.counts(n, Budget(keep=k)) == schedule.counts(n, Budget(keep=k / n))


def test_a_number_above_what_there_is_keeps_all():
    assert Schedule.of(PYRAMID, depth=8).counts(10, Budget(keep=11)) == (10, 10, 10, 10)


@pytest.mark.parametrize("keep", [0.0001, 0.05, 0.0624])
def test_an_average_below_what_the_first_layers_cost_names_the_range(keep):
    schedule = Schedule.of(SHARES["fastv"], depth=32)
    with pytest.raises(InvalidOption, match="in front of layers 2 this method") as caught:
        schedule.solve(keep)
    assert "0.0625 to 1" in str(caught.value)
    assert schedule.solve(0.0626)[1] == pytest.approx(0.0001 * 32 / 30)


def test_an_average_above_what_a_horizon_leaves_names_the_range():
    """All leave in front of layer 24: more than 0.75 can only be had by not pruning at all."""
    schedule = Schedule.of(HORIZON, depth=32)
    with pytest.raises(InvalidOption, match=r"0\.75"):
        schedule.solve(0.9)


@pytest.mark.parametrize(("at", "first"), [(6, 1), (32, 1), (0, 1), (-1, 1), (2, 3)])
def test_the_number_of_no_layer_that_can_be_cut(at, first):
    with pytest.raises(InvalidOption, match=rf"layer {at}: this model has layers 0 to 5 .* {first} to 5"):
        drop_layer(at, 6, first=first)


def test_numbers_and_shares_of_the_depth():
    assert [drop_layer(at, 6) for at in (1, 5)] == [1, 5]
    assert [drop_layer(at, 6) for at in (0.0, 0.01, 0.2499, 0.25, 0.5, 0.99)] == [1, 1, 1, 2, 3, 5]
    assert drop_layer(0.0625, 32, first=3) == 3
    assert [drop_layer(k / 32, 32) for k in range(1, 32)] == list(range(1, 32))


def test_where_two_points_fall_on_one_layer_the_later_holds():
    schedule = Schedule.of(SHARES["sparsevlm_plus"], depth=6)
    assert schedule.layers == (1, 3)
    assert schedule.shares == (108 / 576, 60 / 576)


def test_points_must_ascend():
    with pytest.raises(InvalidOption, match="ascend, layer 2 comes after layer 4"):
        Schedule.of(((4, 0.5), (2, 0.25)), depth=6)


@pytest.mark.parametrize("keep", [0.55, 0.6, 0.7])
def test_a_share_of_nothing_means_that_all_leave(keep):
    """At any budget, while a small share never rounds down to less than the floor."""
    schedule = Schedule.of(HORIZON, depth=32)
    assert schedule.solve(keep)[2] == 0
    assert schedule.counts(16, Budget(keep=keep))[2] == 0
    assert schedule.counts(3, Budget(keep=keep, floor=1))[2] == 0
    assert min(schedule.counts(3, Budget(keep=0.5001))[:2]) == 1


@pytest.mark.parametrize("name", SHARES)
def test_a_deeper_model_is_cut_at_the_same_shares_of_its_depth(name):
    shallow, deep = (Schedule.of(SHARES[name], depth=depth) for depth in (32, 40))
    assert deep.layers == tuple(int(layer * 40 / 32 + 0.5) for layer in shallow.layers)
    assert deep.shares == shallow.shares
    counts = deep.counts(576, Budget(keep=0.5))
    assert abs(mean(seen_by_layers(deep, counts)) - 288) <= 0.5


def test_forty_layers_by_hand():
    assert Schedule.of(PYRAMID, depth=40).layers == (10, 20, 30)
    assert Schedule.of(SHARES["fastv"], depth=40).layers == (3,)  # 2.5 is rounded up
    assert Schedule.of(SHARES["adaptinfer"], depth=40).layers == (3, 14, 26)
