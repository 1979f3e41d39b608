"""The trend towards late tokens: a planted one comes off, published weights come back, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity.test_published_methods import pictures
from vtprune.errors import InvalidOption
from vtprune.stages.recency import WithoutRecency

N, NOISE, SINKS, HEIGHT = 576, 0.5, 12, 40.0
"""A picture of LLaVA-1.5, the spread of the logarithm of its content, how many sinks, and how high they are."""
PLACES = np.arange(N) / (N - 1)
FASTV = (1.7337, -4.8264, 4.8841)
TRENDS = {
    "exponential": np.exp(2.3 * PLACES),
    "cubic": 1 + FASTV[0] * PLACES + FASTV[1] * PLACES**2 + FASTV[2] * PLACES**3,
    "none": np.ones(N),
}
PUBLISHED = {
    "PyramidDrop": (3.99, 2.65, 2.60, 3.27, 4.13, 4.05, 2.70, 3.15, 2.52, 3.76),
    "SparseVLM": (2.30, 3.20, 2.60, 3.80, 4.23, 4.64, 2.99, 3.15, 2.74, 4.12),
    "HiMAP": (2.17, 1.61, 1.48, 2.04, 1.70, 2.25, 1.71, 1.48, 1.97, 2.21),
    "TokenCarve": (1.67, 1.30, 1.11, 1.47, 1.70, 1.72, 1.18, 1.18, 1.43, 1.70),
}
"""k x 1000 of arXiv 2508.17807 on LLaVA-1.5-7B, one for every benchmark."""
seeds = pytest.mark.parametrize("seed", range(20))
both = pytest.mark.parametrize("form", ["exponential", "cubic"])


def planted(seed: int, trend: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Content, the attention it gets, and which tokens are no sinks."""
    generator = np.random.default_rng(seed)
    content = np.exp(NOISE * generator.standard_normal(N))
    sinks = generator.choice(N, SINKS, replace=False)
    attention = content * TRENDS[trend]
    attention[sinks] *= HEIGHT
    return content, attention / attention.sum(), ~np.isin(np.arange(N), sinks)


def without(scores: Any, form: Any = "exponential", constants: Any = None, **evidence: Any) -> np.ndarray:
    """Debiased scores of one picture, or of several that stand below each other."""
    scores = torch.as_tensor(np.asarray(scores), dtype=torch.float32)
    batch = scores.reshape(-1, scores.shape[-1])
    at_first = torch.zeros(len(batch), evidence.pop("total", batch.shape[1]), 1)
    stack = pictures(at_first, (1, at_first.shape[1]), **evidence)
    stack = replace(stack, features=at_first[:, : batch.shape[1]])
    return WithoutRecency(form=form, constants=constants)(stack, batch).double().numpy().reshape(scores.shape)


