"""Reading is exact: the frame, its index and its time, whatever the file is and in whatever order it is read."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.video.common import (
    EDITED,
    FOLDER,
    RATE,
    RECIPES,
    UNTIMED,
    UPRIGHT,
    Recipe,
    clip,
    number_of,
    numbers,
    picture,
    subsets,
    write,
)
from vtprune.errors import InvalidOption
from vtprune.video.finders import SEEK_FRAMES
from vtprune.video.read_pyav import PyavVideo
from vtprune.video.reader import open_video, read_frames
from vtprune.video.sampling import Scenes, Uniform
from vtprune.video.tape import Tape

pytest.importorskip("av")
ALL = Uniform(1000)


@pytest.mark.parametrize("name", RECIPES)
def test_every_frame_is_the_right_one_at_the_right_time(name: str) -> None:
    recipe = RECIPES[name]
    found = read_frames(clip(name), ALL)
    assert numbers(found) == list(range(recipe.frames)) == found.indices.tolist()
    assert (found.backend, found.total, found.pixels.shape[1:3]) == ("pyav", recipe.frames, recipe.size)
    if name in UNTIMED:
        assert "assumed" in found.warnings[0]
        return
    # Containers round to thousandths of a second.
    np.testing.assert_allclose(found.times, recipe.seconds, atol=6e-4)
    assert found.warnings == ()
    assert found.duration == pytest.approx(recipe.seconds[-1] + 1 / RATE, abs=0.02)


@pytest.mark.parametrize("name", [*RECIPES, *EDITED, *UPRIGHT])
def test_the_order_of_requests_changes_nothing(name: str) -> None:
    first = EDITED[name][0] if name in EDITED else 0
    with closing(open_video(clip(name), backend="pyav")) as video:
        for indices in subsets(len(video.times)):
            got = [(index, number_of(pixels)) for index, pixels in video.frames(indices)]
            assert got == [(index, first + index) for index in indices]


@pytest.mark.parametrize("name", EDITED)
def test_an_edit_list_is_obeyed(name: str) -> None:
    found = read_frames(clip(name), ALL)
    assert numbers(found) == list(EDITED[name])
    np.testing.assert_allclose(found.times, np.arange(len(EDITED[name])) / RATE, atol=1e-9)


@pytest.mark.parametrize("name", [*UPRIGHT, "mirrored.mp4", "mirrored-right.mp4"])
def test_frames_are_upright(name: str) -> None:
    found = read_frames(clip(name), Uniform(3))
    assert found.pixels.shape == (3, 48, 64, 3)
    assert numbers(found) == [10, 30, 50]


@pytest.fixture(scope="module")
def long_clip() -> Path:
    return write(FOLDER / "long.mp4", Recipe(frames=900, gop=30, between=2))


def decoded_for(path: Path, indices: list[int]) -> int:
    with closing(PyavVideo(path)) as video:
        assert [number_of(pixels) for _, pixels in video.frames(indices)] == indices
        return video.decoded


def test_few_frames_cost_few_groups(long_clip: Path) -> None:
    """Of each frame its group, and what is in the threads of the decoder and held back for reordering."""
    group = 30 + 16 + min(os.cpu_count() or 1, 16)
    assert decoded_for(long_clip, [100, 400, 700]) < 4 * group
    assert decoded_for(long_clip, [899]) < 2 * group


def test_many_frames_are_decoded_once(long_clip: Path) -> None:
    assert decoded_for(long_clip, list(range(900))) == 900
    assert decoded_for(long_clip, list(range(0, 900, SEEK_FRAMES))) <= 900


def test_frames_of_one_group_are_decoded_once() -> None:
    path = write(FOLDER / "one-group.mp4", Recipe(frames=400, gop=1000))
    assert decoded_for(path, [50, 60, 61, 390]) <= 400


def test_frames_are_held_one_at_a_time(long_clip: Path) -> None:
    big = write(FOLDER / "big.mp4", Recipe(frames=120, size=(240, 320)), lambda number: picture(number, (240, 320)))
    size = 240 * 320 * 3
    with closing(open_video(big)) as video:
        next(iter(video.frames([0])))
        tracemalloc.start()
        count = sum(1 for _ in video.frames(range(120)))
        peak = tracemalloc.get_traced_memory()[1]
        Scenes(4).choose(video)
        peak_of_scenes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == 120
    assert peak < 6 * size
    assert peak_of_scenes < 8 * size


def test_a_file_that_cannot_seek_is_wound_by_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(PyavVideo(clip("pyramid.mp4"))) as video:
        monkeypatch.setattr(video._tape, "_seek", lambda stamp, key, index: False)
        assert [number_of(pixels) for _, pixels in video.frames([50])] == [50]
        assert [number_of(pixels) for _, pixels in video.frames([3, 45])] == [3, 45]


@pytest.mark.parametrize("name", ["cut-fast.mp4", "cut.mkv", "cut.ts"])
def test_a_truncated_file_gives_what_is_there(name: str) -> None:
    found = read_frames(clip(name), Uniform(8))
    seen = numbers(found)
    assert len(seen) == 8
    assert None not in seen and seen == sorted(set(seen))
    assert found.total < 60 and found.duration < 2
    if name != "cut.ts":
        assert any("the file ends early" in warning for warning in found.warnings)
        with pytest.raises(InvalidOption, match=r"the file ends early.*on_truncated='warn'"):
            read_frames(clip(name), Uniform(8), on_truncated="raise")


@pytest.mark.parametrize("name", ["no-beginning.ts", "no-key-first.ts"])
def test_a_recording_may_begin_between_key_frames(name: str) -> None:
    found = read_frames(clip(name), ALL)
    seen = numbers(found)
    assert seen == list(range(60 - len(seen), 60)) and len(seen) > 30
    assert (found.total, found.times[0], found.warnings) == (len(seen), 0, ())
    assert numbers(read_frames(clip(name), Uniform(2))) == [seen[len(seen) // 4], seen[len(seen) * 3 // 4]]


def test_streams_that_turn_up_late_do_no_harm() -> None:
    """PyAV 18 reads beyond its list of streams then, and raises at the end of the file or does not, as it happens."""

    class Stumbling:
        def demux(self, stream: Any) -> Iterator[Any]:
            yield from container.demux(stream)
            raise IndexError("list index out of range")

    tape = Tape(clip("transport.ts"))
    container, tape._container = tape._container, Stumbling()
    assert len(list(tape.packets())) == 60
    container.close()


def test_a_path_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "http:c.mp4", os.fsdecode(b"not-utf\xff.mp4"), "片 %03d.mp4"):
        (tmp_path / name).write_bytes(clip("even.mp4").read_bytes())
        assert len(read_frames(name, Uniform(3)).indices) == 3
        assert len(read_frames(name, Uniform(3), timeout=30).indices) == 3


def test_frames_that_cannot_be_decoded_are_left_out() -> None:
    data = bytearray(clip("fast.mp4").read_bytes())
    middle, begins = len(data) * 3 // 4, data.find(b"mdat")
    data[begins + (middle - begins) // 2 : middle] = bytes(middle - begins - (middle - begins) // 2)
    path = FOLDER / "hole.mp4"
    path.write_bytes(data)
    found = read_frames(path, ALL)
    assert 0 < len(found.indices) < found.total == 60
    lost = 60 - len(found.indices)
    told = f"{lost} of 60 frames asked for could not be decoded: the file is truncated or damaged"
    assert found.warnings[0] == told and all("may show damage" in text for text in found.warnings[1:])
    with pytest.raises(InvalidOption, match=r"hole\.mp4: .* could not be decoded"):
        read_frames(path, ALL, on_truncated="raise")


def test_frames_take_other_frames() -> None:
    found = read_frames(clip("uneven.mkv"), Uniform(6))
    taken = found.taking([4, 1])
    assert taken.indices.tolist() == found.indices[[4, 1]].tolist()
    assert (taken.pixels == found.pixels[[4, 1]]).all() and taken.times.tolist() == found.times[[4, 1]].tolist()
    assert (taken.total, taken.duration) == (found.total, found.duration)
    assert [np.asarray(one).tolist() for one in taken.pictures] == taken.pixels.tolist()
    assert len(found.taking([]).indices) == 0
    with pytest.raises(InvalidOption, match="expected numbers from 0 to 5"):
        found.taking([6])
