"""Damage inside of a file is told: frames that lean on what cannot be decoded are not taken for good ones."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.video.common import (
    EDITED,
    FOLDER,
    RECIPES,
    UPRIGHT,
    Recipe,
    clip,
    first_part,
    numbers,
    picture,
    subsets,
    write,
)
from vtprune.errors import InvalidOption
from vtprune.video.frames import Frames, Video
from vtprune.video.reader import open_video, prepare, read_frames
from vtprune.video.sampling import Sampling, Uniform
from vtprune.video.structure import ENDS, broken_structure

pytest.importorskip("av")
CUT = ("no-beginning.ts", "no-key-first.ts", "cut.ts", "cut.mkv")


@dataclass(frozen=True)
class These(Sampling):
    """Frames by number."""

    indices: tuple[int, ...]

    def choose(self, video: Video) -> np.ndarray:
        return np.array(self.indices)


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def tail_zeros(data: bytes) -> bytes:
    return data[:40] + bytes(len(data) - 40)


def with_damage(path: Path, packet: int, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a file, one packet of which is changed."""
    import av

    with av.open(str(path)) as container:
        pos, size = [(found.pos, found.size) for found in container.demux(video=0) if found.size][packet]
    data = path.read_bytes()
    copy = FOLDER / f"{change.__name__}-{packet}-{path.name}"
    copy.write_bytes(data[:pos] + change(data[pos : pos + size]) + data[pos + size :])
    return copy


def told(path: Path, sampling: Sampling) -> Frames:
    """Frames with a warning; where reading is strict they are an error."""
    with pytest.raises(InvalidOption, match=r"damage|ends early"):
        read_frames(path, sampling, on_truncated="raise")
    found = read_frames(path, sampling)
    assert any("damage" in text or "ends early" in text for text in found.warnings)
    return found


def test_frames_behind_a_lost_packet_are_told() -> None:
    """The scene changes in the packet that is lost, and there is one key frame only."""
    path = write(FOLDER / "scenes.mp4", Recipe(gop=250), lambda number: picture(1 if number < 10 else 2))
    assert read_frames(path, Uniform(4), on_truncated="raise").warnings == ()
    found = told(with_damage(path, 10, zeros), Uniform(4))
    assert numbers(found) == [1, 1, 1, 1]
    assert "3 of 4 frames asked for may show damage" in found.warnings[-1]
    before = read_frames(with_damage(path, 10, zeros), These((1, 5, 9)), on_truncated="raise")
    assert (numbers(before), before.warnings) == ([1, 1, 1], ())


def test_frames_up_to_the_next_key_frame_are_told_whatever_is_asked_first() -> None:
    path = with_damage(clip("even.mp4"), 3, zeros)
    found = told(path, These(tuple(number for number in range(60) if number != 3)))
    assert numbers(found)[30:] == list(range(31, 60))
    assert "26 of 59 frames asked for may show damage" in found.warnings[-1]
    with closing(open_video(path)) as video:
        for indices in ([40, 50], [20, 45], [2], [5, 6]):
            got = [index for index, _ in video.frames(indices)]
            assert got == indices
            assert video.doubtful(got) == [index for index in indices if 3 < index < 30]


def test_a_frame_that_leans_on_a_later_one_is_told() -> None:
    """The packet of frame 3 is stored before that of frame 2, and shown after it."""
    import av

    path = write(FOLDER / "leaning.mp4", Recipe(frames=20, gop=20, between=2))
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stamps[2] > stamps[3]
    assert "1 of 1" in told(with_damage(path, 2, zeros), These((2,))).warnings[-1]
    assert "1 of 1" in told(with_damage(path, 2, tail_zeros), These((2,))).warnings[-1]


@pytest.mark.parametrize("name", [*RECIPES, *EDITED, *UPRIGHT, *CUT])
def test_nothing_is_told_of_whole_frames_in_any_order(name: str) -> None:
    with closing(open_video(clip(name), backend="pyav")) as video:
        for indices in [*subsets(len(video.times)), range(len(video.times))]:
            got = [index for index, _ in video.frames(indices)]
            assert (got, video.doubtful(got)) == (list(indices), [])
        assert video.damage == "" or name in CUT


