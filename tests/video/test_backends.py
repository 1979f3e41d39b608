"""All backends give the same frames or refuse a file, and "auto" chooses among them."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.video.common import EDITED, FOLDER, RECIPES, UPRIGHT, Recipe, clip, subsets, write
from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.video import reader
from vtprune.video.frames import Video
from vtprune.video.read_pyav import PyavVideo
from vtprune.video.reader import AUTO, BACKENDS, open_video, prepare, read_frames
from vtprune.video.sampling import Scenes, Uniform

pytest.importorskip("av")
ALL = Uniform(1000)
OTHERS = ("decord", "torchcodec")
SURE = (
    "even.mp4",
    "pyramid.mp4",
    "uneven.mp4",
    "uneven.mkv",
    "late.mp4",
    "late.mkv",
    "one-key.mp4",
    "every-frame-a-key.mp4",
)
SURE += ("hevc.mp4", "vp9.webm", "deep.mp4", "odd.mp4", "odd.webm", "lossless.mkv", "upside-down.mp4")
"""Files that every backend must read; others they may refuse, but never read wrongly."""


def needs(backend: str) -> None:
    obstacle = prepare(backend)
    if obstacle:
        pytest.skip(f"{backend}: {obstacle}")


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("name", [*RECIPES, *EDITED, *UPRIGHT])
def test_backends_agree_or_refuse(name: str, backend: str) -> None:
    needs(backend)
    expected = read_frames(clip(name), ALL, backend="pyav")
    try:
        with closing(open_video(clip(name), backend=backend)) as video:
            assert len(video.times) == expected.total
            np.testing.assert_allclose(video.times, expected.times, atol=1e-4)
            for indices in [list(range(expected.total)), *subsets(expected.total)]:
                for index, pixels in video.frames(indices):
                    assert np.abs(pixels.astype(int) - expected.pixels[index]).mean() < 2
    except (BackendUnavailable, InvalidOption):
        assert name not in SURE


@pytest.mark.parametrize("backend", OTHERS)
def test_backends_choose_the_same_frames(backend: str) -> None:
    """But where the rate varies decord is not told how long MP4 shows the last frame, so it may choose a neighbour."""
    needs(backend)
    for name in SURE:
        if (backend, name) in (("decord", "uneven.mp4"), ("decord", "late.mp4")):
            continue
        for sampling in (Uniform(7), Scenes(5)):
            expected = read_frames(clip(name), sampling).indices
            assert read_frames(clip(name), sampling, backend=backend).indices.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("edited.mp4", "decord"),
        ("transport.ts", "decord"),
        ("edited.mp4", "torchcodec"),
        ("mirrored.mp4", "torchcodec"),
        ("refreshed.mp4", "torchcodec"),
        ("stream.h264", "torchcodec"),
    ],
)
def test_a_backend_that_would_give_wrong_frames_refuses(name: str, backend: str) -> None:
    needs(backend)
    with pytest.raises(BackendUnavailable, match="use backend='pyav'"):
        read_frames(clip(name), ALL, backend=backend)


def test_colours_are_red_green_and_blue() -> None:
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[..., 0] = 255
    path = write(FOLDER / "red.mp4", Recipe(frames=3, pixels="yuv444p"), lambda number: red)
    for backend in BACKENDS:
        if not prepare(backend):
            pixels = read_frames(path, Uniform(1), backend=backend).pixels.astype(int)
            assert np.abs(pixels[0] - red).max() < 8


def test_an_absent_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip("even.mp4")
    for backend, package in (("pyav", "av"), ("decord", "decord"), ("torchcodec", "torchcodec.decoders")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(BackendUnavailable, match=r"pip install 'vtprune\[video\]'"):
                read_frames(path, ALL, backend=backend)
    for package in ("av", "decord"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailable, match=r"no video backend .*pip install 'vtprune\[video\]'"):
        read_frames(path, ALL)
    assert len(read_frames(np.zeros((3, 4, 4, 3), dtype=np.uint8), ALL).indices) == 3


def test_auto_takes_the_next_backend_and_tells_what_each_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opener(name: str, works: bool) -> Any:
        def opened(path: Path) -> Video:
            asked.append(name)
            if works:
                return PyavVideo(path)
            raise InvalidOption(f"{path.name} is not for me")

        return opened

    monkeypatch.setattr(reader, "prepare", lambda backend: "")
    monkeypatch.setattr(reader, "_OPENERS", {AUTO[0]: opener("first", False), AUTO[1]: opener("second", True)})
    assert len(read_frames(clip("even.mp4"), Uniform(2)).indices) == 2
    assert asked == ["first", "second"]
    monkeypatch.setattr(reader, "_OPENERS", {name: opener(name, False) for name in AUTO})
    with pytest.raises(InvalidOption, match=r"pyav: even\.mp4 is not for me; decord: even\.mp4 is not for me"):
        read_frames(clip("even.mp4"), Uniform(2))
