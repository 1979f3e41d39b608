"""Video by decord, read strictly from front to back: its seeking gives other frames than asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.video.frames import check_size
from vtprune.video.structure import broken_structure

logger = logging.getLogger("vtprune")
_NO_REPEATS = 1e-9
"""Share of frames that decord may replace by their neighbours, which it does without a word; 0 would be no limit."""


class DecordVideo:
    """A video file opened by decord 0.6.

    With B-frames, open groups of pictures, HEVC or AVI decord finds wrong frames by index and by skipping. In order it
    finds the right ones, so every frame up to the last one that is asked for is decoded. It cannot tell that a picture
    is to be mirrored.

    Raises:
        BackendUnavailable: for a file whose frames or times decord gets wrong.
        InvalidOption: for a file that it cannot open.
    """

    backend = "decord"
    warnings = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        self.damage = broken_structure(path)
        self._held: np.ndarray | None = None
        if _is_transport_stream(path):
            raise BackendUnavailable(f"decord loses the first frames of MPEG-TS, like {path}: use backend='pyav'")
        self._open()
        first = self._next()
        if first is None:
            raise InvalidOption(f"no frame of {path} can be decoded by decord: the file is empty, truncated or damaged")
        self._held, self._at = first, 0
        self.size = first.shape[:2]
        check_size(str(path), self.size)
        spans = np.asarray(self._reader.get_frame_timestamp(list(range(len(self._reader)))), dtype=np.float64)
        starts, steps = spans[:, 0], np.diff(spans[:, 0])
        # Narrow frames that were turned come as four channels of rubbish; what an edit list cuts off begins before 0.
        if first.shape[2] != 3 or not np.isfinite(starts).all() or starts[0] < 0 or (steps <= 0).any():
            raise BackendUnavailable(f"decord gives wrong frames or times for {path}: use backend='pyav'")
        self.times = starts - starts[0]
        last = spans[-1, 1] - starts[-1]
        if last <= 0 and len(steps):
            last = np.median(steps)
        self.duration = float(self.times[-1] + last)

    def _open(self) -> None:
        import decord

        try:
            self._reader: Any = decord.VideoReader(str(self._path), ctx=decord.cpu(0), fault_tol=_NO_REPEATS)
        except _errors() as error:
            raise InvalidOption(f"decord cannot read {self._path} as video: {_line(error)}") from error
        self._held, self._at = None, 0

    def _next(self) -> np.ndarray | None:
        """Frame number `_at` (H, W, 3), None at the end and where it cannot be decoded."""
        self._at += 1
        if self._held is not None:
            frame, self._held = self._held, None
            return frame
        try:
            return self._reader.next().asnumpy()
        except StopIteration:
            return None
        except _errors() as error:
            logger.debug("%s cannot be read on by decord: %s", self._path, error)
            return None

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """See `vtprune.video.frames.Video`."""
        for index in indices:
            if index < self._at:
                self._open()
            while (frame := self._next()) is not None and self._at <= index:
                continue
            if frame is None:
                return
            yield int(index), frame

    def doubtful(self, indices: Sequence[int] | np.ndarray) -> list[int]:
        """None: decord does not tell which frames lean on damage."""
        return []

    def close(self) -> None:
        """Let go of the file."""
        self._reader = self._held = None


def _is_transport_stream(path: Path) -> bool:
    """Told by the byte that each packet of 188 begins with; recordings on discs put 4 bytes before each."""
    with path.open("rb") as file:
        head = file.read(197)
    return any(head[at : at + 1] == head[at + step : at + step + 1] == b"G" for at, step in ((0, 188), (4, 192)))


def _errors() -> tuple[type[Exception], ...]:
    """What decord raises, but for the end of a video."""
    import decord

    return decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError


def _line(error: Exception) -> str:
    """What decord says, without its place in the source and the stack."""
    return (str(error).splitlines() or [type(error).__name__])[0].split("] ")[-1]
