"""The search for settings of vflowopt: every point meets the average, and the published ones are tried first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vtprune
from tests import models
from tests.models import Prompt
from vtprune.catalog import build, describe
from vtprune.errors import InvalidOption
from vtprune.eval.schedules import METHOD, Space, _searched, agreement, check_search, search_settings
from vtprune.schedule import Schedule

PUBLISHED = dict(describe(METHOD).parameters)
SHAPES = [
    (28, (9, 18)),
    (8, (3, 5)),
    (6, (2, 4)),
    (6, (4, 4)),
    (2, (1, 1)),
    (3, (1, 2)),
    (32, (10, 21)),
    (40, (13, 26)),
]
KEEPS = [0.02, 0.1, 0.25, 0.5, 0.75, 0.95]
BATCHES = (
    (Prompt(images=((32, 32),), seed=1), Prompt(images=((32, 32),), seed=2, text_after=6)),
    (Prompt(images=((32, 32),), seed=3),),
)


def space_of(keep: float, shape: tuple[int, tuple[int, int]]) -> Space:
    return Space(keep=keep, depth=shape[0], layers=shape[1])


def solved(space: Space, shares: tuple[float, ...]) -> tuple[Schedule, tuple[float, ...]]:
    """The schedule on the model of a space, and its shares where two cuts fall on one layer."""
    points = list(zip(space.layers, shares[1:], strict=True))
    schedule = Schedule.of(points, depth=space.depth, first=space.layers[0], before=shares[0])
    return schedule, (schedule.before, *schedule.shares)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep", KEEPS)
def test_every_point_meets_the_average_with_parameters_the_method_takes(
    keep: float, shape: tuple[int, tuple[int, int]]
) -> None:
    space, random = space_of(keep, shape), np.random.default_rng(0)
    corners = [np.array(point, dtype=float) for point in np.ndindex(2, 2, 2, 2)]
    for point in [*corners, *random.random((50, 4))]:
        parameters = space.at(point)
        build(METHOD, parameters)
        schedule, shares = solved(space, parameters["shares"])
        assert schedule.average(shares) == pytest.approx(keep, abs=1e-5)
        assert schedule.solve(keep) == pytest.approx(shares, abs=1e-4)
        assert keep - 1e-6 <= shares[0] <= 1.5 * keep + 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep", KEEPS)
def test_a_point_and_its_parameters_belong_together(keep: float, shape: tuple[int, tuple[int, int]]) -> None:
    space = space_of(keep, shape)
    for point in np.random.default_rng(1).random((20, 4)):
        again = space.at(space.point(space.at(point)))
        assert again == space.at(point) | {name: pytest.approx(again[name], rel=2e-2) for name in again}


def test_ends_are_those_that_the_authors_search() -> None:
    """A quarter of 28 layers: from .25 to .375 before, and there from .533 (ours .509: the rest alike) of it inside."""
    space = space_of(0.25, SHAPES[0])
    low, high = (space.at(np.array([1.0, first, 0.5, 0.5]))["shares"] for first in (0.0, 1.0))
    assert space.at(np.array([0.0, 0.5, 0.5, 0.5]))["shares"] == (0.25, 0.25, 0.25)
    assert low[0] == high[0] == 0.375
    assert low[1] == low[2] == pytest.approx((7 - 9 * 0.375) / 19, abs=1e-6)
    assert high[1] == 0.375 and high[2] == pytest.approx((7 - 18 * 0.375) / 10, abs=1e-6)
    assert [space.at(np.array([0, 0, end, end])) for end in (0.0, 1.0)] == [
        {"shares": (0.25, 0.25, 0.25), "threshold": threshold, "recycled": recycled}
        for threshold, recycled in ((1.0, 0.005), (50.0, 0.5))
    ]


def test_the_published_point_lies_where_the_average_puts_it() -> None:
    """At its own average on its own model it is what was published, and at a half the square root of that or so."""
    found = space_of(0.2507, SHAPES[0]).at(space_of(0.2507, SHAPES[0]).point(PUBLISHED))
    assert found["shares"] == pytest.approx(PUBLISHED["shares"], abs=1e-3)
    assert (found["threshold"], found["recycled"]) == (34.76, 0.016)
    half = space_of(0.5, SHAPES[1])
    known, _ = solved(half, PUBLISHED["shares"])
    assert half.at(half.point(PUBLISHED))["shares"] == pytest.approx(known.solve(0.5), abs=1e-3)


def test_nothing_found_is_worse_than_what_was_published() -> None:
    seen: list[dict[str, Any]] = []

    def tried(keep: float, parameters: dict[str, Any]) -> tuple[float, float]:
        seen.append(parameters)
        return (0.5 if parameters == PUBLISHED else -float(len(seen))), 4.0

    space = space_of(0.25, SHAPES[1])
    found = _searched(space, tried, 9, 0)
    assert seen[0] == PUBLISHED and len(seen) == 9
    assert (found.parameters, found.cosine, found.published) == (PUBLISHED, 0.5, 0.5)
    assert _searched(space, lambda *_: (0.5, 4.0), 9, 0).parameters == PUBLISHED, "as good is not better"
    assert len({str(own) for own in seen}) == 9


def test_the_best_of_all_that_was_tried_is_found() -> None:
    seen: list[tuple[float, dict[str, Any]]] = []

    def tried(keep: float, parameters: dict[str, Any]) -> tuple[float, float]:
        value = -abs(parameters["threshold"] - 10) - abs(parameters["shares"][0] - 0.3)
        seen.append((value, parameters))
        return value, 3.0

    found = _searched(space_of(0.25, SHAPES[1]), tried, 24, 0)
    value, parameters = max(seen, key=lambda one: one[0])
    assert (found.cosine, found.parameters, found.kept, found.trials) == (value, parameters, 3.0, 24)
    assert found.published == seen[0][0] < found.cosine
    assert _searched(space_of(0.25, SHAPES[1]), tried, 24, 0) == found
    assert _searched(space_of(0.25, SHAPES[1]), tried, 1, 0).parameters == PUBLISHED


def test_the_agreement_by_hand() -> None:
    """Cosines 1, .6, -1, and NaN that counts as 0."""
    states = [torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])]
    others = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, -2.0], [1.0, 0.0]])]
    assert agreement(states, others) == pytest.approx((1 + 0.6 - 1 + 0) / 4)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.build("llava", layers=6)


@torch.no_grad()
def test_what_is_compared_is_the_last_hidden_state_of_the_last_token(model: nn.Module) -> None:
    """As transformers gives it, of prompts one by one."""
    steps: list[int] = []
    batches = [lambda own=own: models.inputs(model, own) for own in BATCHES]
    (found,) = search_settings(model, batches, [0.4], trials=5, seed=0, on_step=lambda: steps.append(1))
    assert len(steps) == 2 * (1 + 5)
    assert not hasattr(model, "vtprune")
    assert found.cosine >= found.published
    for parameters, cosine in (({}, found.published), (found.parameters, found.cosine)):
        pairs, kept = [], []
        for prompt in (prompt for own in BATCHES for prompt in own):
            inputs = models.inputs(model, (prompt,))
            whole = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            with vtprune.pruning(model, METHOD, keep=0.4, **parameters) as pruner:
                short = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            pairs.append(torch.cosine_similarity(whole, short, dim=0).item())
            kept.append(pruner.last.average)
        assert cosine == pytest.approx(np.mean(pairs), abs=1e-5)
    assert found.kept == pytest.approx(np.mean(kept))
    assert abs(found.kept - 0.4 * 16) <= 0.5


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_families_and_budgets_of_all_kinds_are_searched(family: str) -> None:
    """Crops, newline tokens, M-RoPE and features that layers add; nearly all and nearly nothing kept."""
    own = models.build(family, layers=6)
    batches = [lambda: models.inputs(own, BATCHES[0])]
    found = search_settings(own, batches, [0.95, 0.1], trials=4, seed=0, on_step=lambda: None)
    assert [one.keep for one in found] == [0.95, 0.1]
    assert all(-1 <= one.published <= one.cosine <= 1 for one in found)
    assert found[0].cosine > 0.9


def test_seeds_decide(model: nn.Module) -> None:
    batches = [lambda: models.inputs(model, BATCHES[0])]
    first, again, other = (
        search_settings(model, batches, [0.4, 0.25], trials=3, seed=seed, on_step=lambda: None) for seed in (1, 1, 2)
    )
    assert first == again and [one.keep for one in first] == [0.4, 0.25]
    assert other != first


@pytest.mark.parametrize("keep", [1.0, 64, 1.5, 0.0])
def test_what_is_no_share_below_one_is_refused(model: nn.Module, keep: float) -> None:
    with pytest.raises(InvalidOption, match=f"keep={keep}"):
        check_search(model, [0.5, keep])
    assert not hasattr(model, "vtprune")
