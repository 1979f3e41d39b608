"""A file of video read from front to back, or from a packet that decoding can begin at."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtprune.errors import InvalidOption
from vtprune.video.frames import Refused, check_size
from vtprune.video.packets import PacketIndex

logger = logging.getLogger("vtprune")
_OPTIONS = {"protocol_whitelist": "file", "pattern_type": "none"}


class Tape:
    """Decoded frames of the video stream of a file, one after another.

    `at` is the number of the packet that is decoded next, `decoded` counts the frames that came out so far. A `careful`
    tape decodes frame by frame; otherwise threads work on several, and an error near the end takes whole frames along.
    `failed` are the numbers of packets that are damaged or could not be decoded; only a careful tape knows which ones.
    `first_key` is the number of the first packet, of those that were decoded, that decoding can begin at.

    Raises:
        InvalidOption: for a file that holds no video, or one that cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.careful = False
        self.decoded = 0
        self.failed: list[int] = []
        self._open()

    def _open(self) -> None:
        import av

        try:
            # Names and titles may be in any encoding; a file must not make FFmpeg open others than files.
            # And a name with a percent sign is a name, not that of many pictures.
            self._container = av.open(str(self.path), metadata_errors="replace", options=_OPTIONS)
        except (av.error.FFmpegError, ValueError) as error:
            raise InvalidOption(f"cannot read {self.path} as video: {reason(error)}") from error
        try:
            self.stream = _video_stream(self._container, self.path)
        except InvalidOption:
            self._container.close()
            raise
        self.stream.thread_type = "SLICE" if self.careful else "AUTO"
        self._begin()

    def _begin(self) -> None:
        self._packets = self.packets()
        self._ready: deque[Any] = deque()
        self._held: Any = None
        self._ended = False
        self.at = 0
        self.first_key: int | None = None

    def packets(self) -> Iterator[Any]:
        """Packets from here on, to the end of the file or to where it cannot be read on."""
        import av

        try:
            for packet in self._container.demux(self.stream):
                if packet.size:
                    yield packet
        except (av.error.FFmpegError, IndexError) as error:
            # An index error: PyAV stumbles at the end of a file in which streams turned up later than its head said.
            logger.debug("%s cannot be read on: %s", self.path, error)

    def next(self) -> Any:
        """The next frame, None at the end."""
        while not self._ready and not self._ended:
            self._feed()
        return self._ready.popleft() if self._ready else None

    def put_back(self, *frames: Any) -> None:
        """Make these the next frames."""
        self._ready.extendleft(reversed(frames))

    def _feed(self) -> None:
        import av

        packet = self._held or next(self._packets, None)
        self._held = None
        self._ended = packet is None
        self.at += 1
        # Of MPEG-TS it says that a counter jumped, as it does where two recordings were joined: the decoder tells.
        if packet is not None and packet.is_corrupt and self.stream.container.format.name != "mpegts":
            self.failed.append(self.at - 1)
        if packet is not None and packet.is_keyframe and self.first_key is None:
            self.first_key = self.at - 1
        try:
            frames = self.stream.decode(packet)
        except (av.error.FFmpegError, ValueError) as error:
            logger.debug("a packet of %s cannot be decoded: %s", self.path, error)
            self.failed.append(self.at - 1)
            return
        self.decoded += len(frames)
        self._ready.extend(frames)

    def rewind(self, *, careful: bool = False) -> None:
        """Go back to the first packet. The file is opened anew: not every format can seek, and this is exact."""
        self.careful = self.careful or careful
        self.close()
        self._open()

    def wind(self, key: int, index: PacketIndex) -> None:
        """Go to packet `key`, whatever a seek of this format means: packets before it are passed over undecoded."""
        for stamp in (index.stamps[key], index.sent[key]):
            if self._seek(int(stamp), key, index):
                return
        self.rewind()
        self._pass_to(key, index)

    def _seek(self, stamp: int, key: int, index: PacketIndex) -> bool:
        import av

        try:
            self._container.seek(stamp, stream=self.stream)
        except av.error.FFmpegError as error:
            logger.debug("%s cannot be wound to %s: %s", self.path, stamp, error)
            return False
        self._begin()
        return self._pass_to(key, index)

    def _pass_to(self, key: int, index: PacketIndex) -> bool:
        """Whether packet `key` comes now or later; if so it is the next one."""
        for packet in self._packets:
            place = index.places.get(packet.pts)
            if place is not None and place >= key:
                self._held, self.at = packet, place
                return place == key
        return False

    def close(self) -> None:
        """Let go of the file."""
        self._ready.clear()
        self._container.close()


def reason(error: Exception) -> str:
    """What a library says, in one line."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0]


def _video_stream(container: Any, path: Path) -> Any:
    """The stream of moving pictures; the cover of an album is none."""
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        instead = "only sound" if container.streams.audio else "something else"
        raise Refused(f"{path} holds no video, {instead}: expected a file with a video stream")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise InvalidOption(f"{path} holds a video that no decoder here knows: convert it, for example to H.264")
    check_size(str(path), (stream.codec_context.height, stream.codec_context.width))
    return stream
