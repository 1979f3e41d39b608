"""Folders of pictures, arrays and pictures in memory are clips too."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.video.common import numbers, picture
from vtprune._pictures import read_picture
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


def test_only_still_pictures_of_a_folder_are_frames(tmp_path: Path) -> None:
    """No hidden notes about files, and nothing that Pillow would give to another program."""
    stills(tmp_path, 3)
    for name in ("._frame_0.png", "doc.pdf", "clip.mpg", "drawing.eps", "data.h5", "notes.wmf"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7" + bytes(100))
    found = read_frames(tmp_path, ALL, rate=1.0)
    assert (numbers(found), found.total, found.warnings) == ([0, 1, 2], 3, ())


def test_several_pictures_in_one_file_are_told(tmp_path: Path) -> None:
    first, *others = [Image.fromarray(picture(number)) for number in range(10)]
    first.save(tmp_path / "all.gif", save_all=True, append_images=others)
    found = read_frames(tmp_path, ALL, rate=1.0)
    assert numbers(found) == [0]
    assert found.warnings == ("all.gif holds several pictures: the first one is taken",)


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    folder, programs = tmp_path / "frames", tmp_path / "programs"
    folder.mkdir(), programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\necho 10.0\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\nshowpage\n"
    (folder / "1.eps").write_bytes(drawing)
    with pytest.raises(InvalidOption, match="holds no pictures"):
        read_frames(folder, ALL)
    (folder / "1.png").write_bytes(drawing)
    with pytest.raises(InvalidOption, match=r"no picture in .* can be read"):
        read_frames(folder, ALL)
    with pytest.raises(InvalidOption, match="is not a picture"):
        read_picture(folder / "1.eps")
    assert not (tmp_path / "started").exists()


def test_odd_arrays_are_refused_by_name(tmp_path: Path) -> None:
    with (tmp_path / "several.npy").open("wb") as file:
        np.savez(file, a=np.zeros((2, 4, 4, 3), dtype=np.uint8))
    np.save(tmp_path / "flat.npy", np.zeros((5, 0, 4, 3), dtype=np.uint8))
    with (tmp_path / "endless.npy").open("wb") as file:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (4_000_000_000, 1, 1, 3)}
        np.lib.format.write_array_header_1_0(file, shape)
        file.truncate(file.tell() + 12_000_000_000)
    for source, text in (
        (tmp_path / "several.npy", r"several\.npy holds several arrays"),
        (tmp_path / "flat.npy", r"flat\.npy holds frames of 4 x 0 pixels"),
        (np.zeros((5, 4, 0, 3), dtype=np.uint8), "the array holds frames of 0 x 4 pixels"),
        (tmp_path / "endless.npy", r"endless\.npy holds 4000000000 frames: at most 10000000"),
    ):
        with pytest.raises(InvalidOption, match=text):
            read_frames(source, Uniform(2))


def test_a_timeout_is_checked_where_none_is_needed() -> None:
    array = np.zeros((5, 4, 4, 3), dtype=np.uint8)
    for source in (array, [Image.fromarray(frame) for frame in array]):
        with pytest.raises(InvalidOption, match="timeout=-7: expected seconds above 0"):
            read_frames(source, Uniform(2), timeout=-7)
        assert len(read_frames(source, Uniform(2), timeout=7).indices) == 2
