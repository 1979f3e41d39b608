"""Clips whose frames show their own number, in every shape that video files come in, and ways to break files."""

from __future__ import annotations

import functools
import math
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from vtprune.video.answering import Answerer, ClipAsked
from vtprune.video.frames import Frames
from vtprune.video.journal import Record

RATE = 30
ROWS, COLUMNS = 4, 5
_ROOT = tempfile.TemporaryDirectory(prefix="vtprune-clips-")
FOLDER = Path(_ROOT.name)


def picture(number: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A frame (H, W, 3) of white and black blocks: ten bits of the number, and then the same with colours swapped."""
    bits = [number >> place & 1 for place in range(ROWS * COLUMNS // 2)]
    blocks = np.array([*bits, *(1 - bit for bit in bits)]).reshape(ROWS, COLUMNS)
    rows, columns = np.arange(size[0]) * ROWS // size[0], np.arange(size[1]) * COLUMNS // size[1]
    grey = (blocks[rows][:, columns] * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def number_of(frame: np.ndarray) -> int | None:
    """The number that a frame shows, None where it is not one whole, upright picture."""
    grey = frame.mean(axis=2)
    means = [block[2:-2, 2:-2].mean() for row in _cut(grey, ROWS, 0) for block in _cut(row, COLUMNS, 1)]
    bits = [1 if mean > 170 else 0 if mean < 85 else None for mean in means]
    half = len(bits) // 2
    if None in bits or [1 - bit for bit in bits[:half]] != bits[half:]:
        return None
    return sum(bit << place for place, bit in enumerate(bits[:half]))


def _cut(array: np.ndarray, parts: int, axis: int) -> list[np.ndarray]:
    length = array.shape[axis]
    return np.split(array, [-(-part * length // parts) for part in range(1, parts)], axis=axis)


def uneven(count: int) -> tuple[int, ...]:
    """Times in milliseconds of a variable rate: from a hundredth to a tenth of a second apart."""
    steps = random.Random(0).choices([10, 33, 50, 100], k=count - 1)
    return tuple(np.cumsum([0, *steps]).tolist())


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a clip is made; `times` are milliseconds, where the rate is not constant."""

    frames: int = 60
    size: tuple[int, int] = (48, 64)
    codec: str = "libx264"
    pixels: str = "yuv420p"
    gop: int = 30
    between: int = 0
    times: tuple[int, ...] | None = None
    x264: str = ""
    mux: dict[str, str] = field(default_factory=dict)
    form: str | None = None
    """Format by name where the suffix does not tell."""

    @property
    def seconds(self) -> np.ndarray:
        """When frames are shown, counted from the first one."""
        if self.times is None:
            return np.arange(self.frames) / RATE
        return (np.array(self.times) - self.times[0]) / 1000


def write(path: Path, recipe: Recipe, draw: Callable[[int], np.ndarray] | None = None) -> Path:
    """Encode a clip with PyAV."""
    import av

    unit = Fraction(1, RATE) if recipe.times is None else Fraction(1, 1000)
    draw = draw or (lambda number: picture(number, recipe.size))
    with av.open(str(path), "w", format=recipe.form, options=recipe.mux) as container:
        stream = container.add_stream(recipe.codec, rate=RATE)
        stream.height, stream.width = draw(0).shape[:2]
        stream.pix_fmt = recipe.pixels
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = recipe.gop, recipe.between
        stream.codec_context.time_base = unit
        stream.options = _options(recipe)
        for number in range(recipe.frames):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            frame.pts, frame.time_base = number if recipe.times is None else recipe.times[number], unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _options(recipe: Recipe) -> dict[str, str]:
    if recipe.codec == "libx264":
        # Blocks that change all over look like cuts, and would make every group short.
        return {"preset": "veryfast", "b-adapt": "0", "x264-params": f"scenecut=0:log-level=none:{recipe.x264}"}
    if recipe.codec == "libx265":
        return {"preset": "ultrafast", "x265-params": "log-level=none:scenecut=0:open-gop=1"}
    return {"deadline": "realtime", "cpu-used": "8"} if recipe.codec.startswith("libvpx") else {}


RECIPES = {
    "even.mp4": Recipe(),
    "every-frame-a-key.mp4": Recipe(gop=1),
    "one-key.mp4": Recipe(gop=250, between=2),
    "pyramid.mp4": Recipe(gop=20, between=3, x264="b-pyramid=normal"),
    "uneven.mp4": Recipe(gop=20, between=3, times=uneven(60)),
    "uneven.mkv": Recipe(gop=20, between=3, times=uneven(60)),
    "late.mp4": Recipe(gop=20, between=3, times=tuple(500 + time for time in uneven(60))),
    "late.mkv": Recipe(gop=20, between=3, times=tuple(500 + time for time in uneven(60))),
    "open-groups.mp4": Recipe(gop=10, between=3, x264="open-gop=1"),
    "open-groups.mkv": Recipe(gop=10, between=3, x264="open-gop=1"),
    "refreshed.mp4": Recipe(gop=10, x264="intra-refresh=1"),
    "transport.ts": Recipe(gop=20, between=3),
    "open-groups.ts": Recipe(gop=10, between=3, x264="open-gop=1"),
    "refreshed.ts": Recipe(gop=10, x264="intra-refresh=1"),
    "fragments.mp4": Recipe(gop=20, between=3, mux={"movflags": "frag_keyframe+empty_moov"}),
    "flash.flv": Recipe(gop=20, between=3),
    "mpeg4.mp4": Recipe(codec="mpeg4", gop=12, between=2),
    "mpeg4.avi": Recipe(codec="mpeg4", gop=12, between=2),
    "mpeg2.ts": Recipe(codec="mpeg2video", gop=12, between=2),
    "program.mpg": Recipe(codec="mpeg2video", gop=12, between=2),
    "stream.h264": Recipe(gop=20, between=2, form="h264"),
    "hevc.mp4": Recipe(codec="libx265", gop=10, between=3),
    "vp8.webm": Recipe(codec="libvpx", gop=20),
    "vp9.webm": Recipe(codec="libvpx-vp9", gop=20),
    "lossless.mkv": Recipe(codec="ffv1", gop=1),
    "deep.mp4": Recipe(pixels="yuv420p10le"),
    "odd.mp4": Recipe(pixels="yuv444p", size=(49, 67)),
    "odd.webm": Recipe(codec="libvpx-vp9", size=(49, 67)),
    "single.mp4": Recipe(frames=1),
}
UNTIMED = ("stream.h264",)
"""Files that do not say when frames are shown."""


@functools.cache
def clip(name: str) -> Path:
    """The file of a recipe, or of one of the names below."""
    path = FOLDER / name
    if name in RECIPES:
        return write(path, RECIPES[name])
    path.write_bytes(_DERIVED[name]())
    return path


@functools.cache
def slow_clip() -> Path:
    """A clip that takes seconds to read: large, and of AVI every frame is decoded to be counted before any is taken."""
    import av

    path = FOLDER / "slow.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 2000, 3000, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(picture(3, (2000, 3000)), format="rgb24")
        (data,) = [bytes(packet) for packet in [*stream.encode(frame), *stream.encode()]]
        for number in range(300):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, RATE)
            container.mux(packet)
    return path


