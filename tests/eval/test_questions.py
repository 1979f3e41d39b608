"""Questions of a run, and the truth about pictures."""

from __future__ import annotations

import numpy as np
import pytest

from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.eval.questions import QUESTIONS, coverage, draw_items, in_turn, judged, object_tokens
from vtprune.tiny.scenes import DEVELOPMENT, TEST
from vtprune.types import Part


def grid(rows: int, columns: int, kind: str = "image", start: int = 0) -> Part:
    return Part(start=start, stop=start + rows * columns, kind=kind, grid=(rows, columns))


def test_a_run_is_told_by_split_seed_and_samples() -> None:
    items = draw_items("test", 3, 4)
    again = draw_items("test", 4, 3)
    assert {item.seed for item in items} == {TEST[i] for i in range(3, 7)}
    assert [item.question for item in items if item.number] == [item.question for item in again]
    assert {item.seed for item in draw_items("dev", 0, 1)} == {DEVELOPMENT[0]}
    for number in range(4):
        own = [item for item in items if item.number == number]
        assert 0 < len(own) <= QUESTIONS
        following = next((item.views[0] for item in items if item.number == number + 1), own[0].other[0])
        assert (own[0].other[0].pixels == following.pixels).all()
        assert (own[0].other[0].pixels != own[0].views[0].pixels).any()


@pytest.mark.parametrize("numbers", [("test", 0, 0), ("test", -1, 3), ("dev", len(TEST) - 3, 3), ("train", 0, 1)])
def test_scenes_outside_the_split_are_refused(numbers: tuple[str, int, int]) -> None:
    with pytest.raises(InvalidOption, match="expected"):
        draw_items(*numbers)


def test_the_first_word_is_judged() -> None:
    assert judged(" Red. It is red") == judged("red") == "red"
    assert judged("Three") == judged("3") == "3"
    assert judged("") == judged(" \n") == ""


@pytest.mark.parametrize("side", [4, 8, 16])
def test_coverage_is_that_of_the_scene_where_cells_are_whole_pixels(side: int) -> None:
    scene = draw_items("test", 0, 1)[0].views[0]
    expected = scene.coverage(128 // side).reshape(len(scene.things), -1)
    np.testing.assert_allclose(coverage([scene], [grid(side, side)]), expected, atol=1e-12)


def test_cells_that_cut_pixels_share_them() -> None:
    scene = draw_items("test", 0, 1)[0].views[0]
    covered = coverage([scene], [grid(5, 7)])
    painted = [(scene.owner == i).mean() for i in range(len(scene.things))]
    np.testing.assert_allclose(covered.mean(axis=1), painted)


def test_every_part_shows_the_whole_picture_and_tiles_are_not_known() -> None:
    scene = draw_items("test", 0, 1)[0].views[0]
    both = coverage([scene], [grid(4, 4, "thumbnail"), grid(8, 8, "crop", 16)])
    np.testing.assert_allclose(both, np.hstack([coverage([scene], [grid(4, 4)]), coverage([scene], [grid(8, 8)])]))
    assert coverage([scene], [grid(4, 4, "tile")]).shape == (len(scene.things), 16)
    with pytest.raises(UnsupportedCall, match="tile"):
        coverage([scene], [grid(4, 4, "tile"), grid(4, 4, "tile", 16)])


def test_object_tokens_are_covered_by_a_sixth_or_so() -> None:
    scene = draw_items("test", 0, 1)[0].views[0]
    shown = object_tokens([scene], [grid(16, 16)]).reshape(16, 16)
    share = (scene.owner >= 0).reshape(16, 8, 16, 8).mean(axis=(1, 3))
    assert (shown == (share >= 0.15)).all()
    assert 0.02 < shown.mean() < 0.4


def test_things_take_turns() -> None:
    covered = np.array([[0.0, 0.9, 0.8, 0.7, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1, 0.4, 0.0]])
    assert in_turn(covered) == [1, 4, 2, 3]
    shared = np.array([[0.5, 0.2, 0.0], [0.4, 0.0, 0.3]])
    assert in_turn(shared) == [0, 2, 1]
    assert in_turn(np.zeros((0, 4))) == []
