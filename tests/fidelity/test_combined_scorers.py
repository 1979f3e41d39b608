"""Scores made of two scorers, and the attention of a mean query, against loops and by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity.test_published_methods import attention, drawn, pictures, rows, scores
from tests.fidelity.test_rules import of_maps
from vtprune import Pick, Pipeline
from vtprune.errors import InvalidOption, MissingEvidence
from vtprune.readings import BlockAttention
from vtprune.stages import STAGES
from vtprune.stages.glances import MeanAttention
from vtprune.stages.rules import VirtualCls
from vtprune.stages.scorers import Constant, Given, Glanced, Mixed, Product, Read
from vtprune.stages.selectors import TopK

SIZES = [(1, (1, 1)), (2, (2, 3)), (3, (5, 3)), (2, (1, 13)), (2, (7, 9))]
"""Pictures and their grid."""
A, B = Given(name="a"), Given(name="b")
KINDS: list[Any] = [Mixed, Product]
every_size = pytest.mark.parametrize(("S", "grid"), SIZES)


def stretched(own: np.ndarray) -> np.ndarray:
    """To [0, 1]; equal scores are 0."""
    low, high = min(own), max(own)
    return np.array([(a - low) / (high - low) if high > low else 0.0 for a in own])


def mixed(first: np.ndarray, second: np.ndarray, weight: float) -> list[float]:
    pairs = zip(stretched(first), stretched(second), strict=True)
    return [weight * a + (1 - weight) * b for a, b in pairs]


def product(first: np.ndarray, second: np.ndarray, powers: tuple[float, float]) -> list[float]:
    pairs = zip(stretched(first), stretched(second), strict=True)
    return [a ** powers[0] * b ** powers[1] for a, b in pairs]


def virtual_cls(query: np.ndarray, key: np.ndarray, scale: float) -> list[float]:
    """arXiv 2505.19536 without a CLS token: in every head the mean of all queries looks at all keys."""
    total = np.zeros(query.shape[1])
    for own, keys in zip(query, key, strict=True):
        mean = sum(own) / len(own)
        weights = np.array([math.exp(scale * float(mean @ one)) for one in keys])
        total += weights / weights.sum() / len(query)
    return total.tolist()


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@every_size
def test_mixed_is_the_loop(S: int, grid: tuple[int, int], weight: float) -> None:
    """Whatever the scale of either; the default weighs both alike."""
    a, b = 100 * scores(S, grid, 1), drawn(S, grid, 1, 2)[..., 0] - 7
    found = Mixed(first=A, second=B, weight=weight)(pictures(drawn(S, grid, 2), grid, a=a, b=b))
    np.testing.assert_allclose(found.numpy(), [mixed(*own, weight) for own in rows(a, b)], atol=1e-5)
    assert Mixed(first=A, second=B) == Mixed(first=A, second=B, weight=0.5)


@pytest.mark.parametrize("powers", [(1.0, 1.0), (2.0, 0.5), (0.1, 3.0)])
@every_size
def test_product_is_the_loop(S: int, grid: tuple[int, int], powers: tuple[float, float]) -> None:
    a, b = 100 * scores(S, grid, 1), drawn(S, grid, 1, 2)[..., 0] - 7
    found = Product(first=A, second=B, powers=powers)(pictures(drawn(S, grid, 2), grid, a=a, b=b))
    np.testing.assert_allclose(found.numpy(), [product(*own, powers) for own in rows(a, b)], atol=1e-5)
    assert Product(first=A, second=B) == Product(first=A, second=B, powers=(1.0, 1.0))


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("has_cls", [False, True])
@every_size
def test_virtual_cls_is_the_loop(S: int, grid: tuple[int, int], has_cls: bool, scale: float) -> None:
    """Of patches alone: a CLS token neither looks nor is looked at."""
    seen = attention(S, grid, has_cls, seed=5)
    seen = BlockAttention(query=seen.query, key=seen.key, scale=scale, has_cls=has_cls)
    pairs = zip(seen.query[:, :, has_cls:].numpy(), seen.key[:, :, has_cls:].numpy(), strict=True)
    np.testing.assert_allclose(VirtualCls()(seen).numpy(), [virtual_cls(*own, scale) for own in pairs], atol=1e-6)


def by_hand(scorer: Any, a: list[float], b: list[float]) -> list[float]:
    stack = pictures(torch.zeros(1, len(a), 1), (1, len(a)), a=[a], b=[b])
    return scorer(stack)[0].tolist()


def test_mixed_by_hand() -> None:
    """2, 4, 6 are 0, .5, 1 and 8, 8, -2 are 1, 1, 0: a quarter of the first and the rest of the second."""
    a, b = [2.0, 4.0, 6.0], [8.0, 8.0, -2.0]
    assert by_hand(Mixed(first=A, second=B, weight=0.25), a, b) == pytest.approx([0.75, 0.875, 0.25])
    assert by_hand(Mixed(first=A, second=B, weight=1.0), a, b) == pytest.approx([0, 0.5, 1])
    assert by_hand(Mixed(first=A, second=Constant()), a, b) == pytest.approx([0, 0.25, 0.5])


def test_product_by_hand() -> None:
    """Of 0, .5, 1 and 1, .25, .75: products 0, .125, .75; with .5 squared and the root of .25 it is .125 again.

    Equal scores are 0, and so is all that they are multiplied with.
    """
    a, b = [2.0, 4.0, 6.0, 6.0], [4.0, 1.0, 3.0, 0.0]
    assert by_hand(Product(first=A, second=B), a, b) == pytest.approx([0, 0.125, 0.75, 0])
    assert by_hand(Product(first=A, second=B, powers=(2.0, 0.5)), a, b) == pytest.approx([0, 0.125, 0.75**0.5, 0])
    assert by_hand(Product(first=A, second=Constant()), a, b) == [0, 0, 0, 0]


def test_virtual_cls_by_hand() -> None:
    """Logits of ln 8, 0 and ln 2, 0 have a mean of ln 4: .8 and .2. With a head of ln 1/4 they are .5 and .5.

    A CLS token in front of them changes nothing.
    """
    first, second = [[8.0, 1.0], [2.0, 1.0]], [[1.0, 4.0], [1.0, 4.0]]
    assert VirtualCls()(of_maps(first, has_cls=False))[0].tolist() == pytest.approx([0.8, 0.2])
    assert VirtualCls()(of_maps(first, second, has_cls=False))[0].tolist() == pytest.approx([0.5, 0.5])
    with_cls = [[5.0, 1.0, 9.0], [5.0, 8.0, 1.0], [7.0, 2.0, 1.0]]
    assert VirtualCls()(of_maps(with_cls, has_cls=True))[0].tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("kind", KINDS)
def test_it_needs_what_both_need(kind: Any) -> None:
    read, glanced = Read(rule=VirtualCls()), Glanced(rule=MeanAttention())
    assert kind(first=read, second=kind(first=glanced, second=A)).needs == {read.reading, glanced.glance, "a"}
    with pytest.raises(MissingEvidence, match="'c'"):
        by_hand(kind(first=A, second=Given(name="c")), [1.0], [2.0])


@pytest.mark.parametrize("kind", KINDS)
@every_size
def test_pictures_do_not_see_each_other(kind: Any, S: int, grid: tuple[int, int]) -> None:
    a, b, scorer = scores(S, grid, 1), scores(S, grid, 2), kind(first=A, second=B)
    alone = [by_hand(scorer, own.tolist(), other.tolist()) for own, other in zip(a, b, strict=True)]
    assert scorer(pictures(drawn(S, grid, 2), grid, a=a, b=b)).tolist() == alone


@pytest.mark.parametrize(
    "scorer",
    [Mixed(first=Read(rule=VirtualCls()), second=B, weight=0.3), Product(first=A, second=B, powers=(2.0, 0.5))],
)
def test_it_is_stored_with_a_pipeline(scorer: Any) -> None:
    pipeline = Pipeline(name="both", picks=(Pick(name="both", scorer=scorer, selector=TopK()),))
    assert Pipeline.from_dict(json.loads(json.dumps(pipeline.to_dict())), stages=STAGES) == pipeline


@pytest.mark.parametrize("wrong", [-0.1, 1.1, True, "0.5", None, math.nan])
def test_weights_are_checked(wrong: Any) -> None:
    with pytest.raises(InvalidOption, match="weight"):
        Mixed(first=A, second=B, weight=wrong)


@pytest.mark.parametrize("wrong", [0, -1.0, True, "1", None, math.nan, math.inf])
def test_powers_are_checked(wrong: Any) -> None:
    for powers in ((wrong, 1.0), (1.0, wrong)):
        with pytest.raises(InvalidOption, match="powers"):
            Product(first=A, second=B, powers=powers)


@pytest.mark.parametrize("wrong", [(), (1.0,), (1.0, 2.0, 3.0), 2.0])
def test_powers_are_two(wrong: Any) -> None:
    with pytest.raises(InvalidOption, match="powers"):
        Product(first=A, second=B, powers=wrong)


@pytest.mark.parametrize(
    "scorer", [Mixed(first=A, second=B, weight=0.0), Product(first=A, second=B), Product(first=B, second=A)]
)
def test_what_is_ruled_out_stays_ruled_out(scorer: Any) -> None:
    """As a scorer may say with -inf, also where the other finds nothing."""
    assert by_hand(scorer, [1.0, -math.inf, 3.0], [2.0, 1.0, 4.0])[1] == -math.inf


def test_powers_do_not_bring_it_back() -> None:
    assert (
        by_hand(Product(first=A, second=B, powers=(2.0, 1.0)), [1.0, -math.inf, 3.0], [1.0, 2.0, 4.0])[1] == -math.inf
    )
