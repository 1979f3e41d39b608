"""Strips of frames and contact sheets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.viz.common import grey, report, segment
from vtprune.errors import InvalidOption
from vtprune.viz import Box, sheet, strip
from vtprune.viz.lettering import fitted
from vtprune.viz.lettering import font as _font
from vtprune.viz.sheets import _FILL, _TRACK

CLIP = report(segment(*[("frame", (2, 2))] * 3, keep=[0, 4, 5, 6, 7]))


def count(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Pixels of that colour in every column."""
    return (np.asarray(picture) == colour).all(axis=2).sum(axis=0)


def test_bars_are_as_long_as_what_stays() -> None:
    """1, 4 and 0 of 4 tokens of three frames, each 100 pixels wide."""
    drawn = strip(CLIP, [grey(200, 200)] * 3, height=100)
    width = (drawn.width + 8) // 3 - 8
    assert width == 100
    for number, kept in enumerate((1, 4, 0)):
        cell = drawn.crop((number * 108, 0, number * 108 + 100, drawn.height))
        assert (count(cell, _FILL) > 0).sum() == 25 * kept
        assert (count(cell, _TRACK) > 0).sum() == 100 - 25 * kept


def test_frames_are_scaled_and_their_numbers_are_written_below() -> None:
    drawn = strip(CLIP, [grey(200, 100)] * 6, height=50)
    first = np.asarray(drawn)[:50, :100]
    assert (first[:25, :50] == 200).all() and (first[25:] == 92).all() and (first[:25, 50:] == 92).all()
    texts = [np.asarray(drawn.crop((108 * i, 61, 108 * i + 100, drawn.height))) for i in range(3)]
    assert all((text < 128).any() for text in texts)
    assert (texts[0] != texts[1]).any()


def test_rows_are_wrapped_after_eight_and_numbers_fit_under_narrow_frames() -> None:
    clip = report(segment(*[("frame", (1, 1))] * 9, keep=[0]))
    drawn = strip(clip, [grey(10, 40)] * 9, height=40)
    cell = (drawn.width + 8) // 8 - 8
    assert cell >= _font(14).getlength("1/1")
    one = strip(report(segment(("frame", (1, 1)), keep=[0])), [grey(10, 40)], height=40)
    assert drawn.height == 2 * one.height + 8


def test_a_framing_is_scaled_with_the_frames() -> None:
    drawn = np.asarray(strip(CLIP, [grey(200, 100)] * 3, height=50, framing=Box(50, 0, 150, 100)))
    assert (drawn[:25, 25:50] == 200).all() and (drawn[:25, 50:75] == 92).all()
    assert drawn[:50, :25].max() < 130 and drawn[:50, 75:100].max() < 130


def test_frames_that_are_pictures_of_their_own() -> None:
    pictures = [segment(("tile", (2, 2)), keep=keep) for keep in ([0], [], [1, 2], [0])]
    drawn = strip(report(*pictures), [grey(100, 100)] * 2, 1, height=100)
    bars = [(count(drawn.crop((108 * i, 0, 108 * i + 100, drawn.height)), _FILL) > 0).sum() for i in range(2)]
    assert bars == [0, 50]
    with pytest.raises(InvalidOption, match="segment=3 is a picture"):
        strip(report(*pictures), [grey(100, 100)] * 2, 3)
    crops = segment(("thumbnail", (2, 2)), ("crop", (2, 2)), keep=[0])
    with pytest.raises(InvalidOption, match="pictures of one part"):
        strip(report(crops), [grey(100, 100)])


@pytest.mark.parametrize(
    ("options", "says"),
    [({"height": 8}, "from 16 on"), ({"height": 50.0}, "whole number"), ({"dim": -1}, "a share in")],
)
def test_strips_check_their_options(options, says) -> None:
    with pytest.raises(InvalidOption, match=says):
        strip(CLIP, [grey(10, 10)] * 3, **options)
    with pytest.raises(InvalidOption, match="encoded as 3 frames"):
        strip(CLIP, [grey(10, 10)] * 4)


def test_cells_of_a_sheet_are_equal_and_panels_are_whole() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    panels = [Image.new("RGB", size, colour) for size, colour in zip([(200, 60), (40, 90), (180, 30)], colours)]
    made = sheet([(f"panel {i}", panel) for i, panel in enumerate(panels)], columns=2)
    drawn = np.asarray(made)
    places = []
    for panel, colour in zip(panels, colours):
        y, x = np.nonzero((drawn == colour).all(axis=2))
        assert len(y) == panel.width * panel.height
        places.append(((x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2))
    assert places[0][1] == places[1][1] < places[2][1] and places[0][0] == places[2][0] < places[1][0]
    assert places[1][0] - places[0][0] == 214


def test_captions_and_titles_are_written_and_cut() -> None:
    plain = sheet([("", grey(200, 50))])
    captioned = sheet([("kept", grey(200, 50))])
    assert captioned.height > plain.height
    assert sheet([("kept\nin 3 s", grey(200, 50))]).height > captioned.height
    assert sheet([("kept", grey(200, 50))], title="All").height > captioned.height
    long = np.asarray(sheet([("word " * 100, grey(200, 50)), ("word " * 100, grey(200, 50))], columns=2))
    gap = long[:, 14 + 200 : 14 + 200 + 14]
    assert (gap == 255).all() and (long[:, :14] == 255).all()


def test_letters_grow_with_the_panels_and_long_titles_are_broken() -> None:
    small, large = (sheet([("kept", grey(side, 50))]).height for side in (500, 1000))
    assert small == 14 + 50 + 4 + 19 + 14 and large == 14 + 50 + 4 + 33 + 14
    one, two = (sheet([("kept", grey(300, 50))], title=title).height for title in ("All", "All\nof them"))
    assert two == one + 19
    assert sheet([("kept", grey(300, 50))], title="a long question " * 5).height > one + 19


def test_what_is_too_wide_ends_in_dots() -> None:
    text = "a quarter of the tokens, all the same"
    assert fitted(text, 1000, 14) == text
    cut = fitted(text, 120, 14)
    assert cut.endswith("...") and text.startswith(cut[:-3]) and _font(14).getlength(cut) <= 120
    assert len(cut) > 10 and fitted(text, 1, 14) == "..."


@pytest.mark.parametrize(("count", "size", "columns"), [(1, (100, 100), 1), (6, (200, 150), 3), (4, (900, 100), 1)])
def test_sheets_are_landscape_where_they_can_be(count, size, columns) -> None:
    made = sheet([("", grey(*size))] * count)
    assert made.width == columns * (max(150, size[0]) + 14) + 14


def test_sheets_without_panels_and_columns_out_of_range() -> None:
    with pytest.raises(InvalidOption, match="one or more"):
        sheet([])
    with pytest.raises(InvalidOption, match="PIL image"):
        sheet([("kept", None)])
    for columns in (0, 1.5, True):
        with pytest.raises(InvalidOption, match="columns="):
            sheet([("kept", grey(4, 4))], columns=columns)
