"""SparseVLM's recycling: clusters by density peaks, their centres and means, against loops and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity import loops_methods as methods
from tests.fidelity import loops_peaks as loops
from tests.fidelity.test_inside_methods import evidence
from tests.fidelity.test_published_methods import drawn, pictures, rows, scores
from tests.test_syncs import watched
from vtprune import Pick, Pipeline
from vtprune.catalog import build
from vtprune.stages.peaks import DensityPeaks, IntoPeaks, clustered
from vtprune.stages.scorers import Given
from vtprune.stages.selectors import TopK
from vtprune.types import VisualTokens

SIZES = [
    (1, (1, 1), 1),
    (1, (1, 2), 2),
    (2, (2, 3), 1),
    (2, (2, 3), 5),
    (3, (5, 3), 4),
    (3, (5, 3), 15),
    (2, (7, 9), 20),
    (1, (9, 11), 64),
]
"""Pictures, grid, and how many tokens stay."""
WORTH = Given(name="scores")
every_size = pytest.mark.parametrize(("S", "grid", "k"), SIZES)


def recycling(share: float = 0.3, recycled: float = 0.3) -> Pipeline:
    first = Pick(name="best", scorer=WORTH, selector=TopK(), share=1 - recycled)
    second = Pick(name="peaks", scorer=WORTH, selector=DensityPeaks(share=share))
    return Pipeline(name="recycling", picks=(first, second), merger=IntoPeaks(pick=1, share=share))


def agree(pipeline: Pipeline, stack: VisualTokens, k: int, expected: list[Any]) -> None:
    """Kept tokens, their rows within 1e-5, and who holds every token."""
    selection = pipeline.run(stack, k)
    merged = pipeline.merge(stack, selection)
    assert merged is not None
    assert selection.keep.tolist() == [kept for kept, _, _ in expected]
    for row, (_, own, _) in zip(merged.rows, expected, strict=True):
        np.testing.assert_allclose(row.double().numpy(), own, atol=1e-5, rtol=0)
    holders = selection.keep.gather(1, merged.into.clamp(min=0)).masked_fill(merged.into < 0, -1)
    assert holders.tolist() == [into for _, _, into in expected]


@pytest.mark.parametrize(("share", "recycled"), [(0.3, 0.3), (0.3, 0.0), (0.5, 0.2), (1.0, 0.5), (0.0, 0.9)])
@every_size
def test_recycling_is_the_loop(S: int, grid: tuple[int, int], k: int, share: float, recycled: float) -> None:
    features, worth = drawn(S, grid, 6), scores(S, grid)
    rated = min(k, methods.rounded(1 - recycled, k))
    expected = [loops.sparsevlm(x, a, k, rated, share) for x, a in rows(features, worth)]
    agree(recycling(share, recycled), pictures(features, grid, scores=worth), k, expected)


@pytest.mark.parametrize("recycled", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("number", range(3))
@every_size
def test_sparsevlm_is_the_loop(S: int, grid: tuple[int, int], k: int, number: int, recycled: float) -> None:
    """From attention of three heads and five words on, of which those near to the picture rate it."""
    pipeline, N = build("sparsevlm", {"recycled": recycled}), grid[0] * grid[1]
    generator = np.random.default_rng(N + k)
    visual, own = slice(2, 2 + N), list(range(2 + N, 7 + N))
    weights = generator.dirichlet([0.3] * (7 + N), (S, 3, 5))
    embeds = generator.standard_normal((S, 7 + N, 8))
    features = drawn(S, grid, 6)
    stack = pictures(features, grid, **evidence(pipeline, weights, visual, embeds))
    rated = min(k, methods.rounded(1 - recycled, k))
    expected = []
    for s, (x,) in enumerate(rows(features)):
        share = np.zeros(5)
        for token in embeds[s, visual]:
            nearness = np.exp([token @ embeds[s, word] for word in own])
            share += nearness / nearness.sum()
        raters = [t for t in range(5) if share[t] > share.mean()]
        worth = sum(head[t, visual] for head in weights[s] for t in raters) / len(raters) / 3
        expected.append(loops.sparsevlm(x, worth, k, rated))
    agree(pipeline.inside[number].choice, stack, k, expected)


def test_the_counts_of_the_authors() -> None:
    """Of 576, 312 and 117 tokens 303, 110 and 36 stay, and one for every ten of int(0.3 n) + 1 of the n others."""
    for cut, n, k, counts, clustering in zip(
        build("sparsevlm").inside,
        (576, 312, 117),
        (312, 117, 39),
        ((303, 9), (110, 7), (36, 3)),
        (82, 61, 25),
        strict=True,
    ):
        stack = pictures(drawn(1, (1, n), 4), (1, n), raters_attention=scores(1, (1, n)))
        selection = cut.choice.run(stack, k)
        assert selection.counts == counts
        assert selection.scores[1] is not None
        real = clustered(selection.scores[1], counts[1], share=0.3, left=n - counts[0])[1]
        assert real.sum() == clustering == int(0.3 * (n - counts[0])) + 1
        assert counts[1] == clustering // 10 + 1


def one_by_one(places: list[float], worth: list[float], width: int = 1, **forced: Any) -> VisualTokens:
    """Tokens on a line; `width` equal numbers each, which leave their distances as they are."""
    features = torch.tensor(places, dtype=torch.float32)[None, :, None].expand(1, -1, width)
    return pictures(features, (1, len(places)), scores=torch.tensor([worth]), **forced)


def outcome(stack: VisualTokens, k: int, pipeline: Pipeline) -> tuple[list[int], list[float], list[int]]:
    selection = pipeline.run(stack, k)
    merged = pipeline.merge(stack, selection)
    assert merged is not None
    return selection.keep[0].tolist(), merged.rows[0, :, 0].tolist(), merged.into[0].tolist()


@pytest.mark.parametrize("width", [1, 4])
def test_density_peaks_by_hand(width: int) -> None:
    """At 0, 1, 2, 10, 11, 13, three clusters: means of squares to the nearest three are 5, 2, 5, 10, 5, 13 thirds.

    The second is densest, 13 from the farthest: 13 exp(-2/3) = 6.7. 11 is 10 from it, which alone is denser: 1.9. 0 and
    2 are 1 from it, .19 both, the first of them is third. 10 and 13 are .04 and .03. So 2 joins 1; 10 and 13 join 11.
    """
    peaks = Pick(name="peaks", scorer=WORTH, selector=DensityPeaks(share=1.0))
    pipeline = Pipeline(name="peaks", picks=(peaks,), merger=IntoPeaks(pick=0, share=1.0))
    stack = one_by_one([0, 1, 2, 10, 11, 13], [0.1] * 6, width)
    kept, values, into = outcome(stack, 3, pipeline)
    assert (kept, into) == ([0, 1, 4], [0, 1, 1, 2, 2, 2])
    assert values == pytest.approx([0, 1.5, 34 / 3])


def test_recycling_by_hand() -> None:
    """Ten tokens, the best is 9. Of nine others int(2.7) + 1 = 3 are clustered: 1, 4 and 6, at 5, 8 and 9.

    One cluster: with none but itself among the nearest, all are as dense, and the first is the centre: 22 / 3.
    Two: 4 and 6 are half as far from each other as 4 from 1, squares of 1, 9 and 1. 4 and 6 are dense, 4 apart from the
    farthest, 6 likewise: both are centres, and 1 joins 4. The others are lost.
    """
    places = [0.0, 5, 1, 2, 8, 3, 9, 4, 6, 7]
    worth = [0.1, 0.7, 0.1, 0.1, 0.6, 0.1, 0.5, 0.1, 0.1, 0.9]
    assert outcome(one_by_one(places, worth), 2, recycling(recycled=0.5)) == (
        [1, 9],
        pytest.approx([22 / 3, 7.0]),
        [-1, 0, -1, -1, 0, -1, 0, -1, -1, 1],
    )
    kept, values, into = outcome(one_by_one(places, worth), 3, recycling(recycled=0.6))
    assert (kept, into) == ([4, 6, 9], [-1, 0, -1, -1, 0, -1, 1, -1, -1, 2])
    assert values == pytest.approx([6.5, 9, 7])


def test_more_clusters_than_the_share_holds_by_hand() -> None:
    """Of four others int(1.2) + 1 = 2 would be clustered; three centres take the best three, and each stays alone."""
    kept, values, into = outcome(one_by_one([0, 1, 2, 3, 4], [0.9, 0.1, 0.2, 0.3, 0.4]), 4, recycling(recycled=0.75))
    assert (kept, values, into) == ([0, 2, 3, 4], [0, 2, 3, 4], [0, -1, 1, 2, 3])


def test_where_nothing_is_recycled_nothing_is_merged() -> None:
    stack = one_by_one([0, 1, 2, 3], [0.4, 0.3, 0.2, 0.1])
    assert outcome(stack, 2, recycling(recycled=0.0)) == ([0, 1], [0, 1], [0, 1, -1, -1])
    empty = DensityPeaks()(stack, stack.evidence["scores"], 0, None)
    assert empty.shape == (1, 0)


def test_what_is_forbidden_is_in_no_cluster() -> None:
    """Not among those that are counted either: of five that may be chosen, int(1.5) + 1 = 2 are clustered, 4 and 5."""
    forbid = torch.tensor([[False, True, False, False, False, False, True, False, False]])
    worth = [0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.1, 0.1]
    stack = one_by_one([0, 1, 2, 3, 4, 5, 6, 7, 8], worth, forbid=forbid, protect=torch.tensor([[2]]))
    kept, values, into = outcome(stack, 3, recycling(recycled=2 / 3))
    assert (kept, into) == ([0, 2, 4], [0, -1, 1, -1, 2, 2, -1, -1, -1])
    assert values == [0, 2, 4.5]
    kept, values, into = outcome(stack, 2, recycling(recycled=0.5))
    assert (kept, into) == ([0, 2], [0, -1, 1, -1, -1, -1, -1, -1, -1]), "one protected, one rated: no budget is left"


def test_densities_do_not_vanish() -> None:
    """Squares over 100 make exp(-x) of fp32 a 0. At 1000 and 1021 tokens are densest still, and each is a centre."""
    peaks = Pick(name="peaks", scorer=WORTH, selector=DensityPeaks(share=1.0))
    pipeline = Pipeline(name="peaks", picks=(peaks,), merger=IntoPeaks(pick=0, share=1.0))
    kept, values, into = outcome(one_by_one([-40, 0, 30, 1000, 1021, 1050], [0.1] * 6, 4096), 2, pipeline)
    assert (kept, into) == ([3, 4], [0, 0, 0, 0, 1, 1])
    assert values == pytest.approx([990 / 4, 2071 / 2])
    assert torch.tensor(-(21.0**2) / 2).exp() == 0


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = pictures(drawn(2, (7, 9), 6), (7, 9), scores=scores(2, (7, 9)))
    with watched(monkeypatch) as waits:
        selection = recycling().run(stack, 20)
        IntoPeaks(pick=1)(stack, selection)
    assert not waits.ours
