"""Every selector against its loop, two cases each worked by hand, and what some of them are equal to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity import loops_selectors as loops
from tests.fidelity.test_methods import at_angles
from vtprune import Pick, Pipeline
from vtprune.errors import InvalidOption, MissingEvidence
from vtprune.stages import selectors
from vtprune.stages.allocation import largest_remainder
from vtprune.stages.diverse import DPP, Dispersion, Facility, SensitiveDiversity
from vtprune.stages.structured import AnchorsAndNeighbours, ChunkQuota, GroupSuppress, Pivots, ResidualDrop, WholeRows
from vtprune.types import Ordinal, Part, VisualTokens

SHAPES = [(1, (1, 1), 1), (2, (1, 5), 2), (3, (3, 3), 4), (2, (1, 13), 13), (1, (7, 7), 12), (4, (1, 31), 7)]
"""Pictures, grid, and how many tokens to keep."""


@dataclass(frozen=True)
class Given:
    """The scores of the evidence."""

    needs: frozenset[str] = frozenset({"scores"})

    def __call__(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.evidence["scores"].float()


def pictures(features: Any, scores: Any, grid: tuple[int, int] | None = None, **evidence: torch.Tensor) -> VisualTokens:
    """A stack of pictures as a stage sees it; `features` (S, N, D), `scores` (S, N)."""
    S, N, _ = features.shape
    return VisualTokens(
        features=features,
        parts=(Part(start=0, stop=N, kind="image", grid=grid or (1, N)),),
        ordinals=tuple(Ordinal(segment=number) for number in range(S)),
        evidence={"scores": torch.as_tensor(scores), **evidence},
    )


def drawn(S: int, grid: tuple[int, int], D: int = 6) -> VisualTokens:
    """Random pictures, scores in (0, 1)."""
    N = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(N)
    return pictures(torch.randn(S, N, D, generator=generator), torch.rand(S, N, generator=generator), grid)


def chosen(selector: Any, stack: VisualTokens, k: int) -> list[list[int]]:
    pipeline = Pipeline(name="one", picks=(Pick(name="one", scorer=Given(), selector=selector),))
    return pipeline.run(stack, k).keep.tolist()


def by_hand(selector: Any, k: int, scores: list[float], *, angles: list[float] | None = None, **more: Any) -> list[int]:
    """What is chosen of a single picture of tokens at these angles (in degrees)."""
    features = torch.ones(1, len(scores), 2) if angles is None else at_angles(*angles)
    return chosen(selector, pictures(features, [scores], **more), k)[0]


Loop = Callable[[np.ndarray, np.ndarray, int, tuple[int, int]], list[int]]
CASES: list[tuple[Any, Loop]] = [
    *(
        (Dispersion(reduce=r, first=f), lambda x, s, k, _, r=r, f=f: loops.dispersion(x, s, k, reduce=r, first=f))
        for r in ("min", "sum")
        for f in ("score", "isolated")
    ),
    *(
        (SensitiveDiversity(first=f), lambda x, s, k, _, f=f: loops.zoo(x, s, k, first=f))
        for f in ("score", "isolated")
    ),
    (DPP(), lambda x, s, k, _: loops.dpp(x, s, k)),
    (Facility(), lambda x, s, k, _: loops.scope(x, s, k, alpha=1.0)),
    (Facility(alpha=2.0), lambda x, s, k, _: loops.scope(x, s, k, alpha=2.0)),
    (WholeRows(), lambda x, s, k, grid: loops.whole_rows(s, k, grid[1])),
    (ResidualDrop(), lambda x, s, k, _: loops.residual_drop(x, s, k, 8)),
    (ResidualDrop(step=1), lambda x, s, k, _: loops.residual_drop(x, s, k, 1)),
    (ResidualDrop(step=3), lambda x, s, k, _: loops.residual_drop(x, s, k, 3)),
    (GroupSuppress(), lambda x, s, k, _: loops.prunesid(x, s, k, max(k // 4, 1))),
    (GroupSuppress(groups=3), lambda x, s, k, _: loops.prunesid(x, s, k, min(3, k))),
    (ChunkQuota(), lambda x, s, k, _: loops.holov(x, s, k, 16, 0.09)),
    (ChunkQuota(chunks=4, diversity=1.0), lambda x, s, k, _: loops.holov(x, s, k, 4, 1.0)),
    (Pivots(), lambda x, s, k, _: loops.dart(x, s, k, 8)),
    (Pivots(count=3), lambda x, s, k, _: loops.dart(x, s, k, 3)),
    (AnchorsAndNeighbours(), lambda x, s, k, grid: loops.anchors(s, k, *grid)),
]


@pytest.mark.parametrize(("selector", "loop"), CASES, ids=[str(selector) for selector, _ in CASES])
@pytest.mark.parametrize(("S", "grid", "k"), SHAPES)
def test_the_selector_is_the_loop(selector: Any, loop: Loop, S: int, grid: tuple[int, int], k: int) -> None:
    stack = drawn(S, grid)
    scores = stack.evidence["scores"].double().numpy()
    expected = [loop(x, s, k, grid) for x, s in zip(stack.features.double().numpy(), scores, strict=True)]
    assert chosen(selector, stack, k) == expected


@pytest.mark.parametrize("seed", range(40))
def test_largest_remainder_is_the_loop(seed: int) -> None:
    draw = np.random.default_rng(seed)
    G = int(draw.integers(1, 9))
    weights, cap, total = draw.random((3, G)) ** 4, draw.integers(0, 9, (3, G)), int(draw.integers(0, 40))
    weights[1, : G // 2] = 0
    given = largest_remainder(torch.from_numpy(weights), total, torch.from_numpy(cap)).tolist()
    assert given == [loops.largest_remainder(w, total, c) for w, c in zip(weights.tolist(), cap.tolist(), strict=True)]
    assert [sum(row) for row in given] == [min(total, sum(row)) for row in cap.tolist()]


def test_largest_remainder_by_hand() -> None:
    """5 by 1 : 1 : 2 is 1.25, 1.25, 2.5: the third has the largest remainder. 10 by 6 : 3 : 1 with at most 4 each: the
    2 cut off the first go to the others, one each. Without weights 7 is 3 and 2 and 2, and each row has its own total.
    """
    room = torch.full((1, 3), 9)
    assert largest_remainder(torch.tensor([[1.0, 1.0, 2.0]]), 5, room).tolist() == [[1, 1, 3]]
    assert largest_remainder(torch.tensor([[6.0, 3.0, 1.0]]), 10, torch.full((1, 3), 4)).tolist() == [[4, 4, 2]]
    totals = torch.tensor([[7], [0]])
    assert largest_remainder(torch.zeros(2, 3), totals, room.expand(2, 3)).tolist() == [[3, 2, 2], [0, 0, 0]]


def test_dispersion_by_hand() -> None:
    """0, 10, 100, 180 degrees, starting at 10: the farthest is 180. The nearest chosen one is then .02 from 0 and .83
    from 100; both together are 2.02 from 0 and 1.83 from 100.
    """
    angles, scores = [0.0, 10.0, 100.0, 180.0], [0.0, 1.0, 0.0, 0.0]
    for reduce in ("min", "sum"):
        assert by_hand(Dispersion(reduce=reduce), 2, scores, angles=angles) == [1, 3]
    assert by_hand(Dispersion(reduce="min"), 3, scores, angles=angles) == [1, 2, 3]
    assert by_hand(Dispersion(reduce="sum"), 3, scores, angles=angles) == [0, 1, 3]


def test_sensitive_diversity_by_hand() -> None:
    """Scores .5, .4, .2 at 0, 60, 180 degrees: after 0 the worths are .4 x .5 and .2 x 2. With .05 it is .1."""
    assert by_hand(SensitiveDiversity(), 2, [0.5, 0.4, 0.2], angles=[0, 60, 180]) == [0, 2]
    assert by_hand(SensitiveDiversity(), 2, [0.5, 0.4, 0.05], angles=[0, 60, 180]) == [0, 1]


def test_dpp_by_hand() -> None:
    """Relevance 1, 1, r at 0, 30, 90 degrees: after 0 the volumes are sin² 30 = .25 and r².

    At 0, 90, 45, 45 degrees two tokens span all: the third is the more relevant of the rest.
    """
    assert by_hand(DPP(), 2, [1.0, 1.0, 0.4], angles=[0, 30, 90]) == [0, 1]
    assert by_hand(DPP(), 2, [1.0, 1.0, 0.6], angles=[0, 30, 90]) == [0, 2]
    assert by_hand(DPP(), 3, [1.0, 0.9, 0.3, 0.5], angles=[0, 90, 45, 45]) == [0, 1, 3]


def test_facility_by_hand() -> None:
    """Three tokens at 0 degrees and one at 90: one of the three covers 3, the other 1.

    With score 2 the last is worth 2 and comes second, with 4 first, with 4 to the power of a half second again.
    """
    angles = [0.0, 0.0, 0.0, 90.0]
    assert by_hand(Facility(), 1, [1.0, 1.0, 1.0, 2.0], angles=angles) == [0]
    assert by_hand(Facility(), 2, [1.0, 1.0, 1.0, 2.0], angles=angles) == [0, 3]
    assert by_hand(Facility(), 1, [1.0, 1.0, 1.0, 4.0], angles=angles) == [3]
    assert by_hand(Facility(alpha=0.5), 1, [1.0, 1.0, 1.0, 4.0], angles=angles) == [0]


def test_whole_rows_by_hand() -> None:
    """Means .37 and .47: the second row, then the .9 of the first. Of equal rows the first comes whole."""
    scores = [0.1, 0.9, 0.1, 0.5, 0.5, 0.4]
    assert by_hand(WholeRows(), 3, scores, grid=(2, 3)) == [3, 4, 5]
    assert by_hand(WholeRows(), 4, scores, grid=(2, 3)) == [1, 3, 4, 5]
    assert by_hand(WholeRows(), 3, [1.0, 1.0, 1.0, 1.0, 2.0, 0.0], grid=(3, 2)) == [0, 1, 2]


def test_rows_and_neighbours_stay_in_their_part() -> None:
    """A thumbnail of 1 x 2 and a crop of 2 x 2; the best token is the last of the thumbnail."""
    parts = (Part(start=0, stop=2, kind="thumbnail", grid=(1, 2)), Part(start=2, stop=6, kind="crop", grid=(2, 2)))
    plain = pictures(torch.ones(1, 6, 2), [[0.5, 0.9, 0.8, 0.2, 0.7, 0.8]])
    stack = VisualTokens(features=plain.features, parts=parts, ordinals=plain.ordinals, evidence=plain.evidence)
    assert chosen(WholeRows(), stack, 2) == [[4, 5]]
    assert chosen(WholeRows(), stack, 4) == [[0, 1, 4, 5]]
    assert chosen(AnchorsAndNeighbours(), stack, 3) == [[0, 1, 2]]
    assert chosen(AnchorsAndNeighbours(), stack, 4) == [[0, 1, 2, 4]]


def test_residual_drop_by_hand() -> None:
    """0, 5, 90, 180, 93 degrees by descending score. 0, 90 and 93 are held against 5 and 180: cosines .996, .087, .052.

    0 goes; the list is then 90, 93, 5, 180: 90 (next to 93) and 5 are held against 93 and 180, and 90 goes. Of three
    tokens two are held against the one between them, and for one place both go.
    """
    angles, scores = [0.0, 5.0, 90.0, 180.0, 93.0], [5.0, 4.0, 3.0, 2.0, 1.0]
    assert by_hand(ResidualDrop(step=1), 4, scores, angles=angles) == [1, 2, 3, 4]
    assert by_hand(ResidualDrop(step=1), 3, scores, angles=angles) == [1, 3, 4]
    assert by_hand(ResidualDrop(), 1, [3.0, 2.0, 1.0], angles=[0, 50, 70]) == [1]


def test_group_suppress_by_hand() -> None:
    """u, u, -u and v, v, orthogonal: two components, and a mean similarity of 0, above which a better one suppresses.

    Of the first group the .9 and -u survive, of the second the .3: two places and one. A fourth place goes to the group
    with more survivors, which fills it with its suppressed .5.
    """
    u, v = torch.tensor([2.0, 2.0, -2.0, -2.0]), torch.tensor([2.0, -2.0, 2.0, -2.0])
    stack = pictures(torch.stack([u, u, -u, v, v])[None], [[0.5, 0.9, 0.1, 0.3, 0.2]])
    assert chosen(GroupSuppress(groups=2), stack, 3) == [[1, 2, 3]]
    assert chosen(GroupSuppress(groups=2), stack, 4) == [[0, 1, 2, 3]]


def test_chunk_quota_by_hand() -> None:
    """Means .2 and .6 share 4 places as 1 and 3. Means .1 and .9 as .4 and 3.6, but a chunk holds only 3.

    Four equal scores, two tokens at right angles and two alike: variances 0, 0, 1, 1 of mean .5, so that with half the
    weight the chunks are worth 1 and 2. Without it the tie of 1.5 and 1.5 goes to the first.
    """
    plain = ChunkQuota(chunks=2, diversity=0.0)
    assert by_hand(plain, 4, [0.1, 0.2, 0.3, 0.2, 0.6, 1.0]) == [2, 3, 4, 5]
    assert by_hand(plain, 4, [0.0, 0.1, 0.2, 0.9, 0.9, 0.9]) == [2, 3, 4, 5]
    assert by_hand(plain, 3, [1.0] * 4, angles=[0, 90, 0, 0]) == [0, 1, 2]
    assert by_hand(ChunkQuota(chunks=2, diversity=0.5), 3, [1.0] * 4, angles=[0, 90, 0, 0]) == [0, 2, 3]


def test_pivots_by_hand() -> None:
    """Pivots at 0 and 90 degrees; of 10, 170 and 280 the first is farthest from 170, the second then from 280.

    The pivot at 0 alone takes 170 and then 90.
    """
    angles, scores = [0.0, 90.0, 10.0, 170.0, 280.0], [0.9, 0.8, 0.1, 0.1, 0.1]
    assert by_hand(Pivots(count=2), 4, scores, angles=angles) == [0, 1, 3, 4]
    assert by_hand(Pivots(count=1), 3, scores, angles=angles) == [0, 1, 3]
    assert by_hand(Pivots(count=2), 1, scores, angles=angles) == [0]


def test_anchors_by_hand() -> None:
    """The centre of 3 x 3 brings its four neighbours, best first; a row's end does not bring the next row's begin."""
    scores = [0.0, 0.1, 0.8, 0.1, 0.9, 0.4, 0.0, 0.5, 0.0]
    assert by_hand(AnchorsAndNeighbours(), 3, scores, grid=(3, 3)) == [4, 5, 7]
    assert by_hand(AnchorsAndNeighbours(), 5, scores, grid=(3, 3)) == [1, 3, 4, 5, 7]
    assert by_hand(AnchorsAndNeighbours(), 6, scores, grid=(3, 3)) == [1, 2, 3, 4, 5, 7]
    assert by_hand(AnchorsAndNeighbours(), 3, [0.1, 0.1, 0.9, 0.3, 0.1, 0.1], grid=(2, 3)) == [1, 2, 5]


@pytest.mark.parametrize(("S", "grid", "k"), SHAPES)
def test_divprune_has_two_other_names(S: int, grid: tuple[int, int], k: int) -> None:
    """MMR without relevance, started at the most isolated token; equal sensitivities."""
    stack = drawn(S, grid)
    level = pictures(stack.features, torch.zeros_like(stack.evidence["scores"]))
    expected = chosen(Dispersion(reduce="min", first="isolated"), stack, k)
    assert chosen(SensitiveDiversity(first="isolated"), level, k) == expected
    start = torch.tensor(chosen(Dispersion(first="isolated"), stack, 1))
    if k > 1:
        protected = pictures(stack.features, level.evidence["scores"], protect=start)
        assert chosen(selectors.MMR(lam=0.0), protected, k) == expected


@pytest.mark.parametrize(("S", "grid", "k"), SHAPES)
def test_relevance_alone_is_top_k(S: int, grid: tuple[int, int], k: int) -> None:
    """Where all tokens are orthogonal a DPP looks at relevance only, facility location too, and MMR if told so."""
    plain = drawn(S, grid)
    N = plain.features.shape[1]
    expected = chosen(selectors.TopK(), plain, k)
    orthogonal = pictures(torch.eye(N).expand(S, N, N), plain.evidence["scores"], grid)
    assert chosen(DPP(), orthogonal, k) == expected
    assert chosen(Facility(), orthogonal, k) == expected
    assert chosen(selectors.MMR(lam=1.0), plain, k) == expected


def test_other_vectors_are_compared_where_named() -> None:
    """Features all alike, keys that are not: the choice follows the keys, and asks for them."""
    plain = drawn(2, (3, 3))
    flat = pictures(torch.ones_like(plain.features), plain.evidence["scores"], keys=plain.features)
    for kind in (ResidualDrop, Pivots, GroupSuppress):
        assert kind().needs == frozenset()
        assert kind(vectors="keys").needs == {"keys"}
        assert chosen(kind(vectors="keys"), flat, 4) == chosen(kind(), plain, 4)
        with pytest.raises(MissingEvidence, match="keys"):
            chosen(kind(vectors="keys"), plain, 4)


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "8"])
def test_counts_are_checked(wrong: Any) -> None:
    for kind, name in ((ResidualDrop, "step"), (Pivots, "count"), (ChunkQuota, "chunks"), (GroupSuppress, "groups")):
        with pytest.raises(InvalidOption, match=name):
            kind(**{name: wrong})
