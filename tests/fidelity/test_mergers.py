"""Every merger against its loop, and two cases each worked by hand; the cells of a grid as well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity import loops_stages as loops
from tests.fidelity.test_methods import at_angles
from tests.fidelity.test_published_methods import drawn, pictures, rows, scores
from vtprune import Pick, Pipeline, picking
from vtprune.errors import UnsupportedCall
from vtprune.stages.cells import CellBest, CellCentres, cells_of
from vtprune.stages.mergers import IntoCell, IntoNearest, NeighbourSum
from vtprune.stages.scorers import Constant, Given
from vtprune.stages.selectors import Stride, TopK
from vtprune.types import Groups, Merged, Part, Selection, VisualTokens

SIZES = [
    (1, (1, 1), 1),
    (2, (2, 3), 2),
    (3, (5, 3), 15),
    (2, (1, 13), 7),
    (2, (7, 6), 1),
    (2, (7, 9), 20),
]
"""Pictures, grid, and how many tokens to keep."""
WORTH = Given(name="scores")

every_size = pytest.mark.parametrize(("S", "grid", "k"), SIZES)
either_pick = pytest.mark.parametrize("pick", [None, 0, 1])


def merged(merger: Any, stack: VisualTokens, k: int, second: Any = Stride()) -> tuple[Selection, Merged]:  # noqa: B008
    """Half of the tokens by score, the others by `second`, then merged."""
    first = Pick(name="best", scorer=WORTH, selector=TopK(), share=0.5)
    pipeline = Pipeline(name="both", picks=(first, Pick(name="rest", scorer=WORTH, selector=second)), merger=merger)
    selection = pipeline.run(stack, k)
    found = pipeline.merge(stack, selection)
    assert found is not None
    return selection, found


def taken_by(selection: Selection, row: int, pick: int | None) -> list[int]:
    """Tokens of one pick, or of all."""
    both = zip(selection.keep[row].tolist(), selection.taken[row].tolist(), strict=True)
    return [i for i, stage in both if pick in (None, stage)]


def agree(found: Merged, expected: list[np.ndarray]) -> None:
    np.testing.assert_allclose(found.rows.double().numpy(), np.array(expected), atol=1e-5, rtol=0)


@either_pick
@every_size
def test_into_nearest_is_the_loop(S: int, grid: tuple[int, int], k: int, pick: int | None) -> None:
    features, keys, worth = drawn(S, grid, 6), drawn(S, grid, 5), scores(S, grid)
    stack = pictures(features, grid, scores=worth, keys=keys)
    selection, found = merged(IntoNearest(vectors="keys", pick=pick), stack, k)
    expected = [
        loops.into_nearest(x, own, taken_by(selection, row, None), taken_by(selection, row, pick))
        for row, (x, own) in enumerate(rows(features, keys))
    ]
    agree(found, expected)


@either_pick
@every_size
def test_into_cell_is_the_loop(S: int, grid: tuple[int, int], k: int, pick: int | None) -> None:
    """Whatever was picked: the first token of a cell that may takes over what was dropped of it."""
    features, worth = drawn(S, grid, 6), scores(S, grid)
    stack = pictures(features, grid, scores=worth)
    selection, found = merged(IntoCell(pick=pick, weights=WORTH), stack, k)
    count = k if pick is None else selection.counts[pick]
    owner = loops.cells(*grid, count) if count else [0] * (grid[0] * grid[1])
    expected = []
    for row, (x, own) in enumerate(rows(features, worth)):
        first = {owner[i]: i for i in reversed(taken_by(selection, row, pick))}
        expected.append(loops.into_cell(x, owner, taken_by(selection, row, None), list(first.values()), own))
    agree(found, expected)


@pytest.mark.parametrize("count", [32, 3, 1])
@every_size
def test_neighbour_sum_is_the_loop(S: int, grid: tuple[int, int], k: int, count: int) -> None:
    features, keys, worth = drawn(S, grid, 6), drawn(S, grid, 5), scores(S, grid)
    stack = pictures(features, grid, scores=worth, keys=keys)
    selection, found = merged(NeighbourSum(weights=WORTH, vectors="keys", count=count), stack, k)
    expected = [
        loops.neighbour_sum(x, own, taken_by(selection, row, None), given, count)
        for row, (x, own, given) in enumerate(rows(features, keys, worth))
    ]
    agree(found, expected)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 2), (1, 13), (13, 1), (7, 7), (9, 5), (24, 24)])
def test_cells_are_those_of_the_loop(grid: tuple[int, int]) -> None:
    N = grid[0] * grid[1]
    part = Part(start=0, stop=N, kind="image", grid=grid)
    for count in range(1, N + 1, 1 + N // 60):
        assert cells_of((part,), count).owner.tolist() == loops.cells(*grid, count)


def numbered(grid: tuple[int, int], worth: list[float], **evidence: Any) -> VisualTokens:
    """One picture with the features 10, 20, 30 and so on."""
    features = torch.arange(10.0, 10.0 * len(worth) + 1, 10.0)[None, :, None]
    return pictures(features, grid, scores=torch.tensor([worth]), **evidence)


def outcome(merger: Any, stack: VisualTokens, k: int, **second: Any) -> tuple[list[int], list[float], list[int]]:
    """What is kept, what it becomes, and where every token goes."""
    selection, found = merged(merger, stack, k, **second)
    return selection.keep[0].tolist(), found.rows[0, :, 0].tolist(), found.into[0].tolist()


def test_into_nearest_by_hand() -> None:
    """Six tokens, keys at 0, 80, 5, 40, 90, 100 degrees. The best two are 0 and 4, evenly spaced of the rest 2 and 5.

    Of all of them 0 is nearest to none, 2 (at 5) to the token at 40, 4 (at 90) to that at 80. Of the second pick 5 (at
    100) is nearest to that at 80: it becomes the mean of 20 and 60.
    """
    stack = numbered((2, 3), [0.9, 0.1, 0.1, 0.1, 0.8, 0.1], keys=at_angles(0, 80, 5, 40, 90, 100))
    kept, values, into = outcome(IntoNearest(vectors="keys"), stack, 4)
    assert (kept, into) == ([0, 2, 4, 5], [0, 2, 1, 1, 2, 3])
    assert values == pytest.approx([10, 35, 35, 60])
    kept, values, into = outcome(IntoNearest(vectors="keys", pick=1), stack, 4)
    assert (kept, into) == ([0, 2, 4, 5], [0, 3, 1, 1, 2, 3])
    assert values == pytest.approx([10, 35, 50, 40])


def test_into_cell_by_hand() -> None:
    """Two cells of 2 x 3: columns 0 and 1, and column 2. The best of all is 5 (.6), the best of the cells 3 and 2.

    A budget of two gives one cell to the second pick: 3 stands for 0 to 4, weighted 1 : 2 : 3 : 4 : 0, a mean of 30;
    the 4 has no worth and is lost.
    With four, 5 and 3 are best, 1 stands for 0, 1 and 4 (a mean of 50 / 3), and 2 for itself.
    """
    stack = numbered((2, 3), [0.1, 0.2, 0.3, 0.4, 0.0, 0.6])
    merger = IntoCell(pick=1, weights=WORTH)
    kept, values, into = outcome(merger, stack, 2, second=CellBest())
    assert (kept, into) == ([3, 5], [0, 0, 0, 0, -1, 1])
    assert values == pytest.approx([30, 60])
    kept, values, into = outcome(merger, stack, 4, second=CellBest())
    assert kept == [1, 2, 3, 5]
    assert values == pytest.approx([50 / 3, 30, 40, 60])
    assert into == [0, 0, 1, 2, -1, 3]


def test_a_cell_without_worth_by_hand() -> None:
    """A single kept token of 1 x 4 without any scores is the plain mean, 25; with them (10 + 3 x 40) / 4."""
    for worth, mean in (([0.0] * 4, 25.0), ([1.0, 0.0, 0.0, 3.0], 32.5)):
        _, values, _ = outcome(IntoCell(weights=WORTH), numbered((1, 4), worth), 1)
        assert values == pytest.approx([mean])


def test_neighbour_sum_by_hand() -> None:
    """Scores of 1, 1, 2, 4 at 0, 10, 80, 90 degrees are 1/8, 1/8, 1/4, 1/2. The best at 90 is next
    to 80. It becomes 40 + 30 / 4, with two neighbours also 20 / 8 more, with all also 10 / 8.
    """
    stack = numbered((1, 4), [1.0, 1.0, 2.0, 4.0], keys=at_angles(0, 10, 80, 90))
    for count, total in ((1, 47.5), (2, 50.0), (3, 51.25), (32, 51.25)):
        kept, values, _ = outcome(NeighbourSum(weights=WORTH, vectors="keys", count=count), stack, 1)
        assert kept == [3]
        assert values == pytest.approx([total])
    _, values, _ = outcome(NeighbourSum(weights=WORTH, vectors="keys", count=1), stack, 2)
    assert values == pytest.approx([20 + 10 / 8, 47.5]), "1 and 3 are kept, the nearest of 1 is 0"


class Joining:
    """A merger that says what it is told to; tokens are counted by `weights`."""

    def __init__(self, into: list[int], weights: list[float]) -> None:
        self.groups = Groups(into=torch.tensor([into]), weights=torch.tensor([weights]))

    def __call__(self, tokens: VisualTokens, selection: Selection) -> Groups:
        return self.groups


def test_what_is_no_number_counts_as_nothing_half_the_way_too() -> None:
    stack = pictures(torch.tensor([[[float("nan")], [4.0], [2.0], [1.0]]]), (1, 4))
    selection = Selection(keep=torch.tensor([[0, 2]]), taken=torch.zeros(1, 2, dtype=torch.long), counts=(2,))
    joining = Joining([0, 0, 1, -1], [1.0, 1.0, 1.0, 1.0])
    halfway = replace(joining.groups, stays=0.5)
    assert picking.mixed(halfway, stack.features, selection).rows[0, :, 0].tolist() == [1.0, 2.0]


def test_groups_that_do_not_exist_are_refused() -> None:
    stack = pictures(torch.tensor([[[8.0], [4.0], [2.0], [1.0]]]), (1, 4))
    selection = Selection(keep=torch.tensor([[1, 2]]), taken=torch.zeros(1, 2, dtype=torch.long), counts=(2,))
    with pytest.raises(UnsupportedCall, match="2 kept tokens"):
        picking.merged(Joining([0, 2, 1, -1], [1.0] * 4), stack, selection)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1.0, 3.0, 5.0, 7.0], [0.25 * 8 + 0.75 * 4, 2.0]), ([-1.0, 0.0, 0.0, 7.0], [(8 + 4) / 2, 2.0])],
)
def test_groups_by_hand(weights: list[float], expected: list[float]) -> None:
    """Of 0 to 3 the tokens 1 and 2 are kept; 0 joins the first, 3 none. A kept token is never told to join another."""
    stack = pictures(torch.tensor([[[8.0], [4.0], [2.0], [1.0]]]), (1, 4))
    selection = Selection(keep=torch.tensor([[1, 2]]), taken=torch.zeros(1, 2, dtype=torch.long), counts=(2,))
    found = picking.merged(Joining([0, 1, 1, -1], weights), stack, selection)
    assert found.rows[0, :, 0].tolist() == expected
    assert found.into.tolist() == [[0, 0, 1, -1]]


def test_cells_by_hand() -> None:
    """Two cells are two columns and one of 2 x 3, one row and two of 3 x 2; the upper left of several stands first.

    Five of 3 x 3: the roots say two bands, of one row and two; they hold two and three cells.
    """
    cases = {
        ((2, 3), 2): ([0, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 1], [0, 2]),
        ((3, 2), 2): ([0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 2], [0, 2]),
        ((3, 3), 5): ([0, 0, 1, 2, 3, 4, 2, 3, 4], [0, 1, 0, 0, 0, 0, 1, 1, 1], [0, 2, 3, 4, 5]),
    }
    for (grid, count), (owner, off_centre, centres) in cases.items():
        part = Part(start=0, stop=grid[0] * grid[1], kind="image", grid=grid)
        found = cells_of((part,), count)
        assert (found.owner.tolist(), found.off_centre.tolist()) == (owner, off_centre)
        pick = Pick(name="cells", scorer=Constant(), selector=CellCentres())
        stack = pictures(torch.ones(1, part.stop, 1), grid)
        assert Pipeline(name="one", picks=(pick,)).run(stack, count).keep.tolist() == [centres]


def test_parts_share_cells_by_hand() -> None:
    """A thumbnail of two tokens and a crop of four. Of three cells it gets one, of one cell none and joins the next.

    Of 4, 1 and 4 tokens and three cells the part between has none, and joins the one before it.
    """
    parts = (Part(start=0, stop=2, kind="thumbnail", grid=(1, 2)), Part(start=2, stop=6, kind="crop", grid=(2, 2)))
    assert cells_of(parts, 3).owner.tolist() == [0, 0, 1, 2, 1, 2]
    assert cells_of(parts, 1).owner.tolist() == [0] * 6
    assert cells_of(parts[::-1], 1).owner.tolist() == [0] * 6
    between = [Part(start=0, stop=h * h, kind="crop", grid=(h, h)) for h in (2, 1, 2)]
    assert cells_of(between, 3).owner.tolist() == [0, 0, 0, 0, 0, 1, 2, 1, 2]