@pytest.mark.parametrize("name", ["mpeg4.avi", "mpeg4.mp4", "vp9.webm", "vp8.webm", "lossless.mkv", "flash.flv"])
def test_a_lost_packet_is_told_in_every_container(name: str) -> None:
    told(with_damage(clip(name), 3, tail_zeros if name == "mpeg4.avi" else zeros), Uniform(60))


@pytest.mark.parametrize("name", ["uneven.mkv", "lossless.mkv"])
def test_a_checksum_tells_of_every_bit(name: str) -> None:
    """As FFmpeg writes them to Matroska; WebM has none."""
    data, rng = clip(name).read_bytes(), random.Random(0)
    clusters = data.find(b"\x1f\x43\xb6\x75")
    assert broken_structure(clip(name)) == ""
    path = FOLDER / f"bit-{name}"
    for _ in range(50):
        found = bytearray(data)
        found[rng.randrange(clusters, data.rfind(b"\x1c\x53\xbb\x6b"))] ^= 1 << rng.randrange(8)
        path.write_bytes(found)
        assert broken_structure(path) != ""


def test_a_recording_without_lengths_is_whole(tmp_path: Path) -> None:
    """Browsers and broadcasts write segments and clusters before they know how long these become."""
    path = write(tmp_path / "live.webm", Recipe(codec="libvpx", mux={"live": "1"}))
    assert b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" in path.read_bytes()
    assert broken_structure(path) == ""
    path.write_bytes(path.read_bytes()[:-9])
    assert "ends early" in broken_structure(path)


@pytest.mark.parametrize("name", ["mpeg4.avi", "flash.flv", "vp9.webm", "vp8.webm", "uneven.mkv"])
def test_a_file_that_was_cut_is_told(name: str, tmp_path: Path) -> None:
    told_of = 0
    for share in range(40, 90, 6):
        path = tmp_path / f"{share}-{name}"
        path.write_bytes(first_part(clip(name).read_bytes(), share / 100))
        try:
            found = read_frames(path, Uniform(2))
        except InvalidOption:
            continue
        told_of += 1
        assert any("ends early" in text or "damage" in text for text in found.warnings), share
        with pytest.raises(InvalidOption, match=r"ends early|damage"):
            read_frames(path, Uniform(2), on_truncated="raise")
    assert told_of >= 4


def test_a_cut_between_tags_is_told_by_what_the_head_promises(tmp_path: Path) -> None:
    data, place = clip("flash.flv").read_bytes(), 13
    while place < len(data) // 2:
        place += 11 + int.from_bytes(data[place + 1 : place + 4], "big") + 4
    path = tmp_path / "tags.flv"
    path.write_bytes(data[:place])
    assert broken_structure(path) == ENDS
    assert ENDS in read_frames(path, Uniform(2)).warnings[0]


def test_of_fragments_nobody_knows_how_many_there_were(tmp_path: Path) -> None:
    """Cut in the middle of the pictures of one: between two of them nothing would be told."""
    path, data = tmp_path / "fragments.mp4", clip("fragments.mp4").read_bytes()
    _, second, third = [found.start() - 4 for found in re.finditer(b"moof", data)]
    pictures = second + int.from_bytes(data[second : second + 4], "big")
    path.write_bytes(data[: (pictures + third) // 2])
    (text,) = read_frames(path, Uniform(2)).warnings
    assert text.startswith("the file ends early: ") and " of " not in text


def test_decord_tells_what_the_structure_does() -> None:
    if prepare("decord"):
        pytest.skip("no decord")
    path = FOLDER / "cut-decord.mkv"
    path.write_bytes(first_part(clip("uneven.mkv").read_bytes(), 0.7))
    try:
        found = read_frames(path, Uniform(2), backend="decord")
    except InvalidOption:
        return
    assert any("ends early" in text for text in found.warnings)


def test_the_length_behind_the_last_tag_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "lengths.flv"
    path.write_bytes(clip("flash.flv").read_bytes()[:-4])
    assert broken_structure(path) == ""
    assert numbers(read_frames(path, Uniform(60), on_truncated="raise")) == list(range(60))
