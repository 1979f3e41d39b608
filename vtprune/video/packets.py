"""Where the frames of a file are, told by its packets without decoding any. P packets, T frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

TIMED = ("mov", "matroska", "flv", "mpegts")
"""Formats that store with every packet when it is shown; in others FFmpeg guesses, and has been seen to err."""
HIDING = ("vp8",)
"""Codecs with packets of which no frame comes."""
_LONGEST = 1 << 53
"""Units of a stream that floating point can count."""
_REPEAT = 16
"""Bytes of a packet of MPEG-4 that may say no more than to show the last picture again."""
_REORDERED = 64
"""Decoders hold back 16 frames at most: stamps that reorder more begin anew somewhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PacketIndex:
    """The packets of a stream in the order of the file, and its frames in the order they are shown.

    `stamps` (P,) say when a packet is shown and `sent` (P,) when it is decoded, in `unit` seconds. Decoding can begin
    at `keys`, ascending, and gives whole pictures from there on, or from the next key on where `refreshing`. `shown`
    (T,) are the packets of the frames, the last of which is shown for `last` units. Of `repeats` no frame may come.
    """

    stamps: np.ndarray
    sent: np.ndarray
    keys: np.ndarray
    refreshing: np.ndarray
    shown: np.ndarray
    last: int
    unit: float
    repeats: frozenset[int] = frozenset()

    @cached_property
    def places(self) -> dict[int, int]:
        """Packets by their stamps."""
        return {stamp: place for place, stamp in enumerate(self.stamps.tolist())}

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Frames by their packets."""
        return {place: number for number, place in enumerate(self.shown.tolist())}

    @cached_property
    def latest(self) -> np.ndarray:
        """(P,) the last moment at which a packet up to this one is shown."""
        stamps = np.full(len(self.stamps), self.stamps.min())
        stamps[self.shown] = self.stamps[self.shown]
        return np.maximum.accumulate(stamps)

    @property
    def times(self) -> np.ndarray:
        """(T,) seconds from the first frame on."""
        stamps = self.stamps[self.shown]
        return (stamps - stamps[0]) * self.unit

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last one."""
        return float(self.times[-1]) + self.last * self.unit

    def beginning_with(self, stamp: int) -> PacketIndex:
        """Without frames before that one, the first that can be decoded, that lean on what is not in the file.

        Recordings begin anywhere, and so do pieces of open groups.
        """
        if not len(self.keys):
            return self
        first, stamps = self.keys[0], self.stamps[self.shown]
        leaning = (self.shown < first) | (stamps < self.stamps[first])
        return replace(self, shown=self.shown[~(leaning & (stamps < stamp))])

    def key_of(self, frame: int) -> int:
        """The last packet to decode from for a whole picture of that frame.

        Frames stored after a key frame but shown before it lean on what is before the key frame.
        """
        place = int(self.shown[frame])
        number = int(np.searchsorted(self.keys, place, side="right")) - 1
        while number >= 0 and self.stamps[self.keys[number]] > self.stamps[place]:
            number -= 1
        key = int(self.keys[number]) if number >= 0 else 0
        return self.key_before(key) if number >= 0 and self.refreshing[number] else key

    def key_before(self, place: int) -> int:
        """The last key packet before that one, or the first packet."""
        number = int(np.searchsorted(self.keys, place, side="left")) - 1
        return int(self.keys[number]) if number >= 0 else 0


def index_packets(packets: Iterator[Any], stream: Any) -> PacketIndex | None:
    """The index of a stream; None where the stamps of its packets do not tell its frames."""
    if stream.container.format.name.split(",")[0] not in TIMED or stream.codec_context.name in HIDING:
        return None
    stamps, sent, spans, shown, repeats = [], [], [], [], []
    keys = {}
    for place, packet in enumerate(packets):
        stamps.append(packet.pts)
        sent.append(packet.pts if packet.dts is None else packet.dts)
        spans.append(packet.duration)
        # Nothing comes of what an edit list cuts off, and nothing good of half a packet.
        if not (packet.is_discard or packet.is_corrupt):
            shown.append(place)
        if stream.codec_context.name == "mpeg4" and packet.size <= _REPEAT:
            repeats.append(place)
        if packet.is_keyframe:
            keys[place] = _refreshes(packet, stream)
    if not shown or None in stamps or len(set(stamps)) < len(stamps) or max(stamps) - min(stamps) > _LONGEST:
        return None
    order = np.argsort([stamps[place] for place in shown], kind="stable")
    if np.abs(order - np.arange(len(order))).max() > _REORDERED:
        return None
    in_order = np.asarray(shown, dtype=np.int64)[order]
    return PacketIndex(
        stamps=np.asarray(stamps, dtype=np.int64),
        sent=np.asarray(sent, dtype=np.int64),
        keys=np.asarray([*keys], dtype=np.int64),
        refreshing=np.asarray([*keys.values()], dtype=bool),
        shown=in_order,
        last=spans[in_order[-1]] or _step(stamps),
        unit=float(stream.time_base),
        repeats=frozenset(repeats),
    )


def damage(index: PacketIndex, stream: Any) -> str:
    """What is missing of a file that ends early, as far as its head tells."""
    form = stream.container.format.name.split(",")[0]
    there, promised = len(index.stamps), len(stream.index_entries)
    if form == "mov" and there < promised:
        # Of fragments only those that are there say how many frames they hold.
        of = f" of {promised}" if promised <= stream.frames else ""
        return f"the file ends early: {there}{of} frames are there"
    stated = _seconds(stream.metadata.get("DURATION", "")) if form == "matroska" else 0.0
    end = float(index.stamps[index.shown[-1]] + 2 * index.last) * index.unit
    if stated > end + 0.25:
        return f"the file ends early: it promises {stated:.1f} seconds, and {index.duration:.1f} are there"
    return ""


def _refreshes(packet: Any, stream: Any) -> bool:
    """Whether this key of H.264 only begins to refresh the picture: pictures are whole when the next key comes.

    An instantaneous refresh is a unit of type 5. What has none may be an open group too, which this costs a detour.
    """
    if stream.codec_context.name != "h264":
        return False
    head, data = stream.codec_context.extradata or b"", bytes(packet)
    if head[:1] != b"\x01":
        return not any(data[found.end()] & 31 == 5 for found in re.finditer(b"\0\0\1(?=.)", data, re.DOTALL))
    place, width = 0, (head[4] & 3) + 1
    while place + width < len(data):
        if data[place + width] & 31 == 5:
            return False
        place += width + int.from_bytes(data[place : place + width], "big")
    return True


def _step(stamps: list[int]) -> int:
    """The usual distance of frames, 0 where there is only one."""
    return int(np.median(np.diff(np.sort(stamps)))) if len(stamps) > 1 else 0


def _seconds(clock: str) -> float:
    """Of hours, minutes and seconds with colons; 0 for anything else."""
    found = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", clock)
    return sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0.0
