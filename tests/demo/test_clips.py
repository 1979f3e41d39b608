"""Clips as uploads: frames at the times of the reader, or a sentence."""

from __future__ import annotations

import struct
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtprune.demo import media as uploads
from vtprune.demo.media import examples, read_upload
from vtprune.errors import InvalidOption

CLIP = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
"""Twelve frames, each of its number."""


def test_frames_of_an_array_are_taken_from_the_middle_of_equal_stretches() -> None:
    media = read_upload(CLIP, frames=3)
    assert media.kind == "video" and [int(np.asarray(one)[0, 0, 0]) for one in media.pictures] == [2, 6, 10]


def test_a_clip_has_one_clock_whatever_it_comes_as(tmp_path: Path) -> None:
    """That of the reader, which is told."""
    np.save(tmp_path / "a.npy", CLIP)
    file, array = read_upload(tmp_path / "a.npy", frames=3), read_upload(CLIP, frames=3)
    pictures = read_upload([Image.fromarray(frame) for frame in CLIP], frames=3)
    for media, name in ((file, "a.npy"), (array, "the array"), (pictures, "the list of pictures")):
        assert media.times == pytest.approx([2 / 24, 6 / 24, 10 / 24]) and media.duration == pytest.approx(0.5)
        assert [int(np.asarray(media.pictures[0])[0, 0, 0])] == [2]
        assert media.notes == (
            "3 of 12 frames are taken, evenly spread",
            f"{name} does not say when frames are shown: 24 a second assumed",
        )


def test_pictures_that_make_a_clip_are_tidied() -> None:
    deep = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    media = read_upload([Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("RGB", (8, 8)), deep], frames=3)
    assert [int(np.asarray(one).mean()) for one in media.pictures] == [255, 0, 255]


def test_no_note_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", CLIP)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "sub")
    for name in (str(tmp_path / "a.npy"), "../a.npy", str(tmp_path / "link" / "a.npy"), "../link/a.npy"):
        told = " ".join(read_upload(name).notes)
        assert "a.npy does not say" in told and "/" not in told


def array_header(header: bytes) -> bytes:
    padded = header + b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(padded)) + padded + b"\0" * 20000


_HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize(
    "header",
    [
        _HEADER % f"({2**70}, 16, 16, 3)",
        _HEADER % f"({2**40}, {2**40}, {2**40}, 3)",
        _HEADER % "(-8, -16, 16, 3)",
        _HEADER % "(4, 0, 16, 3)",
        _HEADER % "(0, 16, 16, 3)",
        _HEADER % "(1, 9000, 9000, 3)",
        _HEADER % "(8, 1, 700, 3)",
        _HEADER % "(True, 16, 16, 3)",
        _HEADER % "7",
        "{'descr': " + "(" * 3000 + ")" * 3000 + "}",
        "[1, 2",
        "\0\0",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4,)}",
        "{'descr': 'zzz', 'fortran_order': False, 'shape': (4,)}",
        "{'descr': '<U100000000000', 'fortran_order': False, 'shape': (4, 16, 16, 3)}",
    ],
)
def test_arrays_of_any_header_are_a_sentence(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.npy").write_bytes(array_header(header.encode()))
    with pytest.raises(InvalidOption, match=r"a\.npy") as caught:
        read_upload(tmp_path / "a.npy")
    assert str(tmp_path) not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", [OverflowError, TypeError, MemoryError, RecursionError, tokenize.TokenError])
def test_whatever_reading_an_array_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    def fails(*given: Any, **options: Any) -> None:
        raise kind("what the header holds")

    monkeypatch.setattr(uploads, "read_frames", fails)
    np.save(tmp_path / "a.npy", CLIP)
    with pytest.raises(InvalidOption, match=r"cannot read the array a\.npy"):
        read_upload(tmp_path / "a.npy")


def test_a_video_file_is_read() -> None:
    pytest.importorskip("av")
    [example] = [one for one in examples(drawn=0) if one.name == "a clip"]
    media = read_upload(example.source, frames=4)
    assert (media.kind, len(media.pictures), media.size) == ("video", 4, (128, 128))
    assert media.notes[0] == "4 of 64 frames are taken, evenly spread" and media.duration == pytest.approx(8)


def test_frames_too_large_are_refused_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    [example] = [one for one in examples(drawn=0) if one.name == "a clip"]
    monkeypatch.setattr(uploads, "MAX_FRAME", 100)
    with pytest.raises(InvalidOption, match="frames of 128 x 128 pixels"):
        read_upload(example.source)
