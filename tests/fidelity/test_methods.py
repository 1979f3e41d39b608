"""Every method against its loop form, and two cases each worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.fidelity import loops
from vtprune.catalog import build
from vtprune.types import Ordinal, Part, VisualTokens

SHAPES = [(1, 1, 1), (2, 5, 2), (3, 9, 4), (2, 13, 13), (1, 49, 12), (4, 31, 7)]


def tokens(features: torch.Tensor, importance: torch.Tensor | None = None) -> VisualTokens:
    """A stack of pictures as a stage sees it."""
    S, N, _ = features.shape
    return VisualTokens(
        features=features,
        parts=(Part(start=0, stop=N, kind="image", grid=(1, N)),),
        ordinals=tuple(Ordinal(segment=number) for number in range(S)),
        evidence={} if importance is None else {"importance": importance},
    )


def chosen(method: str, stack: VisualTokens, k: int, **parameters: object) -> list[list[int]]:
    return build(method, parameters).run(stack, k).keep.tolist()


@pytest.mark.parametrize(("S", "N", "k"), SHAPES)
def test_fastervlm_is_the_loop(S: int, N: int, k: int) -> None:
    importance = torch.rand(S, N, generator=torch.Generator().manual_seed(N))
    expected = [loops.fastervlm(row.numpy(), k) for row in importance]
    assert chosen("fastervlm", tokens(torch.zeros(S, N, 2), importance), k) == expected


@pytest.mark.parametrize(("S", "N", "k"), SHAPES)
def test_divprune_is_the_loop(S: int, N: int, k: int) -> None:
    features = torch.randn(S, N, 6, generator=torch.Generator().manual_seed(N))
    expected = [loops.divprune(row.double().numpy(), k) for row in features]
    assert chosen("divprune", tokens(features), k) == expected


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("S", "N", "k"), SHAPES)
def test_vtprune_is_the_loop(S: int, N: int, k: int, lam: float) -> None:
    generator = torch.Generator().manual_seed(N)
    features, importance = torch.randn(S, N, 6, generator=generator), torch.rand(S, N, generator=generator)
    expected = [
        loops.mmr(scores.double().numpy(), row.double().numpy(), k, lam)
        for scores, row in zip(importance, features, strict=True)
    ]
    assert chosen("vtprune", tokens(features, importance), k, lam=lam) == expected


@pytest.mark.parametrize(("S", "N", "k"), SHAPES)
def test_uniform_is_the_loop(S: int, N: int, k: int) -> None:
    assert chosen("uniform", tokens(torch.zeros(S, N, 2)), k) == [loops.uniform(N, k)] * S


def test_fastervlm_by_hand() -> None:
    """Scores .1 .4 .4 .1 .9: two of five are 1 and 4 (the tie of 1 and 2 goes to 1); three of four are all but 2."""
    importance = torch.tensor([[0.1, 0.4, 0.4, 0.1, 0.9]])
    assert chosen("fastervlm", tokens(torch.zeros(1, 5, 2), importance), 2) == [[1, 4]]
    assert chosen("fastervlm", tokens(torch.zeros(1, 4, 2), torch.tensor([[0.3, 0.3, 0.2, 0.3]])), 3) == [[0, 1, 3]]


def test_divprune_by_hand() -> None:
    """Angles 0, 10, 90, 180 degrees: nearest neighbours lie at 10, 10, 80, 90, so 180 comes first, then 0, then 90.

    With angles 0, 0, 60, 60 every nearest neighbour lies at 0: the first token starts, then the first at 60 follows.
    """
    assert chosen("divprune", tokens(at_angles(0, 10, 90, 180)), 1) == [[3]]
    assert chosen("divprune", tokens(at_angles(0, 10, 90, 180)), 2) == [[0, 3]]
    assert chosen("divprune", tokens(at_angles(0, 10, 90, 180)), 3) == [[0, 2, 3]]
    assert chosen("divprune", tokens(at_angles(0, 0, 60, 60)), 2) == [[0, 2]]


def test_vtprune_by_hand() -> None:
    """Importance 1, .9, .5, 0 at 0, 0, 90, 60 degrees and lam .5: after 0 the worths are -.05, .25 and -.25.

    With lam .9 they are .71, .45 and -.05: the copy of the first token wins.
    """
    stack = tokens(at_angles(0, 0, 90, 60), torch.tensor([[1.0, 0.9, 0.5, 0.0]]))
    assert chosen("vtprune", stack, 2) == [[0, 2]]
    assert chosen("vtprune", stack, 2, lam=0.9) == [[0, 1]]


def test_uniform_by_hand() -> None:
    """Four of eight are 1, 3, 5, 7; three of ten are the middles of 0-3.3, 3.3-6.7 and 6.7-10: 1, 5, 8."""
    assert chosen("uniform", tokens(torch.zeros(1, 8, 2)), 4) == [[1, 3, 5, 7]]
    assert chosen("uniform", tokens(torch.zeros(1, 10, 2)), 3) == [[1, 5, 8]]


def test_random_depends_on_seed_place_and_counts_alone() -> None:
    stack = tokens(torch.randn(3, 20, 4))
    picked = chosen("random", stack, 6)
    assert picked == chosen("random", tokens(torch.zeros(3, 20, 9)), 6)
    assert picked[1] == chosen("random", tokens(torch.zeros(2, 20, 9)), 6)[1]
    assert picked != chosen("random", stack, 6, seed=1)
    assert len({tuple(row) for row in picked}) == 3


def test_random_is_uniform() -> None:
    """Each of 10 tokens is among 3 picked ones in about 30 % of 2,000 pictures (standard error 1 %)."""
    picked = torch.tensor(chosen("random", tokens(torch.zeros(2000, 10, 1)), 3))
    share = torch.bincount(picked.flatten(), minlength=10) / 2000
    assert (share - 0.3).abs().max() < 0.05


@pytest.mark.parametrize("method", ["fastervlm", "divprune", "vtprune", "uniform", "random"])
@pytest.mark.parametrize("features", ["equal", "zero", "duplicates"])
def test_degenerate_features_still_give_exact_distinct_counts(method: str, features: str) -> None:
    stack = {
        "equal": torch.ones(2, 11, 4),
        "zero": torch.zeros(2, 11, 4),
        "duplicates": torch.eye(4)[torch.arange(11) % 4].expand(2, 11, 4),
    }[features]
    for k in (0, 1, 5, 10, 11):
        for row in chosen(method, tokens(stack, torch.ones(2, 11)), k):
            assert len(row) == k
            assert row == sorted(set(row))


def test_cls_attention_of_the_loop_by_hand() -> None:
    """One head of width 1, CLS query 1, keys 0, 0, log 2: the patches get 1/4 and 2/4."""
    query, key = np.ones((1, 3, 1)), np.array([[[0.0], [0.0], [np.log(2)]]])
    np.testing.assert_allclose(loops.cls_attention(query, key, 1.0), [0.25, 0.5])


def at_angles(*degrees: float) -> torch.Tensor:
    """Unit vectors (1, N, 2) in double precision, so that hand-worked ties are ties."""
    angles = torch.deg2rad(torch.tensor([degrees], dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)
