"""What holds for cells, mergers, counters and debiasers on any input: coverage, mixtures, batches, forced tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_selector_properties import Case, cases, only, seldom_random
from vtprune import Pick, Pipeline
from vtprune.kernels import reference as kernels
from vtprune.stages.cells import CellBest, CellCentres, cells_of
from vtprune.stages.counters import Above, Mass, Outliers
from vtprune.stages.debiasers import MinMax, WithoutHighNorms, WithoutPadding, WithoutSinks, WithoutTrend
from vtprune.stages.mergers import IntoCell, IntoNearest, NeighbourSum
from vtprune.stages.peaks import IntoPeaks
from vtprune.stages.scorers import Given
from vtprune.stages.selectors import Stride, TopK
from vtprune.types import Groups, Merged, Part, Selection, VisualTokens

WORTH = Given(name="scores")
MEANS = [
    IntoNearest(),
    IntoNearest(pick=1),
    IntoCell(),
    IntoCell(pick=1),
    IntoCell(weights=WORTH),
    IntoCell(pick=0, weights=WORTH),
    IntoPeaks(pick=1),
    IntoPeaks(pick=0, share=1.0),
]
SUMS = [NeighbourSum(weights=WORTH), NeighbourSum(weights=WORTH, count=3)]
DEBIASERS = [MinMax(), WithoutSinks(), WithoutHighNorms(), WithoutTrend(), WithoutPadding()]
COUNTERS = [Outliers(scorer=WORTH), Outliers(scorer=WORTH, factor=4.0), Mass(scorer=WORTH), Above(scorer=WORTH)]
GRIDS = [
    ((1, 1),),
    ((4, 6),),
    ((7, 3),),
    ((1, 5), (5, 1)),
    ((2, 2), (3, 5), (3, 5)),
    ((1, 1), (6, 7), (1, 2)),
    ((3, 3),) * 5,
]
"""Grids of the parts of a segment."""

finite = ("random", "few", "equal", "zero", "duplicates", "bfloat16")
bounded = ("random", "equal", "zero", "negative", "ties")
any_case = cases(features=finite, scores=bounded)
# Among duplicates, which of two equal tokens is nearer is a matter of rounding.
plain = cases(features=("random",), scores=("random",))

every_merger = pytest.mark.parametrize("merger", [*MEANS, *SUMS], ids=str)
every_grid = pytest.mark.parametrize("grids", GRIDS, ids=str)


def parts_of(grids: tuple[tuple[int, int], ...]) -> tuple[Part, ...]:
    """A thumbnail and crops, one after the other."""
    parts, start = [], 0
    for number, (h, w) in enumerate(grids):
        parts.append(Part(start=start, stop=start + h * w, kind="crop" if number else "thumbnail", grid=(h, w)))
        start += h * w
    return tuple(parts)


def merge(merger: Any, stack: VisualTokens, k: int) -> tuple[Selection, torch.Tensor, Merged]:
    """Half of the tokens by score, the others evenly spaced; the weights of the merger, and what comes of them."""
    first = Pick(name="best", scorer=WORTH, selector=TopK(), share=0.5)
    rest = Pick(name="even", scorer=WORTH, selector=Stride())
    pipeline = Pipeline(name="both", picks=(first, rest), merger=merger)
    selection = pipeline.run(stack, k)
    merged = pipeline.merge(stack, selection)
    assert merged is not None
    return selection, weights_of(merger(stack, selection), selection), merged


def weights_of(found: Any, selection: Selection) -> torch.Tensor:
    """What a merger returned, as weights (S, K, N)."""
    if not isinstance(found, Groups):
        return found
    K = selection.keep.shape[1]
    into = found.into.scatter(1, selection.keep, torch.arange(K).expand_as(selection.keep))
    own = torch.nn.functional.one_hot(selection.keep, into.shape[1]).float()
    return torch.lerp(kernels.mixture_of(into, found.weights, K), own, found.stays)


def with_parts(stack: VisualTokens, grids: tuple[tuple[int, int], ...]) -> VisualTokens:
    return replace(stack, parts=parts_of(grids))


@every_grid
def test_cells_cover_every_token_for_any_count(grids: tuple[tuple[int, int], ...]) -> None:
    """Exactly `count` cells, none empty, each with a token in its middle."""
    parts = parts_of(grids)
    N = parts[-1].stop
    for count in range(1, N + 1):
        cells = cells_of(parts, count)
        assert cells.count == count
        assert len(cells.owner) == len(cells.off_centre) == N
        assert sorted(set(cells.owner.tolist())) == list(range(count))
        assert set(cells.owner[cells.off_centre == 0].tolist()) == set(range(count))


@pytest.mark.parametrize("grid", [(4, 6), (7, 3), (1, 9), (9, 1), (5, 5)])
def test_cells_are_rectangles_of_nearly_equal_size(grid: tuple[int, int]) -> None:
    """Every cell fills its bounding box, and of any two none is more than four times as large."""
    N = grid[0] * grid[1]
    for count in range(1, N + 1):
        owner = cells_of(parts_of((grid,)), count).owner.reshape(grid)
        sizes = []
        for cell in range(count):
            rows, columns = (owner == cell).nonzero()
            sizes.append(len(rows))
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert max(sizes) <= 4 * min(sizes)


@every_grid
@pytest.mark.parametrize("selector", [CellCentres(), CellBest()], ids=str)
def test_one_token_for_each_cell(selector: Any, grids: tuple[tuple[int, int], ...]) -> None:
    parts = parts_of(grids)
    N = parts[-1].stop
    case = Case(grid=(1, N), k=1, protect=0, forbid=0, features="random", scores="random", seed=N)
    stack = with_parts(case.stack(), grids)
    for k in {1, 2, (N + 1) // 2, N - 1, N} & set(range(1, N + 1)):
        pipeline = Pipeline(name="one", picks=(Pick(name="one", scorer=WORTH, selector=selector),))
        owner = cells_of(parts, k).owner
        for kept in pipeline.run(stack, k).keep.tolist():
            assert sorted(owner[kept]) == list(range(k))


@pytest.mark.parametrize("selector", [CellCentres(), CellBest()], ids=str)
@seldom_random
@given(case=any_case)
def test_cells_obey_forced_tokens(selector: Any, case: Case) -> None:
    stack = case.stack()
    pipeline = Pipeline(name="one", picks=(Pick(name="one", scorer=WORTH, selector=selector),))
    for row, kept in enumerate(pipeline.run(stack, case.k).keep.tolist()):
        assert kept == sorted(set(kept))
        assert len(kept) == case.k
        assert not stack.evidence["forbid"][row, kept].any()
        assert set(stack.evidence["protect"][row].tolist() if case.protect else []) <= set(kept)


@every_merger
@seldom_random
@given(case=any_case)
def test_every_row_is_a_mixture(merger: Any, case: Case) -> None:
    """Finite shares of 0 or more; those of a mean add up to 1, those of a sum to no more than 2."""
    stack = case.stack()
    _, weights, merged = merge(merger, stack, case.k)
    assert (weights >= 0).all()
    assert merged.rows.isfinite().all()
    assert merged.rows.dtype == stack.features.dtype
    total = weights.sum(dim=2)
    if merger in MEANS:
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    else:
        assert (total >= 1 - 1e-5).all() and (total <= 2 + 1e-5).all()


@every_merger
@seldom_random
@given(case=any_case)
def test_where_a_token_went_agrees_with_the_weights(merger: Any, case: Case) -> None:
    """No kept token has a larger share of a dropped one; it is lost where nobody has any, and in means goes to one."""
    selection, weights, merged = merge(merger, case.stack(), case.k)
    assert merged.into.shape == weights[:, 0].shape
    dropped = torch.ones_like(merged.into, dtype=torch.bool).scatter(1, selection.keep, False)
    share = weights.gather(1, merged.into.clamp(min=0)[:, None])[:, 0]
    lost = merged.into < 0
    own = torch.arange(weights.shape[1]).expand_as(selection.keep)
    assert torch.equal(merged.into.gather(1, selection.keep), own), "a kept token is its own"
    assert torch.equal(lost[dropped], (weights <= 0).all(dim=1)[dropped])
    assert torch.equal(share[dropped & ~lost], weights.amax(dim=1)[dropped & ~lost])
    if merger in MEANS:
        assert ((weights > 0).sum(dim=1) <= 1)[dropped].all()


@pytest.mark.parametrize("merger", MEANS, ids=str)
@seldom_random
@given(case=any_case)
def test_kept_tokens_never_go_into_others(merger: Any, case: Case) -> None:
    """In the column of a kept token at most its own row has a share."""
    selection, weights, _ = merge(merger, case.stack(), case.k)
    K = case.k
    own = torch.eye(K, dtype=torch.bool).expand(3, K, K)
    columns = weights.gather(2, selection.keep[:, None].expand(3, K, K))
    assert (columns[~own] == 0).all()


@pytest.mark.parametrize("merger", MEANS, ids=str)
@seldom_random
@given(case=any_case)
def test_what_takes_nothing_over_stays_bit_for_bit(merger: Any, case: Case) -> None:
    """A row whose only share is at one token is a single 1, there; where all tokens are kept that holds for all."""
    stack = case.stack()
    _, weights, merged = merge(merger, stack, case.k)
    alone = (weights > 0).sum(dim=2) == 1
    if case.k == stack.features.shape[1]:
        assert alone.all()
        assert torch.equal(merged.rows, stack.features)
    assert (weights.amax(dim=2)[alone] == 1).all()
    source = stack.features.gather(1, weights.argmax(dim=2)[..., None].expand_as(merged.rows))
    assert torch.equal(merged.rows[alone], source[alone])


@pytest.mark.parametrize(
    "merger", [IntoNearest(pick=1), IntoCell(pick=1), IntoCell(pick=0, weights=WORTH), IntoPeaks(pick=1)], ids=str
)
@seldom_random
@given(case=any_case)
def test_only_tokens_of_the_named_pick_take_others_over(merger: Any, case: Case) -> None:
    """Protected tokens and those of other picks stay as they are."""
    stack = case.stack()
    selection, _, merged = merge(merger, stack, case.k)
    others = selection.taken != merger.pick
    source = stack.features.gather(1, selection.keep[..., None].expand_as(merged.rows))
    assert torch.equal(merged.rows[others], source[others])


@every_merger
@seldom_random
@given(case=plain)
def test_a_mixture_does_not_depend_on_batch_mates(merger: Any, case: Case) -> None:
    stack = case.stack()
    _, together, merged = merge(merger, stack, case.k)
    for row in range(3):
        _, alone, own = merge(merger, only(stack, row), case.k)
        assert torch.allclose(alone[0], together[row], atol=1e-6)
        assert torch.equal(own.into[0], merged.into[row])


@pytest.mark.parametrize("debiaser", DEBIASERS, ids=str)
@seldom_random
@given(case=any_case)
def test_debiased_scores_are_finite_and_know_no_batch_mates(debiaser: Any, case: Case) -> None:
    stack = case.stack()
    scores = stack.evidence["scores"]
    together = debiaser(stack, scores)
    assert together.shape == scores.shape
    assert together.isfinite().all()
    for row in range(3):
        assert torch.allclose(debiaser(only(stack, row), scores[row : row + 1])[0], together[row], atol=1e-6)


@pytest.mark.parametrize("debiaser", DEBIASERS, ids=str)
@every_grid
def test_debiasers_take_parts_as_they_come(debiaser: Any, grids: tuple[tuple[int, int], ...]) -> None:
    """Equal scores prefer no token, whatever the parts."""
    N = sum(h * w for h, w in grids)
    case = Case(grid=(1, N), k=1, protect=0, forbid=0, features="random", scores="equal", seed=N)
    stack = with_parts(case.stack(), grids)
    even = debiaser(stack, stack.evidence["scores"])
    assert torch.allclose(even, even[:, :1].expand_as(even), atol=1e-6)


@pytest.mark.parametrize("counter", COUNTERS, ids=str)
@seldom_random
@given(case=cases(features=("random",), scores=bounded))
def test_counts_know_no_batch_mates_and_no_order(counter: Any, case: Case) -> None:
    stack = case.stack()
    pipeline = Pipeline(name="adaptive", picks=(Pick(name="one", scorer=WORTH, selector=TopK()),), counter=counter)
    together = pipeline.count(stack, case.k)
    assert ((together >= 0) & (together <= case.k)).all()
    order = torch.randperm(stack.features.shape[1], generator=torch.Generator().manual_seed(case.seed))
    shuffled = replace(stack, evidence={"scores": stack.evidence["scores"][:, order]})
    for row in range(3):
        assert pipeline.count(only(stack, row), case.k).tolist() == [together[row]]
        assert pipeline.count(only(shuffled, row), case.k).tolist() == [together[row]]


@seldom_random
@given(data=st.data())
def test_more_share_never_counts_fewer(data: Any) -> None:
    case = data.draw(cases(features=("random",), scores=bounded))
    low, high = sorted(data.draw(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1))))
    stack = case.stack()
    assert (Mass(scorer=WORTH, share=low)(stack, case.k) <= Mass(scorer=WORTH, share=high)(stack, case.k)).all()
    if (stack.evidence["scores"] >= 0).all():
        assert (Above(scorer=WORTH, share=low)(stack, case.k) >= Above(scorer=WORTH, share=high)(stack, case.k)).all()
