"""Methods that cut between decoder layers: schedules as counts, and every choice against its loop form and by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity import loops
from tests.fidelity import loops_methods as methods
from tests.fidelity import loops_selectors as selectors
from tests.fidelity.test_methods import at_angles
from tests.fidelity.test_published_methods import drawn, pictures, rows, scores
from vtprune.catalog import build, describe
from vtprune.errors import InvalidOption
from vtprune.glances import RowAttention
from vtprune.inside.glances import find_raters
from vtprune.pipeline import Pipeline
from vtprune.schedule import Schedule
from vtprune.types import Budget, VisualTokens

DEPTHS = (32, 28, 40)
SCHEDULES = {
    "fastv": ([(2,), (2,), (3,)], (576, 288)),
    "pyramiddrop": ([(8, 16, 24), (7, 14, 21), (10, 20, 30)], (576, 288, 144, 72)),
    "sparsevlm": ([(3, 7, 16), (3, 6, 14), (4, 9, 20)], (576, 312, 117, 39)),
    "sparsevlm_plus": ([(3, 7, 16), (3, 6, 14), (4, 9, 20)], (576, 238, 108, 60)),
    "adaptinfer": ([(2, 11, 21), (2, 10, 18), (3, 14, 26)], (576, 290, 72, 18)),
    "transprune": ([(7, 9, 12), (6, 8, 11), (9, 11, 15)], (576, 504, 360, 72)),
    "information_horizon": ([(16,), (14,), (20,)], (288, 144)),
    "vflowopt": ([(10, 21), (9, 18), (13, 26)], (153, 150, 132)),
    "todre": ([(28,), (25,), (35,)], (144, 144)),
}
"""The layers of each depth that cuts stand in front of, and of 576 tokens how many enter and stay behind each cut.