def boxes(data: bytes, names: list[bytes], start: int = 0, stop: int | None = None) -> Iterator[int]:
    """Where boxes of that path begin in an MP4 file."""
    stop = len(data) if stop is None else stop
    while start + 8 <= stop:
        size, name = struct.unpack_from(">I4s", data, start)
        if name == names[0]:
            yield from [start] if len(names) == 1 else boxes(data, names[1:], start + 8, start + size)
        start += size


def turned(data: bytes, degrees: int, *, mirrored: bool = False) -> bytes:
    """An MP4 whose frames are to be turned right by so many degrees when they are shown, after mirroring them."""
    cos, sin = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    sign = -1 if mirrored else 1
    matrix = [sign * cos, sign * sin, 0, -sin, cos, 0, 0, 0, 1 << 14]
    found = bytearray(data)
    for box in boxes(data, [b"moov", b"trak", b"tkhd"]):
        struct.pack_into(">9i", found, box + 48, *(entry << 16 for entry in matrix))
    return bytes(found)


def edited(data: bytes, *, skip: int, length: int) -> bytes:
    """An MP4 that shows `length` milliseconds only, from `skip` units of the stream after the beginning on."""
    found = bytearray(data)
    for box in boxes(data, [b"moov", b"trak", b"edts", b"elst"]):
        begins = struct.unpack_from(">i", data, box + 20)[0]
        struct.pack_into(">Ii", found, box + 16, length, begins + skip)
    return bytes(found)


