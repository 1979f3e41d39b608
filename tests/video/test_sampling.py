"""Which frames a sampling chooses: cases worked by hand, and what holds for all clips."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.errors import InvalidOption
from vtprune.video.sampling import SAMPLINGS, ByRate, Sampling, Scenes, Uniform, best_frames, from_dict


@dataclass(kw_only=True)
class Pretended:
    """A clip of plain grey frames."""

    times: np.ndarray
    duration: float
    greys: Sequence[int] = ()
    lost: tuple[int, ...] = ()
    backend: str = "none"
    size: tuple[int, int] = (8, 8)
    damage: str = ""
    warnings: tuple[str, ...] = ()
    looked: list[int] = field(default_factory=list)

    def frames(self, indices: Any) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            self.looked.append(int(index))
            if index not in self.lost:
                yield int(index), np.full((8, 8, 3), self.greys[index], dtype=np.uint8)

    def doubtful(self, indices: Any) -> list[int]:
        return []

    def close(self) -> None: ...


def even(count: int, rate: float = 10.0) -> Pretended:
    return Pretended(times=np.arange(count) / rate, duration=count / rate)


def at(*times: float, until: float) -> Pretended:
    return Pretended(times=np.array(times, dtype=np.float64), duration=until)


def grey(*greys: int, lost: tuple[int, ...] = ()) -> Pretended:
    clip = even(len(greys))
    return Pretended(times=clip.times, duration=clip.duration, greys=greys, lost=lost)


def chosen(sampling: Sampling, clip: Pretended) -> list[int]:
    return sampling.choose(clip).tolist()


def test_uniform_takes_the_middles() -> None:
    assert chosen(Uniform(1), even(10)) == [5]
    assert chosen(Uniform(2), even(10)) == [2, 7]
    assert chosen(Uniform(4), even(10)) == [1, 3, 6, 8]
    assert chosen(Uniform(3), even(3)) == [0, 1, 2]
    assert chosen(Uniform(9), even(3)) == [0, 1, 2]
    assert chosen(Uniform(5), at(0, until=0)) == [0]


def test_uniform_goes_by_time_and_not_by_number() -> None:
    clip = at(0, 0.1, 0.2, 0.3, 0.4, 5.0, until=10)
    assert chosen(Uniform(1), clip) == [5]
    assert chosen(Uniform(2), clip) == [4, 5]
    # The last frame is shown at 6 and 8 seconds, frame 4 at 1, 2.5 and 4: neighbours stand in on both sides.
    assert chosen(Uniform(4), clip) == [2, 3, 4, 5]
    assert chosen(Uniform(3), at(0, 9, 9.5, 9.9, until=10)) == [0, 1, 2]


@given(
    st.integers(1, 400),
    st.integers(1, 64),
    st.sampled_from([1.0, 10.0, 23.976, 25.0, 29.97, 30.0, 60.0]),
    st.booleans(),
)
def test_uniform_is_the_usual_formula_at_a_constant_rate(T: int, count: int, rate: float, rounded: bool) -> None:
    clip = even(T, rate)
    if rounded:
        clip = Pretended(times=clip.times.round(3), duration=round(clip.duration, 3))
    count = min(count, T)
    assert chosen(Uniform(count), clip) == [(2 * i + 1) * T // (2 * count) for i in range(count)]


uneven_clips = st.lists(st.floats(0.002, 10), min_size=1, max_size=60).map(
    lambda steps: at(*np.cumsum([0, *steps[:-1]]), until=float(np.sum(steps)))
)


@given(uneven_clips, st.integers(1, 80))
def test_uniform_gives_as_many_as_there_are(clip: Pretended, count: int) -> None:
    found = chosen(Uniform(count), clip)
    assert len(found) == min(count, len(clip.times))
    assert found == sorted(set(found)) and found[0] >= 0 and found[-1] < len(clip.times)


def test_by_rate_takes_the_middle_of_every_stretch() -> None:
    assert chosen(ByRate(2), even(20)) == [2, 7, 12, 17]
    assert chosen(ByRate(10), even(4)) == [0, 1, 2, 3]
    assert chosen(ByRate(1000), even(4)) == [0, 1, 2, 3]
    assert chosen(ByRate(0.01), even(9)) == [4]
    assert chosen(ByRate(1), at(0, 2.6, until=4)) == [0, 1]
    assert chosen(ByRate(1), at(0, 0.1, 0.2, 3.4, until=4)) == [2, 3]


def test_by_rate_thins_evenly() -> None:
    assert chosen(ByRate(10, most=4), even(10)) == chosen(Uniform(4), even(10))
    assert chosen(ByRate(2, most=2), even(20)) == [7, 17]
    assert chosen(ByRate(2, most=9), even(20)) == [2, 7, 12, 17]


@given(uneven_clips, st.floats(0.01, 100), st.one_of(st.none(), st.integers(1, 20)))
def test_by_rate_finds_what_a_loop_finds(clip: Pretended, fps: float, most: int | None) -> None:
    found = chosen(ByRate(fps, most=most), clip)
    assert found == sorted(set(found)) and found
    assert most is None or len(found) <= most
    if most is None and len(clip.times) > 2:
        looped = {int(np.flatnonzero(clip.times <= moment)[-1]) for moment in np.arange(0.5, clip.duration * fps) / fps}
        assert set(found) == looped or not looped


def test_scenes_take_the_middle_of_each() -> None:
    clip = grey(*[0] * 4, *[200] * 3, *[90] * 5)
    assert chosen(Scenes(3), clip) == [1, 5, 9]
    assert clip.looked == list(range(12))
    assert chosen(Scenes(2), clip) == [1, 7]
    assert chosen(Scenes(1), clip) == [5]
    assert chosen(Scenes(50), clip) == list(range(12))


def test_of_equal_changes_the_earlier_one_cuts() -> None:
    assert chosen(Scenes(2), grey(0, 0, 100, 100, 0, 0)) == [0, 3]
    assert chosen(Scenes(3), grey(0, 0, 100, 100, 0, 0)) == [0, 2, 4]


def test_where_nothing_changes_the_longest_scenes_are_halved() -> None:
    assert chosen(Scenes(4), grey(*[7] * 16)) == [1, 5, 9, 13]
    assert chosen(Scenes(3), grey(*[7] * 3, *[99] * 8)) == [1, 4, 8]
    assert chosen(Scenes(2), grey(7, 8, 7, 8)) == [0, 2]


def test_scenes_look_at_so_many_and_pass_over_lost_frames() -> None:
    clip = grey(*[0] * 50, *[250] * 50)
    assert chosen(Scenes(2, candidates=10), clip) == [25, 75]
    assert len(clip.looked) == 10
    assert chosen(Scenes(2), grey(0, 0, 0, 200, 200, 200, lost=(1, 4))) == [0, 3]
    assert chosen(Scenes(2), grey(1, 2, lost=(0, 1))) == []


@settings(max_examples=50)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(1, 50), st.integers(1, 50))
def test_scenes_are_distinct_and_as_many_as_asked_for(greys: list[int], count: int, candidates: int) -> None:
    found = chosen(Scenes(count, candidates=candidates), grey(*greys))
    assert found == sorted(set(found))
    assert len(found) == min(count, len(greys))


def test_best_frames_are_ascending_and_evenly_apart_where_they_score_alike() -> None:
    assert best_frames([0.1, 0.9, 0.9, 0.2, 0.9], 2).tolist() == [1, 4]
    assert best_frames([1.0] * 8, 2).tolist() == [2, 6]
    assert best_frames([1.0] * 5 + [2.0], 2).tolist() == [2, 5]
    assert best_frames([3, 1, 2], 2).tolist() == [0, 2]
    assert best_frames([1.0, 2.0], 5).tolist() == [0, 1]
    assert best_frames([], 1).tolist() == []
    for scores in ([[1.0]], [float("nan")], [float("inf")]):
        with pytest.raises(InvalidOption, match="one finite number for each frame"):
            best_frames(scores, 1)
    with pytest.raises(InvalidOption, match="count=0"):
        best_frames([1.0], 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 30))
def test_best_frames_are_the_best(scores: list[int], count: int) -> None:
    found = best_frames(scores, count).tolist()
    assert found == sorted(set(found)) and len(found) == min(count, len(scores))
    assert sorted((scores[i] for i in found), reverse=True) == sorted(scores, reverse=True)[:count]
    alike = [i for i, score in enumerate(scores) if score == min(scores[i] for i in found)]
    places = [alike.index(i) for i in found if i in alike]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("sampling", [Uniform(8), ByRate(0.5), ByRate(2, most=16), Scenes(4), Scenes(4, candidates=32)])
def test_a_sampling_is_a_value(sampling: Sampling) -> None:
    stored = json.loads(json.dumps(sampling.to_dict()))
    assert from_dict(stored) == sampling
    assert hash(from_dict(stored)) == hash(sampling)
    assert repr(sampling).startswith(type(sampling).__name__ + "(")
    assert type(sampling).__name__ in SAMPLINGS


def test_wrong_values_are_named() -> None:
    for make, text in (
        (lambda: Uniform(0), "count=0: expected a whole number from 1 on"),
        (lambda: Uniform(2.5), "count=2.5"),  # type: ignore[arg-type]
        (lambda: Uniform(True), "count=True"),
        (lambda: ByRate(0), "fps=0: expected a number above 0"),
        (lambda: ByRate(float("nan")), "fps=nan"),
        (lambda: ByRate(1, most=0), "most=0"),
        (lambda: Scenes(-1), "count=-1"),
        (lambda: Scenes(1, candidates=0), "candidates=0"),
        (lambda: from_dict({"sampling": "Magic"}), "sampling='Magic': expected one of Uniform, ByRate, Scenes"),
        (lambda: from_dict({"count": 3}), "sampling=None"),
        (lambda: from_dict({"sampling": "Uniform", "counts": 3}), "Uniform cannot be made of"),
    ):
        with pytest.raises(InvalidOption, match=text):
            make()


def test_numbers_of_numpy_are_stored_as_those_of_python() -> None:
    for sampling, plain in (
        (Uniform(np.int64(2)), Uniform(2)),
        (ByRate(np.float32(2), np.int32(7)), ByRate(2.0, 7)),
        (ByRate(np.int64(2)), ByRate(2)),
        (Scenes(np.int64(3), np.uint8(9)), Scenes(3, 9)),
    ):
        assert sampling == plain
        assert json.loads(json.dumps(sampling.to_dict())) == plain.to_dict()


@pytest.mark.filterwarnings("error")
def test_any_rate_that_is_high_enough_takes_every_frame() -> None:
    for fps in (1e3, 1e6, 1e12, 1e308):
        assert chosen(ByRate(fps), even(60, 30.0)) == list(range(60))
