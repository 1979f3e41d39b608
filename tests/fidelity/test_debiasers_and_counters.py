"""Every debiaser and every counter against its loop, and two cases each worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity import loops_stages as loops
from tests.fidelity.test_methods import at_angles
from tests.fidelity.test_published_methods import drawn, pictures, rows, scores
from vtprune.errors import InvalidOption, MissingEvidence
from vtprune.stages.counters import Above, Mass, Outliers
from vtprune.stages.debiasers import MinMax, WithoutHighNorms, WithoutPadding, WithoutSinks, WithoutTrend
from vtprune.stages.scorers import Given
from vtprune.types import Part, VisualTokens

SIZES = [(1, (1, 1)), (2, (2, 3)), (3, (5, 3)), (2, (1, 13)), (2, (6, 1)), (2, (7, 9))]
"""Pictures and their grid."""
GIVEN = Given(name="scores")

every_size = pytest.mark.parametrize(("S", "grid"), SIZES)


def agree(debiaser: Any, stack: VisualTokens, worth: torch.Tensor, expected: list[np.ndarray]) -> None:
    np.testing.assert_allclose(debiaser(stack, worth).double().numpy(), np.array(expected), atol=1e-5, rtol=0)


@every_size
def test_min_max_is_the_loop(S: int, grid: tuple[int, int]) -> None:
    worth = drawn(S, grid, 1)[..., 0]
    spans = [(min(own), max(own) - min(own)) for (own,) in rows(worth)]
    expected = [(own - low) / (span or 1) for (own,), (low, span) in zip(rows(worth), spans, strict=True)]
    agree(MinMax(), pictures(drawn(S, grid, 2), grid), worth, expected)


@pytest.mark.parametrize("limit", [1.0, 3.0, 12.0])
@every_size
def test_without_sinks_is_the_loop(S: int, grid: tuple[int, int], limit: float) -> None:
    worth = scores(S, grid) ** 2
    expected = [np.where(loops.far_above(own, limit), loops.middle(own), own) for (own,) in rows(worth)]
    agree(WithoutSinks(limit=limit), pictures(drawn(S, grid, 2), grid), worth, expected)


@pytest.mark.parametrize("limit", [1.0, 6.0])
@every_size
def test_without_high_norms_is_the_loop(S: int, grid: tuple[int, int], limit: float) -> None:
    features, worth = drawn(S, grid, 3) * scores(S, grid, 1)[..., None], scores(S, grid)
    stack = pictures(torch.zeros_like(features), grid, encoder_features=features)
    expected = [
        np.where(loops.far_above(np.array([np.linalg.norm(token) for token in x]), limit), loops.middle(own), own)
        for x, own in rows(features, worth)
    ]
    agree(WithoutHighNorms(limit=limit, vectors="encoder_features"), stack, worth, expected)


@every_size
def test_without_trend_is_the_loop(S: int, grid: tuple[int, int]) -> None:
    worth = drawn(S, grid, 1)[..., 0]
    expected = [loops.without_trend(own, *grid) for (own,) in rows(worth)]
    agree(WithoutTrend(), pictures(drawn(S, grid, 2), grid), worth, expected)


@pytest.mark.parametrize("bars", [(0, 0, 0, 0), (1, 1, 0, 0), (0, 0, 2, 1), (0, 2, 0, 0), (0, 0, 0, 1), (3, 3, 4, 4)])
@every_size
def test_without_padding_is_the_loop(S: int, grid: tuple[int, int], bars: tuple[int, int, int, int]) -> None:
    """Pictures with bars of one colour above, below, on the left and on the right, some of nothing else."""
    (h, w), (above, below, left, right) = grid, bars
    features, worth = drawn(S, grid, 6), scores(S, grid)
    grids = features.unflatten(1, grid)
    colour = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    grids[:, :above], grids[:, h - min(below, h) :] = colour, colour
    grids[:, :, :left], grids[:, :, w - min(right, w) :] = 2 * colour, 2 * colour
    expected = [
        np.array([own.min() - 1 if i in loops.padding_bars(x, h, w, 0.999) else a for i, a in enumerate(own)])
        for x, own in rows(features, worth)
    ]
    agree(WithoutPadding(), pictures(features, grid), worth, expected)


COUNTERS = [
    (Outliers(scorer=GIVEN), loops.outliers),
    (Outliers(scorer=GIVEN, factor=2.5), lambda own: int(2.5 * loops.outliers(own) + 0.5)),
    *((Mass(scorer=GIVEN, share=share), lambda own, share=share: loops.mass(own, share)) for share in (0.1, 0.5, 0.9)),
    *(
        (Above(scorer=GIVEN, share=share), lambda own, share=share: sum(a > share * max(own) for a in own))
        for share in (0.1, 0.5, 0.9)
    ),
]


@pytest.mark.parametrize(("counter", "loop"), COUNTERS, ids=[str(counter) for counter, _ in COUNTERS])
@every_size
def test_the_counter_is_the_loop(counter: Any, loop: Any, S: int, grid: tuple[int, int]) -> None:
    worth = scores(S, grid, seed=7) ** 2
    assert counter(pictures(drawn(S, grid, 2), grid, scores=worth), 1).tolist() == [loop(own) for (own,) in rows(worth)]


def by_hand(
    debiaser: Any, worth: list[float], grid: tuple[int, int] | None = None, features: Any = None
) -> list[float]:
    """What becomes of the scores of one picture."""
    features = torch.ones(1, len(worth), 2) if features is None else features
    return debiaser(pictures(features, grid or (1, len(worth))), torch.tensor([worth]))[0].tolist()


def test_min_max_by_hand() -> None:
    assert by_hand(MinMax(), [2.0, 6.0, 3.0]) == [0.0, 1.0, 0.25]
    assert by_hand(MinMax(), [0.7, 0.7, 0.7]) == [0.0, 0.0, 0.0]


def test_without_sinks_by_hand() -> None:
    """Of 1, 2, 3, 4, 100 the median is 3, of the deviations 1: above 15 a score is a sink. Of equal ones none is."""
    assert by_hand(WithoutSinks(), [1.0, 2.0, 3.0, 4.0, 100.0]) == [1.0, 2.0, 3.0, 4.0, 3.0]
    assert by_hand(WithoutSinks(), [1.0, 2.0, 3.0, 4.0, 15.0]) == [1.0, 2.0, 3.0, 4.0, 15.0]
    assert by_hand(WithoutSinks(), [1.0, 1.0, 9.0, 1.0]) == [1.0, 1.0, 9.0, 1.0]


def test_without_high_norms_by_hand() -> None:
    """Norms 1, 2, 3, 4 and 10 are high above 3 + 6 x 1: the score .9 of the last becomes the median, .3."""
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, -4.0], [6.0, 8.0]]])
    assert by_hand(WithoutHighNorms(), [0.1, 0.2, 0.3, 0.4, 0.9], features=features) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.3]
    )
    features[0, 4] = torch.tensor([9.0, 0.0])
    assert by_hand(WithoutHighNorms(), [0.1, 0.2, 0.3, 0.4, 0.9], features=features)[4] == pytest.approx(0.9)
    with pytest.raises(MissingEvidence, match="keys"):
        by_hand(WithoutHighNorms(vectors="keys"), [0.1, 0.2])


def test_without_trend_by_hand() -> None:
    """Rows 1, 2 and 3, 6 have means of 1.5 and 4.5, columns 2 and 4, all 3: 1 - 1.5 - 2 + 6 = 3.5. A sum of a row and a
    column is flat; a single row stays as it is, and so does one that is a part by itself.
    """
    assert by_hand(WithoutTrend(), [1.0, 2.0, 3.0, 6.0], (2, 2)) == [3.5, 2.5, 2.5, 3.5]
    assert by_hand(WithoutTrend(), [0.0, 1.0, 5.0, 6.0], (2, 2)) == [3.0] * 4
    assert by_hand(WithoutTrend(), [1.0, 2.0, 6.0]) == [1.0, 2.0, 6.0]
    parts = (Part(start=0, stop=2, kind="thumbnail", grid=(1, 2)), Part(start=2, stop=6, kind="crop", grid=(2, 2)))
    plain = pictures(torch.ones(1, 6, 2), (1, 6))
    stack = VisualTokens(features=plain.features, parts=parts, ordinals=plain.ordinals)
    worth = torch.tensor([[9.0, 7.0, 1.0, 2.0, 3.0, 6.0]])
    assert WithoutTrend()(stack, worth).tolist() == [[9.0, 7.0, 3.5, 2.5, 2.5, 3.5]]


def test_without_padding_by_hand() -> None:
    """3 x 2 at 0 degrees in the first row, at 5 and 90 in others: the first row is a bar and scores 1 below the lowest.

    2 x 3 with a last column at 50: it is a bar. A picture of a single colour has none, nor has a single row of tokens.
    """
    features = at_angles(0, 0, 5, 90, 60, 5)
    assert by_hand(WithoutPadding(), [5.0, 6.0, 2.0, 3.0, 4.0, 9.0], (3, 2), features) == [1.0, 1.0, 2.0, 3.0, 4.0, 9.0]
    features = at_angles(0, 10, 50, 20, 30, 50)
    assert by_hand(WithoutPadding(), [5.0, 6.0, 2.0, 3.0, 4.0, 9.0], (2, 3), features) == [5.0, 6.0, 1.0, 3.0, 4.0, 1.0]
    assert by_hand(WithoutPadding(), [5.0, 6.0, 2.0, 3.0], (1, 4), at_angles(0, 50, 0, 0)) == [5.0, 6.0, 2.0, 3.0]
    assert by_hand(WithoutPadding(), [5.0, 6.0, 2.0, 3.0], (2, 2), at_angles(7, 7, 7, 7)) == [5.0, 6.0, 2.0, 3.0]
    loose = by_hand(WithoutPadding(alike=0.99), [5.0, 6.0, 2.0, 3.0], (2, 2), at_angles(0, 5, 60, 90))
    assert loose == [1.0, 1.0, 2.0, 3.0], "a cosine of .996"


def counted(counter: Any, worth: list[float]) -> int:
    (count,) = counter(
        pictures(torch.ones(1, len(worth), 2), (1, len(worth)), scores=torch.tensor([worth])), 1
    ).tolist()
    return count


def test_outliers_by_hand() -> None:
    """Of 1 to 5 the quartiles are 2 and 4: outliers lie above 7. With 5 turned to 7 none does, to 8 one does.

    Half of five is 2.5, which rounds to 3.
    """
    assert counted(Outliers(scorer=GIVEN), [1.0, 2.0, 3.0, 4.0, 7.0]) == 0
    assert counted(Outliers(scorer=GIVEN), [1.0, 8.0, 2.0, 3.0, 4.0]) == 1
    assert counted(Outliers(scorer=GIVEN, factor=4.0), [1.0, 8.0, 2.0, 3.0, 4.0]) == 4
    assert counted(Outliers(scorer=GIVEN, factor=0.5), [1.0] * 20 + [9.0] * 5) == 3
    assert counted(Outliers(scorer=GIVEN), [1.0] * 6) == 0


def test_mass_by_hand() -> None:
    """.5, .25, .25: one holds half, two hold three quarters, more takes all three. Scores below 0 hold nothing."""
    for share, count in ((0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 3)):
        assert counted(Mass(scorer=GIVEN, share=share), [0.25, 0.5, -9.0, 0.25]) == count
    assert counted(Mass(scorer=GIVEN), [0.0, 0.0]) == 0


def test_above_by_hand() -> None:
    """Of 4, 3, 2, 1 three reach half of the highest, two reach three quarters, one all of it."""
    for share, count in ((0.5, 3), (0.75, 2), (1.0, 1)):
        assert counted(Above(scorer=GIVEN, share=share), [1.0, 4.0, 2.0, 3.0]) == count


@pytest.mark.parametrize("wrong", [0, -1, True, "8"])
def test_limits_and_shares_are_checked(wrong: Any) -> None:
    for kind in (WithoutSinks, WithoutHighNorms):
        with pytest.raises(InvalidOption, match="limit"):
            kind(limit=wrong)
    for kind in (Mass, Above):
        with pytest.raises(InvalidOption, match="share"):
            kind(scorer=GIVEN, share=wrong)
