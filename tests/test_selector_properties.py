"""What holds for every selector on any input: counts, protected and forbidden tokens, batches, order, no waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fidelity.test_selectors import Given, pictures
from tests.test_syncs import watched
from vtprune import Pick, Pipeline
from vtprune.stages.allocation import largest_remainder
from vtprune.stages.diverse import DPP, Dispersion, Facility, SensitiveDiversity
from vtprune.stages.peaks import DensityPeaks
from vtprune.stages.selectors import MMR, Stride, TopK
from vtprune.stages.structured import AnchorsAndNeighbours, ChunkQuota, GroupSuppress, Pivots, ResidualDrop, WholeRows
from vtprune.types import Selection, VisualTokens

GROWING = [
    TopK(),
    MMR(),
    Dispersion(),
    Dispersion(reduce="min"),
    SensitiveDiversity(),
    DPP(),
    Facility(),
]
"""Those that go on from what was chosen before as if it were their own choice."""
BLIND_TO_ORDER = [
    *GROWING,
    ResidualDrop(),
    ResidualDrop(step=2),
    GroupSuppress(),
    Pivots(count=3),
]
# Of two tokens that are each other's nearest neither is more isolated: the lower index is taken.
SELECTORS = [
    *BLIND_TO_ORDER,
    Dispersion(reduce="min", first="isolated"),
    Stride(),
    WholeRows(),
    AnchorsAndNeighbours(),
    ChunkQuota(),
    ChunkQuota(chunks=3),
    DensityPeaks(),
    DensityPeaks(share=1.0),
]
FEATURES = ("random", "few", "equal", "zero", "duplicates", "endless", "bfloat16")
SCORES = ("random", "equal", "zero", "negative", "ties", "huge")

every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=str)
seldom_random = settings(derandomize=True, deadline=None, database=None, max_examples=40)


@dataclass(frozen=True)
class Case:
    """A stack of three pictures, how many tokens to keep, and how many of them are protected or forbidden."""

    grid: tuple[int, int]
    k: int
    protect: int
    forbid: int
    features: str
    scores: str
    seed: int

    def stack(self) -> VisualTokens:
        generator = torch.Generator().manual_seed(self.seed)
        N = self.grid[0] * self.grid[1]
        order = torch.stack([torch.randperm(N, generator=generator) for _ in range(3)])
        forced = {"protect": order[:, : self.protect]} if self.protect else {}
        banned = order[:, self.protect : self.protect + self.forbid]
        forced["forbid"] = torch.zeros(3, N, dtype=torch.bool).scatter(1, banned, True)
        return pictures(self._features(generator, N), self._scores(generator, N), self.grid, **forced)

    def _features(self, generator: torch.Generator, N: int) -> torch.Tensor:
        x = torch.randn(3, N, 2 if self.features == "few" else 6, generator=generator)
        endless = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.05, float("inf"))
        return {
            "equal": torch.ones_like(x),
            "zero": torch.zeros_like(x),
            "duplicates": x[:, :3].repeat(1, N, 1)[:, :N],
            "endless": endless.masked_fill(torch.rand(x.shape, generator=generator) < 0.05, float("nan")),
            "bfloat16": x.bfloat16(),
        }.get(self.features, x)

    def _scores(self, generator: torch.Generator, N: int) -> torch.Tensor:
        s = torch.rand(3, N, generator=generator)
        return {
            "equal": torch.full_like(s, 0.3),
            "zero": torch.zeros_like(s),
            "negative": -s,
            "ties": (3 * s).round(),
            "huge": s.masked_fill(s > 0.5, float("inf")),
        }.get(self.scores, s)


@st.composite
def cases(draw: Any, features: tuple[str, ...] = FEATURES, scores: tuple[str, ...] = SCORES) -> Case:
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 7)))
    N = grid[0] * grid[1]
    k = draw(st.one_of(st.just(1), st.just(N), st.integers(1, N)))
    return Case(
        grid=grid,
        k=k,
        protect=draw(st.integers(0, min(k, 3))),
        forbid=draw(st.integers(0, min(N - k, 4))),
        features=draw(st.sampled_from(features)),
        scores=draw(st.sampled_from(scores)),
        seed=draw(st.integers(0, 2**31)),
    )


plain = cases(features=("random", "bfloat16"), scores=("random",))


def run(selector: Any, stack: VisualTokens, k: int) -> Selection:
    return Pipeline(name="one", picks=(Pick(name="one", scorer=Given(), selector=selector),)).run(stack, k)


def only(stack: VisualTokens, row: int) -> VisualTokens:
    """One picture of the stack."""
    return VisualTokens(
        features=stack.features[row : row + 1],
        parts=stack.parts,
        ordinals=stack.ordinals[row : row + 1],
        evidence={name: x[row : row + 1] for name, x in stack.evidence.items()},
    )


@every_selector
@seldom_random
@given(case=cases())
def test_counts_are_exact_and_forced_tokens_are_obeyed(selector: Any, case: Case) -> None:
    stack = case.stack()
    selection = run(selector, stack, case.k)
    assert selection.keep.shape == (3, case.k)
    for row, kept in enumerate(selection.keep.tolist()):
        assert kept == sorted(set(kept))
        assert kept[0] >= 0 and kept[-1] < case.grid[0] * case.grid[1]
        assert not stack.evidence["forbid"][row, kept].any()
        if case.protect:
            assert set(stack.evidence["protect"][row].tolist()) <= set(kept)


@every_selector
@seldom_random
@given(case=plain)
def test_a_choice_does_not_depend_on_batch_mates(selector: Any, case: Case) -> None:
    stack = case.stack()
    together = run(selector, stack, case.k).keep
    for row in range(3):
        assert torch.equal(run(selector, only(stack, row), case.k).keep[0], together[row])


@pytest.mark.parametrize("selector", BLIND_TO_ORDER, ids=str)
@seldom_random
@given(case=plain)
def test_the_order_of_the_tokens_does_not_matter(selector: Any, case: Case) -> None:
    stack = case.stack()
    N = stack.features.shape[1]
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(case.seed))
    came_to = shuffled.argsort()
    evidence = {"scores": stack.evidence["scores"][:, shuffled], "forbid": stack.evidence["forbid"][:, shuffled]}
    if case.protect:
        evidence["protect"] = came_to[stack.evidence["protect"]]
    moved = pictures(stack.features[:, shuffled], **evidence)
    back = shuffled[run(selector, moved, case.k).keep].sort(dim=1).values
    assert torch.equal(back, run(selector, stack, case.k).keep)


@pytest.mark.parametrize("selector", [*GROWING, Dispersion(reduce="min", first="isolated")], ids=str)
def test_what_was_chosen_before_counts_as_chosen(selector: Any) -> None:
    """Five of its own choices protected, a selector ends where it would have without."""
    case = Case(grid=(5, 6), k=12, protect=0, forbid=4, features="random", scores="random", seed=7)
    stack = case.stack()
    later = pictures(stack.features, **{**stack.evidence, "protect": run(selector, stack, 5).keep})
    selection = run(selector, later, case.k)
    assert (selection.taken == -1).sum(dim=1).tolist() == [5, 5, 5]
    assert torch.equal(selection.keep, run(selector, stack, case.k).keep)


def test_protected_tokens_suppress_others_and_not_each_other() -> None:
    """u, u, u, -u and v, v as in the case by hand; with both first u protected the third goes, and -u is free."""
    u, v = torch.tensor([2.0, 2.0, -2.0, -2.0]), torch.tensor([2.0, -2.0, 2.0, -2.0])
    features, scores = torch.stack([u, u, u, -u, v, v])[None], [[0.1, 0.1, 0.9, 0.5, 0.3, 0.2]]
    assert run(GroupSuppress(groups=2), pictures(features, scores), 2).keep.tolist() == [[2, 4]]
    protected = pictures(features, scores, protect=torch.tensor([[0, 1]]))
    assert run(GroupSuppress(groups=2), protected, 4).keep.tolist() == [[0, 1, 3, 4]]


@every_selector
@pytest.mark.parametrize("protect", [0, 2])
def test_nothing_waits_for_the_device(selector: Any, protect: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(grid=(4, 6), k=9, protect=protect, forbid=3, features="random", scores="random", seed=1)
    stack = case.stack()
    expected = run(selector, stack, case.k).keep
    with watched(monkeypatch) as waits:
        kept = run(selector, stack, case.k).keep
    assert not waits.ours
    assert torch.equal(kept, expected)


@seldom_random
@given(data=st.data())
def test_budgets_add_up_and_fit(data: Any) -> None:
    G = data.draw(st.integers(1, 8))
    weights = data.draw(st.lists(st.floats(-1, 1e30), min_size=G, max_size=G))
    cap = data.draw(st.lists(st.integers(0, 20), min_size=G, max_size=G))
    total = data.draw(st.integers(0, 60))
    given_to = largest_remainder(torch.tensor([weights]), total, torch.tensor([cap]))[0]
    assert given_to.sum() == min(total, sum(cap))
    assert (given_to >= 0).all() and (given_to <= torch.tensor(cap)).all()
