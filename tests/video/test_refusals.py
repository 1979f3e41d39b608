"""What cannot be read is refused by an error that names the file and what is wrong with it."""

from __future__ import annotations

import os
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.video.common import FOLDER, clip, numbers, picture
from vtprune.errors import InvalidOption
from vtprune.tiny.bundled_clip import CLIP
from vtprune.video import frames
from vtprune.video.reader import prepare, read_frames
from vtprune.video.sampling import Uniform

pytest.importorskip("av")
ALL = Uniform(1000)


def sound(path: Path, *, cover: bool = False) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        picture_stream = container.add_stream("mjpeg", rate=1) if cover else None
        if picture_stream is not None:
            picture_stream.width, picture_stream.height, picture_stream.pix_fmt = 64, 48, "yuvj420p"
            picture_stream.disposition = av.stream.Disposition.attached_pic
        for number in range(8):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts, silence.time_base = 8000, number * 1024, Fraction(1, 8000)
            container.mux(stream.encode(silence))
        if picture_stream is not None:
            container.mux(picture_stream.encode(av.VideoFrame.from_ndarray(picture(3), format="rgb24")))
            container.mux(picture_stream.encode())
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("cover", [False, True])
def test_sound_is_no_video_even_with_a_cover(cover: bool) -> None:
    path = sound(FOLDER / f"sound-{cover}.mp4", cover=cover)
    with pytest.raises(InvalidOption, match=r"sound-.*\.mp4 holds no video, only sound"):
        read_frames(path, Uniform(1))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000), file.writeframes(bytes(1600))
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "bad.npy").write_bytes(b"no array")
    for path, text in (
        (tmp_path / "missing.mp4", "no video at .*missing.mp4"),
        ("http://example.org/a.mp4", "on this machine"),
        (tmp_path / "pipe.mp4", "pipe.mp4 is not a file"),
        (clip("empty.mp4"), "empty.mp4 is empty"),
        (clip("text.mp4"), "cannot read .*text.mp4 as video"),
        (clip("cut-slow.mp4"), "cannot read .*cut-slow.mp4 as video"),
        (tmp_path / "a.wav", "a.wav holds no video, only sound"),
        (tmp_path / "nothing", "nothing holds no pictures"),
        (tmp_path / "bad.npy", "cannot read the array .*bad.npy"),
        (tmp_path / ("x" * 300), "cannot read"),
    ):
        with pytest.raises(InvalidOption, match=text):
            read_frames(path, Uniform(1))


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
@pytest.mark.parametrize("head", ["#EXTM3U\n#EXTINF:1,\n", "ffconcat version 1.0\nfile ", "\ufeff <?xml ?><MPD>"])
def test_a_list_of_other_files_is_not_followed(tmp_path: Path, backend: str, head: str) -> None:
    """FFmpeg would open what it names, outside of the directory that was given too."""
    path = tmp_path / "list.mp4"
    path.write_text(f"{head}{CLIP}\n")
    with pytest.raises(InvalidOption, match="is a list of other files"):
        read_frames(path, Uniform(2), backend=backend)


def test_a_file_without_frames_is_no_video(tmp_path: Path) -> None:
    data = clip("fast.mp4").read_bytes()
    headless = data[: data.find(b"mdat") + 4]
    (tmp_path / "none.mp4").write_bytes(headless)
    with pytest.raises(InvalidOption, match=r"no frame of .*none\.mp4 can be decoded"):
        read_frames(tmp_path / "none.mp4", Uniform(1))


def test_wrong_arguments_are_named() -> None:
    path = clip("even.mp4")
    calls: list[tuple[str, dict[str, Any]]] = [
        ("backend='vlc': expected 'auto' or one of pyav, decord, torchcodec", {"backend": "vlc"}),
        ("on_truncated='ignore': expected 'warn' or 'raise'", {"on_truncated": "ignore"}),
        ("rate=0: expected a number above 0", {"rate": 0}),
        ("even.mp4 says itself when frames are shown", {"rate": 2.0}),
        ("sampling=8: expected a value like", {"sampling": 8}),
        ("timeout=-1: expected seconds above 0", {"timeout": -1}),
    ]
    for text, arguments in calls:
        with pytest.raises(InvalidOption, match=text):
            read_frames(path, **{"sampling": ALL, **arguments})
    with pytest.raises(InvalidOption, match="a clip of type int"):
        read_frames(7, ALL)


def test_too_much_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_BYTES", 48 * 64 * 3 * 10)
    assert len(read_frames(clip("even.mp4"), Uniform(10)).indices) == 10
    with pytest.raises(InvalidOption, match="ask for fewer frames"):
        read_frames(clip("even.mp4"), Uniform(11))
    monkeypatch.setattr(frames, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(InvalidOption, match="scale it down first"):
        read_frames(clip("even.mp4"), Uniform(1))


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
def test_a_name_is_not_a_pattern_of_names(tmp_path: Path, backend: str) -> None:
    """FFmpeg takes x%d.png for x0.png, x1.png and so on."""
    if backend == "decord" and prepare(backend):
        pytest.skip("no decord")
    for number in range(5):
        Image.fromarray(picture(number)).save(tmp_path / f"x{number}.png")
    Image.fromarray(picture(77)).save(tmp_path / "x%d.png")
    if backend == "decord":
        with pytest.raises(InvalidOption, match="leave % out of the name"):
            read_frames(tmp_path / "x%d.png", ALL, backend=backend)
    else:
        assert numbers(read_frames(tmp_path / "x%d.png", ALL, backend=backend)) == [77]
