"""Groups, what the encoder did not see, heat and the legend, pixel by pixel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.viz.common import grey, report, segment
from vtprune.errors import InvalidOption
from vtprune.viz import Box, heatmap, legend, overlay
from vtprune.viz.drawing import _HEAT, OF_PICKS, _colour_of

DARK = 92


def pixels(picture) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_what_was_not_seen_is_darker_than_what_was_dropped_and_hatched() -> None:
    drawn = pixels(
        overlay(report(segment(("image", (1, 2)), keep=[0])), grey(40, 20), upscale=1, framing=Box(10, 0, 30, 20))
    )
    assert (drawn[:, 10:20] == 200).all() and (drawn[:, 20:30] == DARK).all()
    unseen = np.concatenate([drawn[:, :10], drawn[:, 30:]], axis=1)
    levels = np.unique(unseen)
    assert len(levels) == 2 and levels[0] < DARK // 2 and (levels != DARK).all()
    assert 0.1 < (unseen == levels[1]).mean() < 0.5


def test_a_framing_of_the_whole_picture_changes_nothing() -> None:
    made = report(segment(("image", (3, 5)), keep=[0, 4, 7]))
    whole = overlay(made, grey(41, 23), framing=Box(0, 0, 41, 23), stages=True)
    assert (pixels(whole) == pixels(overlay(made, grey(41, 23), stages=True))).all()


def test_padding_is_not_drawn() -> None:
    made = report(segment(("image", (4, 4)), keep=[0, 1, 2, 3, 4]))
    drawn = pixels(overlay(made, grey(16, 8), upscale=1, framing=Box(0, -4, 16, 12)))
    assert drawn.shape == (8, 16, 3)
    assert (drawn[:4, :4] == 200).all() and (drawn[4:] == DARK).all() and (drawn[:4, 4:] == DARK).all()


def test_each_group_has_an_outline_of_its_own_colour_and_no_line_inside() -> None:
    """Tokens 0, 1, 4 went into 0; 2 stands alone; 7 went into 3; 5 and 6 are lost."""
    made = report(segment(("image", (2, 4)), keep=[0, 2, 3], into=[0, 0, 2, 3, 0, -1, -1, 3]))
    picture = grey(32, 16)
    plain, drawn = (pixels(overlay(made, picture, upscale=1, groups=on)) for on in (False, True))
    first, second = (np.array(_colour_of(number)) for number in (0, 1))
    assert (first != second).any()
    for edge in (np.s_[0, :16], np.s_[:, 0], np.s_[:8, 15], np.s_[15, :8], np.s_[8:, 7], np.s_[7, 8:16]):
        assert (drawn[edge] == first).all()
    for edge in (np.s_[0, 24:], np.s_[15, 24:], np.s_[:, 24], np.s_[:, 31]):
        assert (drawn[edge] == second).all()
    inside = drawn[1:7, 6:10], drawn[6:10, 1:7], drawn[6:10, 25:31]
    assert not any((part == colour).all(axis=2).any() for part in inside for colour in (first, second))
    assert (drawn[:, 16:24] == plain[:, 16:24]).all() and (drawn[8:, 8:24] == plain[8:, 8:24]).all()
    assert (drawn[1:7, 1:7] == 200).all() and (drawn[9:15, 1:7] != DARK).any()


def test_parts_of_a_group_that_lie_apart_share_its_colour() -> None:
    made = report(segment(("image", (1, 5)), keep=[0, 2], into=[0, -1, 2, -1, 0]))
    drawn = pixels(overlay(made, grey(50, 10), upscale=1, groups=True))
    assert (drawn[:, 0] == drawn[:, 40]).all() and (drawn[:, 0] == _colour_of(0)).all()
    assert (drawn[:, 20:30] == 200).all()


def test_tokens_that_went_into_those_of_another_picture_are_a_group() -> None:
    """Where pictures share a budget, `into` counts through all of them."""
    made = report(segment(("image", (1, 3)), keep=[0], into=[3, 8, -1]))
    drawn = pixels(overlay(made, grey(30, 10), upscale=1, groups=True))
    assert (drawn[:, 10] == _colour_of(0)).all() and (drawn[:, :10] == 200).all() and (drawn[:, 20:] == DARK).all()


@pytest.mark.parametrize("into", [None, [0, -1, -1, 3]])
def test_without_groups_nothing_is_outlined(into) -> None:
    made = report(segment(("image", (2, 2)), keep=[0, 3], into=into))
    assert (pixels(overlay(made, grey(8, 8), groups=True)) == pixels(overlay(made, grey(8, 8)))).all()


def test_hues_of_groups_differ() -> None:
    colours = [_colour_of(number) for number in range(60)]
    assert len(set(colours)) == 60
    assert all(sum(abs(a - b) for a, b in zip(one, two)) > 100 for one, two in itertools.pairwise(colours))


def test_heat_goes_from_the_first_colour_to_the_last_and_gets_lighter() -> None:
    weights = np.array([0.2126, 0.7152, 0.0722])
    steps = np.diff(_HEAT @ weights)
    assert (steps > 0).all() and steps.max() < 2 * steps.min()
    made = report(segment(("image", (1, 4)), keep=[]))
    drawn = pixels(heatmap(torch.tensor([-3.0, 0.0, 1.0, 5.0]), made, grey(8, 2), upscale=1))
    assert (np.diff((drawn @ weights)[0, ::2]) > 0).all()
    assert np.abs(drawn[0, 0] - (0.7 * _HEAT[0] + 60)).max() <= 1
    assert np.abs(drawn[0, 7] - (0.7 * _HEAT[-1] + 60)).max() <= 1


def test_heat_of_scores_that_are_not_finite_or_all_equal() -> None:
    made = report(segment(("image", (1, 5)), keep=[]))
    picture = grey(5, 1)
    odd = torch.tensor([float("nan"), float("-inf"), 1.0, 2.0, float("inf")])
    drawn = pixels(heatmap(odd, made, picture, upscale=1))[0]
    assert (drawn[0] == 200).all() and (drawn[1] == drawn[2]).all() and (drawn[3] == drawn[4]).all()
    assert (drawn[2] != drawn[3]).any()
    same = pixels(heatmap(torch.full((5,), 7, dtype=torch.int32), made, picture, upscale=1))[0]
    middle = pixels(heatmap(torch.arange(5).bfloat16(), made, picture, upscale=1))[0, 2]
    assert (same == middle).all()
    assert (pixels(heatmap(torch.full((5,), float("nan")), made, picture, upscale=1)) == 200).all()
    edges = pixels(heatmap(torch.tensor([-1e308, 0, 0, 0, 1e308], dtype=torch.float64), made, picture, upscale=1))
    assert (edges[0, 1] == middle).all() and (edges[0, 0] == drawn[1]).all() and (edges[0, 4] == drawn[4]).all()


def test_heat_has_the_panels_and_the_framing_of_the_overlay() -> None:
    tiles = report(segment(("tile", (1, 1)), ("tile", (1, 1)), ("thumbnail", (1, 1)), keep=[]))
    drawn = pixels(heatmap(torch.tensor([0.0, 1.0, 0.0]), tiles, grey(4, 2), upscale=1))
    assert (
        drawn.shape == (2, 12, 3) and (drawn[:, :2] == drawn[:, 8:10]).all() and (drawn[:, 2:4] != drawn[:, :2]).any()
    )
    part = report(segment(("image", (1, 1)), keep=[]))
    framed = pixels(heatmap(torch.ones(1), part, grey(20, 20), upscale=1, framing=Box(0, 0, 10, 20)))
    assert (framed[:, :10] == framed[0, 0]).all() and framed[:, 10:].max() < 120


@pytest.mark.parametrize("scores", [torch.ones(3), torch.ones(2, 2), [1.0] * 4, torch.ones(4, dtype=torch.complex64)])
def test_scores_of_another_shape(scores) -> None:
    with pytest.raises(InvalidOption, match=r"expected a tensor \(4,\)"):
        heatmap(scores, report(segment(("image", (2, 2)), keep=[])), grey(4, 4))


def test_the_legend_names_picks_and_what_was_protected() -> None:
    plain = segment(("image", (1, 3)), keep=[0, 1], taken=[0, 1])
    guarded = segment(("image", (1, 3)), keep=[0, 1], taken=[-1, 4])
    picks = ("a", "b", "c", "d", "e")
    assert legend(report(plain, picks=picks[:2])) == [("a", OF_PICKS[0]), ("b", OF_PICKS[1])]
    told = legend(report(plain, guarded, picks=picks))
    assert told == [("a", OF_PICKS[0]), ("b", OF_PICKS[1]), ("e", OF_PICKS[0]), ("protected", (255, 255, 255))]
    drawn = pixels(overlay(report(guarded, picks=picks), grey(30, 10), upscale=1, stages=True))
    assert tuple(drawn[0, 0]) == told[3][1] and tuple(drawn[0, 10]) == told[2][1]
    with pytest.raises(InvalidOption, match="run the wrapped model first"):
        legend(None)
