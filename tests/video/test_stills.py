"""Folders of pictures, arrays and pictures in memory are clips too."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.video.common import numbers, picture
from vtprune.errors import InvalidOption
from vtprune.video.reader import open_video, read_frames
from vtprune.video.sampling import Uniform

ALL = Uniform(1000)


def stills(folder: Path, count: int = 12) -> Path:
    for number in range(count):
        Image.fromarray(picture(number)).save(folder / f"frame_{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_of_pictures_is_a_clip_in_natural_order(tmp_path: Path) -> None:
    found = read_frames(stills(tmp_path), ALL, rate=2.0)
    assert numbers(found) == list(range(12))
    assert (found.backend, found.duration, found.warnings) == ("stills", 6.0, ())
    assert found.times.tolist() == [number / 2 for number in range(12)]
    assert "24 a second assumed" in read_frames(tmp_path, Uniform(3)).warnings[0]


def test_pictures_of_another_size_are_named_and_broken_ones_left_out(tmp_path: Path) -> None:
    data = (stills(tmp_path) / "frame_5.png").read_bytes()
    (tmp_path / "frame_5.png").write_bytes(data[:40])
    found = read_frames(tmp_path, ALL)
    assert numbers(found) == [number for number in range(12) if number != 5]
    assert "1 of 12 frames" in found.warnings[-1]
    Image.new("RGB", (10, 8)).save(tmp_path / "frame_7.png")
    with pytest.raises(InvalidOption, match=r"frame_7\.png is 10 x 8, the first one 64 x 48"):
        read_frames(tmp_path, ALL)
    Image.new("I;16", (64, 48)).save(tmp_path / "frame_7.png")
    with pytest.raises(InvalidOption, match=r"frame_7\.png has more than 8 bits a pixel"):
        read_frames(tmp_path, ALL)


def test_arrays_and_pictures_in_memory_are_clips(tmp_path: Path) -> None:
    array = np.stack([picture(number) for number in range(10)])
    np.save(tmp_path / "clip.npy", array)
    pictures = [Image.fromarray(frame) for frame in array]
    for source, backend in ((array, "memory"), (pictures, "memory"), (tmp_path / "clip.npy", "stills")):
        found = read_frames(source, Uniform(5), rate=1.0)
        assert numbers(found) == [1, 3, 5, 7, 9]
        assert (found.backend, found.total, found.duration) == (backend, 10, 10.0)
    with closing(open_video(tmp_path / "clip.npy")) as video:
        assert isinstance(next(iter(video.frames([0])))[1].base, np.memmap)


def test_arrays_and_lists_of_another_kind_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for source, text in (
        (np.zeros((4, 8, 8)), r"the array is \(4, 8, 8\) of float64"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), "holds no frames"),
        ([], "holds no frames"),
        (["a.png"], "a list of str"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))], "picture 1 of the list is 4 x 5"),
        (tmp_path / "objects.npy", "cannot read the array"),
    ):
        with pytest.raises(InvalidOption, match=text):
            read_frames(source, ALL)
