"""The overlay, pixel by pixel, on segments made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune.errors import InvalidOption
from vtprune.types import Part
from vtprune.viz import overlay

BRIGHT, DARK = 200, 92


def report(*parts: tuple[str, tuple[int, int]], keep: list[int]) -> Any:
    made, start = [], 0
    for kind, (h, w) in parts:
        made.append(Part(start=start, stop=start + h * w, kind=kind, grid=(h, w)))
        start += h * w
    kept = torch.tensor(keep, dtype=torch.long)
    return SimpleNamespace(segments=(SimpleNamespace(parts=tuple(made), keep=kept, taken=torch.zeros_like(kept)),))


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (BRIGHT,) * 3)


def values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)[:, :, 0]


def test_kept_patches_stay_and_the_rest_is_dimmed() -> None:
    drawn = values(overlay(report(("image", (2, 3)), keep=[0, 5]), grey(6, 4), upscale=1))
    expected = np.full((4, 6), DARK)
    expected[:2, :2] = expected[2:, 4:] = BRIGHT
    assert np.array_equal(drawn, expected)


def test_sides_that_the_grid_does_not_divide_are_covered() -> None:
    drawn = values(overlay(report(("image", (2, 2)), keep=[0, 1, 2, 3]), grey(7, 5), upscale=1))
    assert drawn.shape == (5, 7) and (drawn == BRIGHT).all()


def test_separators_are_not_counted() -> None:
    part = Part(start=0, stop=6, kind="crop", grid=(2, 2), separators=(2, 5))
    segment = SimpleNamespace(parts=(part,), keep=torch.tensor([2]), taken=torch.tensor([0]))
    drawn = values(overlay(SimpleNamespace(segments=(segment,)), grey(2, 2), upscale=1))
    assert drawn.tolist() == [[DARK, DARK], [BRIGHT, DARK]]


def test_thumbnail_and_crops_are_two_panels_of_the_same_picture() -> None:
    drawn = values(overlay(report(("thumbnail", (1, 1)), ("crop", (2, 2)), keep=[0, 1]), grey(4, 4), upscale=1))
    assert drawn.shape == (4, 12)
    assert (drawn[:, :4] == BRIGHT).all() and (drawn[:, 4:8] == 255).all()
    assert (drawn[:2, 8:10] == BRIGHT).all() and (drawn[2:, 8:] == DARK).all() and (drawn[:2, 10:] == DARK).all()


def test_tiles_are_put_together_by_the_aspect_of_the_picture() -> None:
    tiles = report(("tile", (1, 1)), ("tile", (1, 1)), ("thumbnail", (1, 1)), keep=[1])
    wide = values(overlay(tiles, grey(4, 2), upscale=1))
    assert wide.shape == (2, 12)
    assert (wide[:, :2] == DARK).all() and (wide[:, 2:4] == BRIGHT).all() and (wide[:, 8:] == DARK).all()
    tall = values(overlay(tiles, grey(2, 4), upscale=1))
    assert (tall[:2, :2] == DARK).all() and (tall[2:, :2] == BRIGHT).all()


def test_frames_get_their_own_pictures_and_wrap_after_eight() -> None:
    clip = report(*[("frame", (1, 1))] * 9, keep=list(range(9)))
    pictures = [Image.new("RGB", (2, 2), (10 * number,) * 3) for number in range(18)]
    drawn = values(overlay(clip, pictures, upscale=1))
    assert drawn.shape == (8, 44)
    assert [drawn[0, 6 * column] for column in range(8)] == [20 * number for number in range(8)]
    assert drawn[6, 0] == 160 and drawn[6, 10] == 255


def test_small_pictures_grow_and_upscale_is_obeyed() -> None:
    single = report(("image", (2, 2)), keep=[0])
    assert overlay(single, grey(128, 128)).size == (384, 384)
    assert overlay(single, grey(500, 400)).size == (500, 400)
    assert overlay(single, grey(10, 10), upscale=3).size == (30, 30)


def test_dropped_patches_lose_colour_and_differ_from_kept_dark_ones() -> None:
    half = report(("image", (1, 2)), keep=[0])
    black = values(overlay(half, Image.new("RGB", (2, 1)), upscale=1))
    assert black[0, 0] == 0 and black[0, 1] > 30
    red = np.asarray(overlay(half, Image.new("RGB", (2, 1), (250, 0, 0)), upscale=1)).astype(int)
    assert red[0, 0].tolist() == [250, 0, 0] and np.ptp(red[0, 1]) < 20 and red[0, 1].max() < 125
    plain = values(overlay(half, grey(2, 1), dim=0, upscale=1))
    assert plain[0, 1] == values(overlay(half, Image.new("RGB", (2, 1)), dim=0, upscale=1))[0, 1]


def test_dim_of_one_changes_nothing() -> None:
    picture = Image.effect_noise((16, 16), 50).convert("RGB")
    drawn = overlay(report(("image", (4, 4)), keep=[3]), picture, dim=1.0, upscale=1)
    assert np.array_equal(np.asarray(drawn), np.asarray(picture))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"segment": 1}, "segment=1: the report has 1"),
        ({"segment": -1}, "segment=-1"),
        ({"segment": True}, "segment=True"),
        ({"dim": 1.5}, "a share in"),
        ({"upscale": 0}, "whole factor"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        overlay(report(("image", (2, 2)), keep=[0]), grey(4, 4), **options)


def test_no_report_yet_and_reports_without_pictures() -> None:
    with pytest.raises(InvalidOption, match="run the wrapped model first"):
        overlay(None, grey(4, 4))  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="no picture in this prompt"):
        overlay(SimpleNamespace(segments=()), grey(4, 4))


def test_pictures_that_do_not_fit_the_parts() -> None:
    with pytest.raises(InvalidOption, match="expected one PIL image"):
        overlay(report(("image", (2, 2)), keep=[0]), [grey(4, 4)])
    with pytest.raises(InvalidOption, match="encoded as 2 frames"):
        overlay(report(("frame", (1, 1)), ("frame", (1, 1)), keep=[0]), [grey(4, 4)] * 3)


def test_stages_frame_kept_patches_in_the_colours_of_their_picks() -> None:
    """Orange and blue for two picks, white where protected; the inside and dropped patches stay as they are."""
    made = report(("image", (2, 2)), keep=[0, 1, 3])
    made.segments[0].taken = torch.tensor([0, 1, -1])
    plain, framed = (np.asarray(overlay(made, grey(8, 8), upscale=1, stages=on)) for on in (False, True))
    assert [tuple(framed[at].tolist()) for at in ((0, 0), (3, 3), (0, 7), (4, 4))] == [
        (255, 140, 0),
        (255, 140, 0),
        (0, 190, 255),
        (255, 255, 255),
    ]
    for inside in (np.s_[1:3, 1:3], np.s_[1:3, 5:7], np.s_[5:7, 5:7], np.s_[4:, :4]):
        assert (framed[inside] == plain[inside]).all()