vflowopt: 0.2651 x 576 = 152.7, of that 0.9833, and of that 0.8773.
"""
SIZES = [(1, (1, 2), 1), (2, (2, 3), 1), (2, (2, 3), 6), (3, (5, 3), 4), (2, (7, 9), 20)]
"""Pictures, grid, and how many tokens stay."""
every_size = pytest.mark.parametrize(("S", "grid", "k"), SIZES)
SINKS = "sink_attention(threshold=34.76)"


def counts(pipeline: Pipeline, depth: int, keep: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    points = [(cut.at, cut.keep) for cut in pipeline.inside]
    schedule = Schedule.of(points, depth=depth, before=pipeline.before)
    return schedule.layers, schedule.counts(576, Budget(keep=keep))


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("method", SCHEDULES)
def test_the_schedule_at_its_own_average(method: str, number: int) -> None:
    """So many go through the layers up to the first cut, and so on: the average gives the counts back."""
    (layers, expected), depth = (SCHEDULES[method][0][number], SCHEDULES[method][1]), DEPTHS[number]
    passed = [stop - start for start, stop in itertools.pairwise((0, *layers, depth))]
    total = sum(n * through for n, through in zip(expected, passed, strict=True))
    assert counts(build(method), depth, total / depth / 576) == (layers, expected)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "sparsevlm_plus", "adaptinfer", "transprune"])
def test_the_published_average_is_that_of_the_published_counts(method: str) -> None:
    keep = describe(method).published["llava"].split(",")[0].removeprefix("keep=")
    assert counts(build(method), 32, float(keep))[1] == SCHEDULES[method][1]


def test_fastv_at_equal_averages() -> None:
    """192, 128 and 64 of 576: (32 x 64 - 2 x 576) / 30 = 29.9."""
    assert [counts(build("fastv"), 32, keep)[1][1] for keep in (192, 128, 64)] == [166, 98, 30]


def test_at_a_horizon_all_leave() -> None:
    """(16 x 288 + 8 x 144) / 32 = 180."""
    assert counts(build("information_horizon", {"horizon": 0.75}), 32, 180) == ((16, 24), (288, 144, 0))


def evidence(
    pipeline: Pipeline, weights: Any, visual: slice, embeds: Any = None, decay: Any = 1.0
) -> dict[str, torch.Tensor]:
    """What the glances of a method make of the attention (S, H, T, n) of the last T of n tokens, all of them text."""
    weights, found = torch.as_tensor(weights).float(), {}
    S, _, T, n = weights.shape
    decay = torch.as_tensor(decay).float().expand(S, T, n)
    own = torch.arange(n - T, n).expand(S, T)
    for name, glance in pipeline.glances.items():
        real = torch.ones(S, T, dtype=torch.bool)
        if glance.rows == "raters" and embeds is not None:
            seen = torch.zeros(S, n, dtype=torch.bool)
            seen[:, visual] = True
            real = find_raters(torch.tensor(embeds).float(), own, real, seen)
        last = slice(-1 if glance.rows == "last" else 0, None)
        pictures = torch.zeros(S, n, dtype=torch.bool)
        pictures[:, visual] = True
        shown = RowAttention(
            weights=weights[:, :, last],
            real=real[:, last],
            own=own[:, last],
            visual=pictures,
            decay=decay[:, last] if glance.divides else None,
        )
        found[name] = glance.rule(shown)[:, visual]
    return found


def stays(pipeline: Pipeline, stack: VisualTokens, k: int) -> list[list[int]]:
    """What the stages inside keep, which here they agree about."""
    first, *others = [cut.choice.run(stack, k).keep.tolist() for cut in pipeline.inside]
    assert all(other == first for other in others)
    return first


def last_row(heads: np.ndarray, own: list[int], embeds: np.ndarray, visual: slice) -> np.ndarray:
    """arXiv 2403.06764, 2410.17247: attention of the last token, averaged over heads."""
    return sum(head[-1, visual] for head in heads) / len(heads)


def massive(heads: np.ndarray, own: list[int], embeds: np.ndarray, visual: slice) -> np.ndarray:
    """arXiv 2410.04417: words above the mean in the softmax of picture times words; the 14 heads they pay most with."""
    share = np.zeros(len(own))
    for token in embeds[visual]:
        nearness = np.exp([token @ embeds[word] for word in own])
        share += nearness / nearness.sum()
    raters = [t for t in range(len(own)) if share[t] > share.mean()]
    mass = np.array([sum(head[t, visual].sum() for t in raters) for head in heads])
    return sum(heads[h][t, visual] for h in selectors.descending(mass)[:14] for t in raters)


def symmetric(heads: np.ndarray, own: list[int], embeds: np.ndarray, visual: slice) -> np.ndarray:
    """arXiv 2508.06084: in every head a word weighs what it pays to words and gets from them, itself once."""
    total = np.zeros(visual.stop - visual.start)
    for head in heads:
        both = head[:, own] + head[:, own].T - np.diag(np.diag(head[:, own]))
        total += sum(both[:, t].sum() * head[t, visual] for t in range(len(own)))
    return total


LOOPS = {
    "fastv": last_row,
    "pyramiddrop": last_row,
    "sparsevlm_plus": massive,
    "sparsevlm_plus undivided": massive,
    "adaptinfer": symmetric,
}
"""What follows a name: attention as it is."""


@pytest.mark.parametrize("seed", range(3))
@every_size
@pytest.mark.parametrize("method", LOOPS)
def test_every_stage_is_the_loop(method: str, S: int, grid: tuple[int, int], k: int, seed: int) -> None:
    """From the attention of 16 heads and five words on, which see nothing behind themselves; features do not matter."""
    name, _, undivided = method.partition(" ")
    pipeline = build(name, {"divide": False} if undivided else {})
    generator, N = np.random.default_rng(seed), grid[0] * grid[1]
    system = 3
    visual, own, n = slice(system, system + N), list(range(system + N, system + N + 5)), system + N + 5
    logits = 2 * generator.standard_normal((S, 16, 5, n))
    weights = np.exp(np.where(np.arange(n) > np.array(own)[:, None], -np.inf, logits))
    weights, embeds = weights / weights.sum(axis=3, keepdims=True), generator.standard_normal((S, n, 8))
    decay = generator.uniform(-0.3, 1, (S, 5, n)) if name == "sparsevlm_plus" else np.ones((S, 5, n))
    stack = pictures(drawn(S, grid, 4), grid, **evidence(pipeline, weights, visual, embeds, decay))
    if name == "sparsevlm_plus" and not undivided:
        weights = weights / np.where(decay > 0.05, decay, 0.05)[:, None]
    expected = [methods.best(LOOPS[method](weights[s], own, embeds[s], visual), k) for s in range(S)]
    assert stays(pipeline, stack, k) == expected


TWO_HEADS = [
    [[0.0, 0.0, 0.9, 0.1, 0.0], [0.5, 0.1, 0.2, 0.1, 0.1]],
    [[0.0, 0.0, 0.9, 0.1, 0.0], [0.0, 0.6, 0.2, 0.1, 0.1]],
]
MASSIVE = [[[0.5, 0.4, 0.1]], [[0.0, 0.5, 0.5]]]
WORDS = [[0.45, 0.2, 0.35, 0.0], [0.1, 0.3, 0.0, 0.6]]


@pytest.mark.parametrize(
    ("method", "heads", "N", "kept"),
    [
        *((method, TWO_HEADS, 3, [[1], [0, 1]]) for method in ("fastv", "pyramiddrop")),
        *((method, [[[0.1, 0.1, 0.3, 0.5]]], 3, [[2], [0, 2]]) for method in ("fastv", "pyramiddrop")),
        ("sparsevlm_plus 1", MASSIVE, 2, [[0]]),
        ("sparsevlm_plus 2", MASSIVE, 2, [[1]]),
        pytest.param("sparsevlm_plus 1", [[[0.9, 0.04, 0.03, 0.03]], [[0.0, 0.2, 0.5, 0.3]]], 2, [[1]]),
        ("adaptinfer", [WORDS], 2, [[1]]),
        ("adaptinfer", [[[1.0, 0.0, 0.0, 0.0]] * 2, WORDS], 2, [[1]]),
    ],
)
def test_attention_by_hand(method: str, heads: Any, N: int, kept: list[list[int]]) -> None:
    """The last rows have means of .25, .35, .2, whatever the first has; of .1, .1, .3 the first of two equals stays.

    One head pays .9 to the picture, the other .5; in front of a picture one pays .9 to that, .07 to it, the other .7 to
    it. Words that pay .35, 0 and 0, .6 to words weigh .35 and .6: .2175 to .25, where plain sums are .55 to .5; a head
    that pays them nothing adds 0.
    """
    name, _, count = method.partition(" ")
    pipeline = build(name, {"heads": int(count)} if count else {})
    n, T = len(heads[0][0]), len(heads[0])
    stack = pictures(torch.zeros(1, N, 1), (1, N), **evidence(pipeline, [heads], slice(n - T - N, n - T)))
    assert [stays(pipeline, stack, len(own)) for own in kept] == [[own] for own in kept]


@every_size
def test_what_enters_is_the_loop(S: int, grid: tuple[int, int], k: int) -> None:
    """DivPrune, max-sum diversity from the pivot on, and best tokens with recycled cells."""
    features, worth = drawn(S, grid, 6), scores(S, grid)
    stack, own = pictures(features, grid, importance=worth, **{SINKS: worth}), rows(features, worth)
    expected = {
        "information_horizon": [loops.divprune(x, k) for x, _ in own],
        "todre": [selectors.dispersion(x, a, k, reduce="sum", first="score") for x, a in own],
        "vflowopt": [methods.vflowopt(x, a, k, grid, 0.016)[0] for x, a in own],
    }
    assert {method: build(method).run(stack, k).keep.tolist() for method in expected} == expected
    assert stays(build("vflowopt"), stack, k) == [methods.best(a, k) for _, a in own], "the same map, without recycling"


def test_shares_of_vflowopt_are_counts_of_the_tokens_at_first() -> None:
    """Of 576 at their own average: (9 x 288 + 9 x 144 + 10 x 72) / 28 and (3 x 432 + 2 x 288 + 3 x 36) / 8."""
    for depth, shares, expected in ((28, (0.5, 0.25, 0.125), (288, 144, 72)), (8, (0.75, 0.5, 0.0625), (432, 288, 36))):
        pipeline = build("vflowopt", {"shares": shares})
        layers = (9, 18) if depth == 28 else (3, 5)
        passed = [stop - start for start, stop in itertools.pairwise((0, *layers, depth))]
        total = sum(n * through for n, through in zip(expected, passed, strict=True))
        assert counts(pipeline, depth, total / depth / 576) == (layers, expected)


@pytest.mark.parametrize(
    "shares",
    [(0.3, 0.2), (0.3, 0.2, 0.1, 0.1), (0.2, 0.3, 0.1), (1.0, 0.5, 0.5), (0.3, 0.2, 0.0), 0.3, "abc", (True,) * 3],
)
def test_shares_that_are_none_are_refused(shares: Any) -> None:
    with pytest.raises(InvalidOption, match=r"shares=.*: expected 3 shares in \(0, 1\), none above the one before it"):
        build("vflowopt", {"shares": shares})


def test_what_enters_by_hand() -> None:
    """At 0, 10, 90 degrees the last is alone, the first is farthest from it; at 0, 60, 70, 200 the same, then 70."""
    assert build("information_horizon").run(pictures(at_angles(0, 10, 90), (1, 3)), 2).keep.tolist() == [[0, 2]]
    assert build("information_horizon").run(pictures(at_angles(0, 60, 70, 200), (2, 2)), 3).keep.tolist() == [[0, 2, 3]]
    for worth, k, kept in (([0.1, 0.5, 0.3, 0.2], 2, [1, 2]), ([0.2, 0.2, 0.1, 0.2], 1, [0])):
        assert stays(build("vflowopt"), pictures(torch.zeros(1, 4, 1), (2, 2), **{SINKS: [worth]}), k) == [kept]
    for pivot, kept in ((1, [1, 3]), (2, [0, 2])):
        worth = [0.9 if i == pivot else 0.1 for i in range(4)]
        stack = pictures(at_angles(0, 10, 100, 180), (2, 2), importance=[worth])
        assert build("todre").run(stack, 2).keep.tolist() == [kept]


def test_deep_inside_chance_decides() -> None:
    """Of 4000 pictures each of ten tokens stays in 1600 by chance, give or take 31; a seed gives the same again."""
    stack, pipeline = pictures(torch.randn(4000, 10, 2), (2, 5)), build("information_horizon")
    kept = stays(pipeline, stack, 4)
    assert all(len(set(own)) == 4 for own in kept)
    assert all(abs(count - 1600) < 5 * 31 for count in Counter(itertools.chain(*kept)).values())
    other = pictures(torch.randn(4000, 10, 2), (2, 5), importance=torch.rand(4000, 10))
    assert stays(pipeline, other, 4) == kept != stays(build("information_horizon", {"seed": 1}), stack, 4)
    assert (stays(pipeline, stack, 10)[0], stays(pipeline, stack, 0)[0]) == (list(range(10)), [])


def test_pictures_leave_one_by_one_by_hand() -> None:
    """Two words pay .10 and .08 to the first, .14 and .08 to the second, over two heads .3 and 0 to the third."""
    one = [[[0.05, 0.05, 0.5, 0.4], [0.02, 0.06, 0.52, 0.4]]] * 2
    two = [[[0.07, 0.07, 0.46, 0.4], [0.02, 0.06, 0.52, 0.4]]] * 2
    three = [[[0.3, 0.0, 0.3, 0.4]] * 2, [[0.0, 0.0, 0.6, 0.4]] * 2]
    for below, expected in ((0.1, [0, 2, 2]), (0.12, [0, 0, 2]), (0.2, [0, 0, 0]), (0.0, [2, 2, 2])):
        pipeline = build("todre", {"below": below})
        stack = pictures(torch.zeros(3, 2, 1), (1, 2), **evidence(pipeline, [one, two, three], slice(0, 2)))
        assert pipeline.inside[0].choice.count(stack, 2).tolist() == expected
        assert pipeline.inside[0].choice.count(stack, 1).tolist() == [min(count, 1) for count in expected]


@every_size
def test_the_exit_is_the_loop(S: int, grid: tuple[int, int], k: int) -> None:
    """Attention that 3 heads and 4 words pay to all tokens of a picture, on average, against the threshold."""
    N = grid[0] * grid[1]
    weights = (
        np.random.default_rng(N).dirichlet([0.2] * N + [1.0] * 4, (S, 3, 4))
        * np.linspace(0.2, 1, S)[:, None, None, None]
    )
    mass = [sum(head[t, i] for head in own for t in range(4) for i in range(N)) / 12 for own in weights]
    for below in (0.1, *(value + step for value in mass for step in (-0.01, 0.01) if 0.01 < value < 0.99)):
        pipeline = build("todre", {"below": below})
        stack = pictures(drawn(S, grid, 2), grid, **evidence(pipeline, weights, slice(0, N)))
        assert pipeline.inside[0].choice.count(stack, k).tolist() == [0 if value < below else k for value in mass]
