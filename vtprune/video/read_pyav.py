"""Video by PyAV: exact to the frame, and seeking only where that saves decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vtprune.errors import InvalidOption
from vtprune.video.packets import PacketIndex, damage, index_packets
from vtprune.video.tape import Tape

SEEK_FRAMES = 16
"""A seek that saves fewer frames than that saves no time: the threads of the decoder have to be filled again."""
_ASSUMED_RATE = 25.0


class PyavVideo:
    """A video file opened by PyAV.

    Frames are found by when they are shown, as an index of all packets tells; where the packets do not tell, all frames
    are decoded and counted when the file is opened.

    Raises:
        InvalidOption: for a file without video, or without a frame that can be decoded.
    """

    backend = "pyav"

    def __init__(self, path: Path) -> None:
        self._tape = Tape(path)
        try:
            index = index_packets(self._tape.packets(), self._tape.stream)
            self._finder: _Finder = _Counted(self._tape) if index is None else _Stamped(self._tape, index)
            first = self._finder.first
            if first is None:
                raise InvalidOption(f"no frame of {path} can be decoded: the file is empty, truncated or damaged")
        except BaseException:
            self._tape.close()
            raise
        self._stored = (first.height, first.width)
        self._turns, self._mirrored = turned(first)
        self.size = self._stored[::-1] if self._turns % 2 else self._stored
        self.times = self._finder.times
        self.duration = self._finder.duration
        self.damage = self._finder.damage
        self.warnings = self._finder.warnings

    @property
    def decoded(self) -> int:
        """How many frames were decoded so far."""
        return self._tape.decoded

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """See `vtprune.video.frames.Video`."""
        for index in indices:
            frame = self._finder.find(int(index))
            if frame is not None:
                yield int(index), self._pixels(frame)

    def _pixels(self, frame: Any) -> np.ndarray:
        height, width = self._stored
        pixels = frame.to_ndarray(format="rgb24", height=height, width=width)
        return np.rot90(pixels[:, ::-1] if self._mirrored else pixels, k=-self._turns)

    def close(self) -> None:
        """Let go of the file."""
        self._tape.close()


class _Finder(Protocol):
    times: np.ndarray
    duration: float
    damage: str
    warnings: tuple[str, ...]
    first: Any

    def find(self, index: int) -> Any:
        """The frame of that index, None where it cannot be decoded."""
        ...


class _Stamped:
    """Frames by the stamps of their packets."""

    def __init__(self, tape: Tape, index: PacketIndex) -> None:
        self._tape, self._index = tape, index
        self._since = 0
        self._passed = -math.inf
        self.damage = damage(index, tape.stream)
        self.warnings: tuple[str, ...] = ()
        tape.rewind()
        self.first = self._next()
        if self.first is None:
            tape.rewind(careful=True)
            self.first = self._next()
        if self.first is not None:
            tape.put_back(self.first)
            self._index = index.beginning_with(self.first.pts)
        self.times, self.duration = self._index.times, self._index.duration

    def find(self, index: int) -> Any:
        stamp = int(self._index.stamps[self._index.shown[index]])
        key = self._index.key_of(index)
        if stamp <= self._passed or key - self._tape.at > SEEK_FRAMES:
            self._wind(key)
        frame = self._reach(stamp)
        if frame is None and (self._since == key > 0 or not self._tape.careful):
            # Some streams need more than the last key frame, and say so only by leaving frames out.
            self._tape.rewind(careful=True)
            self._wind(self._index.key_before(key))
            frame = self._reach(stamp)
        return frame

    def _wind(self, key: int) -> None:
        self._tape.wind(key, self._index)
        self._since, self._passed = key, -math.inf

    def _reach(self, stamp: int) -> Any:
        """The frame of that stamp, if it comes; the first one behind it stays on the tape."""
        while (frame := self._next()) is not None:
            if frame.pts > stamp:
                self._tape.put_back(frame)
                return None
            self._passed = frame.pts
            if frame.pts == stamp:
                return frame
        return None

    def _next(self) -> Any:
        """The next whole frame that has a stamp."""
        while (frame := self._tape.next()) is not None and (frame.is_corrupt or frame.pts is None):
            continue
        return frame


class _Counted:
    """Frames by counting what the decoder gives."""

    damage = ""

    def __init__(self, tape: Tape) -> None:
        tape.rewind(careful=True)
        self._tape = tape
        self.first = None
        stamps = []
        while (frame := tape.next()) is not None:
            if self.first is None and not frame.is_corrupt:
                self.first = frame
            stamps.append(frame.pts)
        self._next = len(stamps)
        self.times, self.warnings = _times_of(stamps, tape.stream)
        self.duration = float(self.times[-1] + np.median(np.diff(self.times))) if len(stamps) > 1 else 0.0

    def find(self, index: int) -> Any:
        if index < self._next:
            self._tape.rewind()
            self._next = 0
        while (frame := self._tape.next()) is not None:
            self._next += 1
            if self._next > index:
                return None if frame.is_corrupt else frame
        return None


def _times_of(stamps: list[int | None], stream: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Seconds (T,) of counted frames: as they say, or by the rate of the stream where they do not say or contradict."""
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) == len(stamps) and all(a < b for a, b in pairwise(known)):
        return (np.asarray(known, dtype=np.float64) - (known or [0])[0]) * float(stream.time_base), ()
    rate = float(stream.average_rate or stream.guessed_rate or _ASSUMED_RATE)
    return np.arange(len(stamps)) / rate, (f"the file does not say when frames are shown: {rate:g} a second assumed",)


def turned(frame: Any) -> tuple[int, bool]:
    """How often a frame is to be turned right by 90 degrees to be upright, and whether it is to be mirrored first."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].astype(float)
    mirrored = bool(a * d - b * c < 0)
    angle = math.atan2(-b, -a) if mirrored else math.atan2(b, a)
    return round(angle / (math.pi / 2)) % 4, mirrored
