"""Video by torchcodec: it decodes, and the index of PyAV says which frame is which."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.video.packets import damage, index_packets
from vtprune.video.read_pyav import turned
from vtprune.video.structure import broken_structure
from vtprune.video.tape import Tape, reason

logger = logging.getLogger("vtprune")
_NEAR = 1e-4
"""Seconds by which torchcodec and the index may differ on when a frame is shown."""


class TorchcodecVideo:
    """A video file opened by torchcodec.

    It does not tell when its frames are shown before they are decoded. In MPEG-TS and AVI, after edit lists and where
    the picture is refreshed by and by it returns other frames than asked for, so each is checked against the index.

    Raises:
        BackendUnavailable: for a file that torchcodec and the index do not agree on.
        InvalidOption: for a file without video, or one that torchcodec cannot open.
    """

    backend = "torchcodec"
    warnings = ()

    def __init__(self, path: Path) -> None:
        from torchcodec.decoders import VideoDecoder  # type: ignore[attr-defined]

        self._path = path
        tape = Tape(path)
        try:
            index = index_packets(tape.packets(), tape.stream)
            self.damage = ("" if index is None else damage(index, tape.stream)) or broken_structure(path)
            tape.rewind()
            first = tape.next()
            if index is None or index.refreshing.any() or (first is not None and turned(first)[1]):
                raise self._refusal()
            self._decoder: Any = VideoDecoder(
                str(path),
                stream_index=tape.stream.index,
                dimension_order="NHWC",
                num_ffmpeg_threads=0,
                device="cpu",
            )
        except (RuntimeError, ValueError) as error:
            if isinstance(error, InvalidOption | BackendUnavailable):
                raise
            raise InvalidOption(f"torchcodec cannot read {path} as video: {reason(error)}") from error
        finally:
            tape.close()
        self.times, self.duration = index.times, index.duration
        if len(self._decoder) != len(self.times):
            raise self._refusal()
        height, width = self._decoder.metadata.height, self._decoder.metadata.width
        self.size = (int(height or 0), int(width or 0))
        self._begin = float(self._decoder.metadata.begin_stream_seconds or 0)

    def _refusal(self) -> BackendUnavailable:
        return BackendUnavailable(f"torchcodec gives other frames of {self._path} than asked for: use backend='pyav'")

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """See `vtprune.video.frames.Video`; raises `BackendUnavailable` where torchcodec returns another frame."""
        for index in indices:
            try:
                frame = self._decoder.get_frame_at(int(index))
            except RuntimeError as error:
                logger.debug("frame %d of %s cannot be decoded: %s", index, self._path, error)
                continue
            pixels = frame.data.numpy()
            if pixels.shape[:2] != self.size or abs(frame.pts_seconds - self._begin - self.times[index]) > _NEAR:
                raise self._refusal()
            yield int(index), pixels

    def doubtful(self, indices: Sequence[int] | np.ndarray) -> list[int]:
        """None: torchcodec does not tell which frames lean on damage."""
        return []

    def close(self) -> None:
        """Let go of the file."""
        self._decoder = None
