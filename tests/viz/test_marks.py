"""Marks of forced tokens, cuts in colours, labels and bars, pixel by pixel."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.viz.common import grey, report, segment
from vtprune.errors import InvalidOption
from vtprune.viz import heatmap, legend, marked, overlay, strip, with_bar
from vtprune.viz.drawing import OF_CUTS, OF_PICKS
from vtprune.viz.lettering import broken, font, legible, line

GROUNDS = [(0, 0, 0), (255, 255, 255), (230, 140, 20), (255, 70, 70), (60, 220, 90)]
WHOLE = segment(("image", (2, 3)), keep=[0, 1, 2, 3, 4, 5])


def light(picture: Image.Image) -> np.ndarray:
    """How light pixels are, without colours."""
    return np.asarray(picture.convert("L")).astype(int)


def cells(pixels: np.ndarray) -> list[np.ndarray]:
    """Those of a picture of 2 x 3 tokens of 20 pixels."""
    return [pixels[row : row + 20, column : column + 20] for row in (0, 20) for column in (0, 20, 40)]


@pytest.mark.parametrize("ground", GROUNDS)
def test_forced_tokens_are_told_apart_without_colours_on_any_ground(ground: tuple[int, int, int]) -> None:
    picture = Image.new("RGB", (60, 40), ground)
    drawn = light(marked(picture, WHOLE, 0, forced_in={1}, forced_out={5}))
    plain, into, *others, out = cells(drawn)
    assert all((cell == plain[0, 0]).all() for cell in (plain, *others))
    assert (into[0] > 240).all() and (into[:, -1] > 240).all() and (into[2, 2:18] < 40).all()
    assert (into[5:15, 5:15] == plain[0, 0]).all()
    assert np.diag(out)[3:17].min() > 240 and np.diag(out[::-1])[3:17].min() > 240
    beside = out[8:12, 2]
    assert beside.max() < 130 and (out < 60).mean() > 0.25


def test_marks_lie_on_overlays_and_strips_too() -> None:
    made = report(segment(("image", (2, 3)), keep=[0, 1]))
    plain = np.asarray(overlay(made, grey(60, 40), upscale=1))
    drawn = np.asarray(overlay(made, grey(60, 40), upscale=1, forced_in={1}, forced_out={4}))
    for number, (before, after) in enumerate(zip(cells(plain), cells(drawn), strict=True)):
        assert ((before != after).any()) == (number in (1, 4))
    clip = report(segment(("frame", (1, 1)), ("frame", (1, 1)), keep=[0]))
    one, two = (np.asarray(strip(clip, [grey(40, 40)] * 2, forced_out=out)) for out in ((), (1,)))
    assert (one[:, :96] == two[:, :96]).all() and (one[:96, 104:] != two[:96, 104:]).any()


def test_frames_that_are_pictures_of_their_own_have_marks_counted_through_all() -> None:
    clip = report(*[segment(("image", (1, 2)), keep=[0]) for _ in range(3)])
    plain, drawn = (np.asarray(strip(clip, [grey(40, 40)] * 3, forced_in=tokens)) for tokens in ((), (3,)))
    changed = (plain != drawn).any(axis=(0, 2)).nonzero()[0]
    assert changed.min() >= 104 + 48 and changed.max() < 104 + 96


def cut(*depths: int, layers: int = 8) -> SimpleNamespace:
    """A picture of a row of tokens, each of which went through so many layers."""
    kept = [token for token, depth in enumerate(depths) if depth == layers]
    made = segment(("image", (1, len(depths))), keep=kept, taken=[2] * len(kept))
    return SimpleNamespace(**vars(made), depths=torch.tensor(depths))


def test_what_each_cut_dropped_has_its_colour() -> None:
    made = report(cut(2, 8, 0, 6, 2), picks=("attended",) * 3)
    assert legend(made) == [
        ("kept: attended", OF_PICKS[2]),
        ("dropped before the first layer", OF_CUTS[0]),
        ("dropped behind layer 2", OF_CUTS[1]),
        ("dropped behind layer 6", OF_CUTS[2]),
    ]
    drawn = np.asarray(overlay(made, grey(50, 10), upscale=1, stages=True)).astype(int)
    assert (drawn[5, 15] == 200).all() and (drawn[0, 10:20] == OF_PICKS[2]).all()
    assert (drawn[:, :10] == drawn[:, 40:]).all()
    for token, place in ((2, 0), (0, 1), (3, 2)):
        off = [np.abs(drawn[5, 10 * token + 5] - (0.45 * 92 + 0.55 * np.array(colour))).max() for colour in OF_CUTS]
        assert int(np.argmin(off)) == place and min(off) <= 2


def test_picks_of_one_name_are_told_by_their_stage_and_others_are_not_listed() -> None:
    made = report(segment(("image", (1, 3)), keep=[0, 2], taken=[0, 2]), picks=("best", "rest", "best"))
    assert [name for name, _ in legend(made)] == ["best, stage 1", "best, stage 3"]


def test_letters_of_a_row_of_four_can_be_read_on_a_telephone() -> None:
    for size, height in (((160, 90), 128), ((90, 160), 128), ((100, 100), 96), ((100, 100), 320)):
        clip = report(segment(*[("frame", (4, 8))] * 4, keep=[0]))
        drawn = strip(clip, [grey(*size)] * 4, height=height, columns=4)
        letters = (drawn.height - height - 4 - max(6, height // 16) - 4) / 1.3
        assert letters * min(1, 390 / drawn.width) >= 13.5 and letters >= height / 16, size
    assert legible(390) == 14 and legible(1560) == 56 and legible(10) == 14


def test_labels_stand_above_their_panels() -> None:
    made = report(segment(*[("frame", (1, 1))] * 5, keep=[0]))
    frames = [grey(100, 60)] * 5
    plain, labelled = (overlay(made, frames, columns=4, labels=names) for names in ((), ["a", "b", "c", "d", ""]))
    high = line(legible(400))
    assert plain.size == (412, 124) and labelled.size == (412, 124 + 2 * high)
    drawn = np.asarray(labelled)
    assert (drawn[high : high + 60, :100] == 200).all() and (drawn[:high, :100] < 128).any()
    told = strip(made, frames, labels=["x"] * 5)
    assert told.height > strip(made, frames).height
    with pytest.raises(InvalidOption, match="expected one for each of 5 panels, got 2"):
        overlay(made, frames, labels=["a", "b"])
    with pytest.raises(InvalidOption, match="expected one for each of 5 panels"):
        strip(made, frames, labels=["a"])


def test_a_bar_says_what_is_scored_and_from_where_to_where() -> None:
    made = report(segment(("image", (1, 2)), keep=[0]))
    scores = torch.tensor([0.25, 3.0])
    plain = heatmap(scores, made, grey(200, 100), upscale=1)
    one, two = (with_bar(plain, scores, name) for name in ("importance", "importance\nand more"))
    assert np.array_equal(np.asarray(one)[:100], np.asarray(plain)) and two.height - one.height == line(14)
    row = np.asarray(one)[100 + 4 + line(14) + 2].astype(int)
    weights = np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(row @ weights) >= -1e-9).mean() > 0.97 and (row[-1] @ weights) - (row[0] @ weights) > 80
    other = with_bar(plain, scores * 2, "importance")
    assert (np.asarray(one) != np.asarray(other)).any(), "the numbers at its ends"
    assert with_bar(plain, torch.full((2,), float("nan")), "nothing").height > 100


def test_pictures_of_one_scale() -> None:
    made = report(segment(("image", (1, 2)), keep=[0]))
    scores, span = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0, 4.0])
    drawn = np.asarray(heatmap(scores, made, grey(4, 2), upscale=1, span=span))
    whole = report(segment(("image", (1, 4)), keep=[0]))
    expected = np.asarray(heatmap(span, whole, grey(4, 2), upscale=1))
    assert (drawn[:, 0] == expected[:, 1]).all() and (drawn[:, 2] == expected[:, 2]).all()


def test_lines_are_broken_where_they_are_too_long() -> None:
    text = "one two three four five six seven"
    lines = broken(text, 100, 14)
    assert " ".join(lines) == text and all(font(14).getlength(one) <= 100 for one in lines) and len(lines) > 1
    assert broken(text, 100, 14, most=2)[0] == lines[0] and broken(text, 100, 14, most=2)[1].endswith("...")
    assert broken("", 100, 14) == []