def ranks_agree(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation; ties do not happen."""
    return float(np.corrcoef(*(np.argsort(np.argsort(values)) for values in (first, second)))[0, 1])


def loop(scores: np.ndarray, degree: int) -> np.ndarray:
    """Debiased scores of one picture by least squares on all logarithms, again and again without what lies far off."""
    places = np.arange(len(scores)) / (len(scores) - 1)
    trust = np.ones(len(scores))
    for _ in range(10):
        found = np.polynomial.polynomial.polyfit(places, np.log(scores), degree, w=np.sqrt(trust))
        off = np.log(scores) - np.polynomial.polynomial.polyval(places, found)
        limit = 4.685 * 1.4826 * sorted(abs(value) for value in off)[(len(off) - 1) // 2]
        trust = np.array([(1 - (value / limit) ** 2) ** 2 if abs(value) < limit else 0.0 for value in off])
    found[:2] = 0, max(found[1], 0) if degree == 1 else found[1]
    return scores / np.exp(np.polynomial.polynomial.polyval(places, found))


@seeds
@pytest.mark.parametrize(("trend", "most"), [("exponential", 0.70), ("cubic", 0.92)])
def test_a_planted_trend_comes_off(trend: str, most: float, seed: int) -> None:
    """Measured over twenty seeds: at least 0.992 and 0.988 behind it. In front of it at most 0.62 and 0.90."""
    content, attention, free = planted(seed, trend)
    after = ranks_agree(without(attention, trend)[free], content[free])
    assert after >= 0.95
    assert ranks_agree(attention[free], content[free]) <= min(most, after - 0.05)


@seeds
@pytest.mark.parametrize(("trend", "wrong", "least"), [("exponential", "cubic", 0.97), ("cubic", "exponential", 0.95)])
def test_the_wrong_form_is_still_better_than_none(trend: str, wrong: str, least: float, seed: int) -> None:
    """Measured over twenty seeds: cubic for an exponential one reaches 0.988, the other way round 0.968."""
    content, attention, free = planted(seed, trend)
    reached = ranks_agree(without(attention, wrong)[free], content[free])
    assert reached >= least
    assert reached > ranks_agree(attention[free], content[free]) + 0.05


@seeds
@pytest.mark.parametrize(("form", "least"), [("exponential", 0.99), ("cubic", 0.98)])
def test_where_there_is_no_trend_ranks_stay(form: str, least: float, seed: int) -> None:
    """Measured over twenty seeds: 0.992 of an exponential trend; a cubic one has more room for chance, and 0.988."""
    _, attention, _ = planted(seed, "none")
    assert ranks_agree(without(attention, form), attention) >= least


@both
@pytest.mark.parametrize("n", [12, 40, 576])
def test_the_fit_is_the_loop(form: str, n: int) -> None:
    scores = planted(n, "exponential")[1][:n]
    np.testing.assert_allclose(without(scores, form), loop(scores, 1 if form == "exponential" else 3), rtol=0.02)


@pytest.mark.parametrize("host", PUBLISHED)
def test_published_exponential_weights(host: str) -> None:
    """w_j = exp(-k j) is a trend of k (N - 1), to the last digits of fp32."""
    for k in PUBLISHED[host]:
        expected = [np.exp(-k / 1000 * j) for j in range(N)]
        np.testing.assert_allclose(without(np.ones(N), constants=(k / 1000 * (N - 1),)), expected, rtol=1e-6)


def test_published_cubic_weights() -> None:
    """Of FastV: 1 over the polynomial, at tokens 0, 100, 300, 500 and 575 as shipped."""
    weights = without(np.ones(N), "cubic", FASTV)
    np.testing.assert_allclose(weights, 1 / TRENDS["cubic"], rtol=1e-6)
    assert weights[[0, 100, 300, 500, 575]].tolist() == pytest.approx([1, 0.847, 0.779, 0.483, 0.358], abs=5e-4)


def test_given_constants_by_hand() -> None:
    """exp(u ln 4) at 0, 1/2 and 1 is 1, 2 and 4; 1 + u + 2 u^3 is 1, 1.75 and 4."""
    assert without([3.0, 4.0, 4.0], constants=(np.log(4),)).tolist() == pytest.approx([3, 2, 1])
    assert without([1.0, 3.5, 8.0], "cubic", (1.0, 0.0, 2.0)).tolist() == pytest.approx([1, 2, 2])


def test_fitted_by_hand() -> None:
    """Doubling scores are all trend; one a hundred times above them is what is left. Falling ones stay as they are.

    Of 1, 3, 2 the second lies on no line with the others, whose slope is ln 2.
    """
    doubling = [2.0**j for j in range(9)]
    assert without(doubling) == pytest.approx([1.0] * 9, rel=1e-3)
    doubling[4] *= 100
    assert without(doubling) == pytest.approx([1, 1, 1, 1, 100, 1, 1, 1, 1], rel=1e-3)
    assert without(doubling, "cubic") == pytest.approx([1, 1, 1, 1, 100, 1, 1, 1, 1], rel=1e-2)
    assert without([8.0, 4.0, 2.0, 1.0]).tolist() == pytest.approx([8, 4, 2, 1])
    assert without([1.0, 3.0, 2.0]) == pytest.approx([1, 3 / 2**0.5, 1], rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 576])
def test_equal_scores_stay_equal(n: int) -> None:
    """Within two percent, however high they are, with either form."""
    for score in (1e-9, 1e-5, 1 / n, 1e-3, 0.1, 0.7, 2.0, 37.0):
        for form in ("exponential", "cubic"):
            assert without([score] * n, form) == pytest.approx([score] * n, rel=0.02)


@both
def test_a_single_token_and_nothing_but_zeros(form: str) -> None:
    assert without([5.0], form).tolist() == [5.0]
    assert all(without([0.0] * n, form).tolist() == [0.0] * n for n in (1, 2, 3, 9))


@both
def test_some_zeros_stay_and_do_not_count(form: str) -> None:
    """One token in ten, anywhere."""
    content, attention, free = planted(0, "exponential")
    dark = np.arange(N) % 10 == 3
    attention[dark] = 0
    assert not (debiased := without(attention, form))[dark].any()
    assert ranks_agree(debiased[free & ~dark], content[free & ~dark]) >= 0.95


@both
def test_places_are_those_among_the_tokens_at_first(form: str) -> None:
    """Behind earlier cuts: the tokens that are left get the trend of where they were, fitted or given."""
    constants = (2.3,) if form == "exponential" else FASTV
    origin = np.sort(np.random.default_rng(0).choice(N, 96, replace=False))[None]
    scores = TRENDS[form][origin]
    np.testing.assert_allclose(without(scores, form, constants, total=N, origin=origin), 1.0, rtol=1e-5)
    assert abs(without(scores, form, constants) - 1).max() > 0.1, "holes count"
    assert without([[1.0, 2.0, 32.0]], total=9, origin=[[0, 1, 5]])[0] == pytest.approx([1, 1, 1], rel=1e-3)


@both
@pytest.mark.parametrize("n", [1, 3, 40, 576])
def test_pictures_do_not_see_each_other(form: str, n: int) -> None:
    scores = np.stack([planted(seed, "exponential")[1][:n] for seed in range(3)])
    assert without(scores, form).tolist() == [without(own, form).tolist() for own in scores]


@pytest.mark.parametrize(("form", "count"), [("linear", 1), (None, 1), *((f, n) for f in TRENDS for n in (0, 2, 4))])
def test_forms_and_how_many_constants_they_have_are_checked(form: Any, count: int) -> None:
    with pytest.raises(InvalidOption, match="constants" if form in ("exponential", "cubic") else "form"):
        WithoutRecency(form=form, constants=(1.0,) * count)


@pytest.mark.parametrize("wrong", [0.5, [1.0], ("a",), (float("nan"),)])
def test_constants_are_checked_to_be_numbers(wrong: Any) -> None:
    with pytest.raises(InvalidOption, match="constants"):
        WithoutRecency(constants=wrong)
