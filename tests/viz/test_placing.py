"""Boxes of tokens and clicks, and that the overlay draws what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.viz.common import grey, report, segment
from vtprune.errors import InvalidOption
from vtprune.viz import Box, cells_of, overlay, token_at

TILES = segment(("tile", (2, 2)), ("tile", (2, 2)), ("thumbnail", (1, 1)), keep=[])


def test_cells_of_one_grid_in_token_order() -> None:
    plain = segment(("image", (2, 3)), keep=[])
    assert cells_of(plain, (6, 4))[:4] == [Box(0, 0, 2, 2), Box(2, 0, 4, 2), Box(4, 0, 6, 2), Box(0, 2, 2, 4)]
    around = cells_of(plain, (6, 4), Box(0, -1, 6, 5))
    assert around[0] == Box(0, -1, 2, 2) and around[5] == Box(4, 2, 6, 5)


def test_tiles_lie_in_their_places_and_other_parts_on_the_whole_picture() -> None:
    wide = cells_of(TILES, (8, 4))
    assert wide[:3] == [Box(0, 0, 2, 2), Box(2, 0, 4, 2), Box(0, 2, 2, 4)]
    assert wide[4] == Box(4, 0, 6, 2) and wide[7] == Box(6, 2, 8, 4) and wide[8] == Box(0, 0, 8, 4)
    tall = cells_of(TILES, (4, 8))
    assert tall[1] == Box(2, 0, 4, 2) and tall[4] == Box(0, 4, 2, 6)


def test_frames_lie_on_their_own_pictures() -> None:
    clip = segment(("frame", (1, 2)), ("frame", (1, 2)), keep=[])
    assert cells_of(clip, (4, 2)) == [Box(0, 0, 2, 2), Box(2, 0, 4, 2)] * 2
    assert token_at(clip, (4, 2), 3, 1, part=1) == 3


def test_a_click_means_the_token_below_it() -> None:
    plain = segment(("image", (2, 3)), keep=[])
    assert [token_at(plain, (6, 4), x, 3) for x in range(6)] == [3, 3, 4, 4, 5, 5]
    assert [token_at(plain, (6, 4), *at) for at in ((-0.1, 0), (6, 0), (0, 4), (0, -0.1))] == [None] * 4
    middle = Box(2, 0, 4, 4)
    assert [token_at(plain, (6, 4), x, 0, framing=middle) for x in range(6)] == [None, None, 0, 1, None, None]
    assert token_at(TILES, (8, 4), 4.5, 0.5) == 4 and token_at(TILES, (8, 4), 4.5, 0.5, part=1) == 8


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    box=st.none() | st.tuples(*[st.floats(-40, 20)] * 2, *[st.floats(21, 90)] * 2),
    data=st.data(),
)
def test_clicks_cells_and_overlays_agree(size, grid, box, data) -> None:
    """The middle of a cell is its token, and what the overlay leaves bright are the pixels that mean kept tokens."""
    framing = None if box is None else Box(*box)
    tokens = grid[0] * grid[1]
    keep = sorted(data.draw(st.sets(st.integers(0, tokens - 1))))
    made = segment(("image", grid), keep=keep)
    for token, cell in enumerate(cells_of(made, size, framing)):
        middle = (cell.left + cell.right) / 2, (cell.top + cell.bottom) / 2
        assert token_at(made, size, *middle, framing=framing) == token
    drawn = np.asarray(overlay(report(made), grey(*size), upscale=1, framing=framing))[..., 0]
    meant = [[token_at(made, size, x, y, framing=framing) in keep for x in range(size[0])] for y in range(size[1])]
    assert ((drawn == 200) == np.array(meant)).all()


@pytest.mark.parametrize("part", [-1, 2, True, "0"])
def test_panels_that_are_not_there(part) -> None:
    with pytest.raises(InvalidOption, match="expected a panel from 0 to 1"):
        token_at(TILES, (8, 4), 0, 0, part=part)


@pytest.mark.parametrize("box", [(0, 0, 0, 4), (0, 4, 4, 0), (0, 0, float("nan"), 4), (0, 0, float("inf"), 4)])
def test_framings_without_an_inside(box) -> None:
    with pytest.raises(InvalidOption, match="expected left < right"):
        cells_of(TILES, (8, 4), Box(*box))
    with pytest.raises(InvalidOption, match="expected left < right"):
        overlay(report(TILES), grey(8, 4), framing=Box(*box))


def test_sizes_without_an_inside() -> None:
    with pytest.raises(InvalidOption, match="width and height in pixels"):
        cells_of(segment(("image", (2, 2)), keep=[]), (4, 0))
