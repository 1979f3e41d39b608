"""Video by PyAV: exact to the frame, and seeking only where that saves decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtprune.errors import InvalidOption
from vtprune.video.finders import Counted, Finder, Stamped
from vtprune.video.packets import index_packets
from vtprune.video.structure import broken_structure
from vtprune.video.tape import Tape


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
            self._finder: Finder = Counted(self._tape) if index is None else Stamped(self._tape, index)
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
        self.damage = self._finder.damage or broken_structure(path)
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

    def doubtful(self, indices: Sequence[int] | np.ndarray) -> list[int]:
        """See `vtprune.video.frames.Video`."""
        return [int(index) for index in indices if self._finder.doubts(int(index))]

    def _pixels(self, frame: Any) -> np.ndarray:
        height, width = self._stored
        pixels = frame.to_ndarray(format="rgb24", height=height, width=width)
        return np.rot90(pixels[:, ::-1] if self._mirrored else pixels, k=-self._turns)

    def close(self) -> None:
        """Let go of the file."""
        self._tape.close()


def turned(frame: Any) -> tuple[int, bool]:
    """How often a frame is to be turned right by 90 degrees to be upright, and whether it is to be mirrored first."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].astype(float)
    mirrored = bool(a * d - b * c < 0)
    angle = math.atan2(-b, -a) if mirrored else math.atan2(b, a)
    return round(angle / (math.pi / 2)) % 4, mirrored