def _fast() -> bytes:
    recipe = Recipe(gop=20, between=3, mux={"movflags": "faststart"})
    return write(FOLDER / "_fast.mp4", recipe).read_bytes()


def _upright(degrees: int, mirrored: bool) -> bytes:
    """A clip stored lying, that shows upright numbers when it is turned as it says."""

    def draw(number: int) -> np.ndarray:
        lying = np.rot90(picture(number), k=degrees // 90)
        return np.ascontiguousarray(lying[:, ::-1] if mirrored else lying)

    stored = write(FOLDER / "_stored.mp4", Recipe(between=2), draw)
    return turned(stored.read_bytes(), degrees, mirrored=mirrored)


def first_part(data: bytes, share: float) -> bytes:
    """What is left of a file that was cut off."""
    return data[: int(len(data) * share)]


def last_part(data: bytes, share: float) -> bytes:
    """What is left of an MPEG-TS when its first packets, of 188 bytes, are lost."""
    return data[-int(len(data) // 188 * share) * 188 :]


EDITED = {"edited.mp4": range(17, 47), "edited-late.mp4": range(37, 52)}
"""The frames that are left in files with edit lists: 30 and 15 of the 60."""
UPRIGHT = ("right.mp4", "upside-down.mp4", "left.mp4")
_DERIVED: dict[str, Callable[[], bytes]] = {
    "edited.mp4": lambda: edited(clip("pyramid.mp4").read_bytes(), skip=512 * 17, length=1000),
    "edited-late.mp4": lambda: edited(clip("pyramid.mp4").read_bytes(), skip=512 * 36 + 100, length=500),
    "right.mp4": lambda: _upright(90, False),
    "upside-down.mp4": lambda: _upright(180, False),
    "left.mp4": lambda: _upright(270, False),
    "mirrored.mp4": lambda: _upright(0, True),
    "mirrored-right.mp4": lambda: _upright(90, True),
    "fast.mp4": _fast,
    "cut-fast.mp4": lambda: first_part(_fast(), 0.6),
    "cut-slow.mp4": lambda: first_part(clip("pyramid.mp4").read_bytes(), 0.6),
    "cut.mkv": lambda: first_part(clip("uneven.mkv").read_bytes(), 0.6),
    "no-beginning.ts": lambda: last_part(clip("open-groups.ts").read_bytes(), 0.7),
    "no-key-first.ts": lambda: last_part(clip("transport.ts").read_bytes(), 0.7),
    "cut.ts": lambda: first_part(clip("transport.ts").read_bytes(), 0.6),
    "empty.mp4": lambda: b"",
    "text.mp4": lambda: b"this is no video\n" * 100,
}


def numbers(found: Frames) -> list[int | None]:
    """What frames show."""
    return [number_of(frame) for frame in found.pixels]


def subsets(count: int) -> list[list[int]]:
    """Some requests in an order that goes back and forth."""
    rng = random.Random(count)
    return [sorted(rng.sample(range(count), min(count, rng.randint(1, 4)))) for _ in range(20)]


def answers(answer: Answerer, clips: list[ClipAsked]) -> list[Record]:
    """All records, in the order of the questions."""
    place = {question.id: number for number, question in enumerate(q for clip in clips for q in clip.questions)}
    found = [record for records in answer(clips) for record in records]
    return sorted(found, key=lambda record: place[record.id])


def known(records: list[Record]) -> list[Record]:
    """Without what depends on the clock."""
    return [replace(record, seconds={}) for record in records]
