"""Ways to find the frames of a tape by their numbers, and what is wrong with them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from vtprune.video.faults import Faults
from vtprune.video.packets import PacketIndex, damage
from vtprune.video.tape import Tape

SEEK_FRAMES = 16
"""A seek that saves fewer frames than that saves no time: the threads of the decoder have to be filled again."""
AHEAD = 16
"""Decoders hold back no more frames than that."""
_ASSUMED_RATE = 25.0
_LEANING = 3
"""A picture that leans on one that is shown after it."""


class Finder(Protocol):
    """Frames of a tape by number; attributes are those of `vtprune.video.frames.Video`, `first` is a whole frame."""

    times: np.ndarray
    duration: float
    damage: str
    warnings: tuple[str, ...]
    first: Any

    def find(self, index: int) -> Any:
        """The frame of that index, None where it cannot be decoded."""
        ...

    def doubts(self, index: int) -> bool:
        """Whether that frame, which was found, leans on what could not be decoded."""
        ...


class Stamped:
    """Frames by the stamps of their packets."""

    def __init__(self, tape: Tape, index: PacketIndex) -> None:
        self._tape, self._index = tape, index
        self._faults = Faults(index)
        self._since = 0
        self._passed = -math.inf
        self._last: int | None = None
        self._holds_back = bool(index.refreshing.any())
        self.damage = damage(index, tape.stream)
        self.warnings: tuple[str, ...] = ()
        tape.rewind()
        self.first = self._next()
        if self.first is None or self._faults.places:
            tape.rewind(careful=True)
            self._faults.places.clear()
            self.first = self._next()
        if self.first is not None:
            tape.put_back(self.first)
            self._index = index.beginning_with(self.first.pts)
            self._faults = Faults(self._index, self._faults.places)
        self._last = None
        self.times, self.duration = self._index.times, self._index.duration

    def find(self, index: int) -> Any:
        place = int(self._index.shown[index])
        stamp = int(self._index.stamps[place])
        key = self._index.key_of(index)
        if stamp <= self._passed or key - self._tape.at > SEEK_FRAMES:
            self._wind(key)
        known = set(self._faults.places)
        frame = self._reach(stamp, place)
        failed = frame is None or self._faults.places != known
        if failed and (self._since == key > 0 or not self._tape.careful):
            # Some streams need more than the last key frame, and say so only by failing; threads do not tell where.
            self._faults.places = known
            self._tape.rewind(careful=True)
            self._wind(self._index.key_before(key))
            frame = self._reach(stamp, place)
        return frame

    def doubts(self, index: int) -> bool:
        return self._faults.touch(index)

    def _wind(self, key: int) -> None:
        self._tape.wind(key, self._index)
        self._since, self._passed, self._last = key, -math.inf, None

    def _reach(self, stamp: int, place: int) -> Any:
        """The frame of that stamp, if it comes; the first one behind it stays on the tape."""
        while (frame := self._next()) is not None:
            if frame.pts > stamp:
                self._tape.put_back(frame)
                return None
            self._passed = frame.pts
            if frame.pts == stamp:
                self._look_ahead(int(self._index.latest[place]))
                return frame
        return None

    def _look_ahead(self, stamp: int) -> None:
        """Let all frames come that were decoded before this one and are shown later: it may lean on them."""
        before, frames = self._passed, list[Any]()
        while before < stamp and len(frames) < AHEAD and (frame := self._next()) is not None:
            frames.append(frame)
            before = frame.pts
        self._tape.put_back(*frames)

    def _next(self) -> Any:
        """The next whole frame that has a stamp."""
        while (frame := self._tape.next()) is not None:
            self._note(frame)
            if not frame.is_corrupt and frame.pts is not None:
                break
        else:
            self._note_failures()
        return frame

    def _note(self, frame: Any) -> None:
        """Remember what went wrong up to this frame."""
        self._note_failures()
        place = self._index.places.get(frame.pts)
        if place is None:
            return
        if frame.is_corrupt:
            self._faults.add(place, self._since)
        number = self._index.numbers.get(place)
        if number is None:
            return
        # Where the picture is refreshed by and by, frames are held back until it is whole.
        if self._last is not None and not self._holds_back:
            for missing in set(self._index.shown[self._last + 1 : number].tolist()) - self._index.repeats:
                self._faults.add(missing, self._since)
        self._last = number

    def _note_failures(self) -> None:
        for place in self._tape.failed:
            self._faults.add(place, self._since)
        self._tape.failed.clear()


class Counted:
    """Frames by counting what the decoder gives."""

    def __init__(self, tape: Tape) -> None:
        tape.rewind(careful=True)
        self._tape = tape
        self.first = None
        self._lost = 0
        stamps: list[int | None] = []
        kinds: list[int] = []
        keys: list[int] = []
        faults: list[int] = []
        while (frame := tape.next()) is not None:
            if self.first is None and not frame.is_corrupt:
                self.first = frame
            if self._failed():
                faults.append(len(stamps))
            if frame.is_corrupt:
                leaning = next((n for n, kind in enumerate(reversed(kinds)) if kind != _LEANING), len(kinds))
                faults.append(len(stamps) - leaning)
            if frame.key_frame:
                keys.append(len(stamps))
            kinds.append(frame.pict_type)
            stamps.append(frame.pts)
        self._failed()
        self._next = len(stamps)
        self._broken = np.zeros(len(stamps) + 1, dtype=bool)
        stops = np.append(keys, len(stamps))[np.searchsorted(keys, faults, side="right")]
        for fault, stop in zip(faults, stops.tolist(), strict=True):
            self._broken[fault : int(stop)] = True
        self.times, self.warnings = _times_of(stamps, tape.stream)
        self.duration = float(self.times[-1] + np.median(np.diff(self.times))) if len(stamps) > 1 else 0.0
        self.damage = ""
        if self._lost:
            self.damage = f"the file is damaged: {self._lost} of its packets, frames may be missing"

    def _failed(self) -> bool:
        """Whether something failed since the last time, but for what comes before the first key of a recording."""
        first = self._tape.first_key
        failures = [place for place in self._tape.failed if first is not None and place >= first]
        self._tape.failed.clear()
        self._lost += len(failures)
        return bool(failures)

    def find(self, index: int) -> Any:
        if index < self._next:
            self._tape.rewind()
            self._next = 0
        while (frame := self._tape.next()) is not None:
            self._next += 1
            if self._next > index:
                return None if frame.is_corrupt else frame
        return None

    def doubts(self, index: int) -> bool:
        return bool(self._broken[index])


def _times_of(stamps: list[int | None], stream: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Seconds (T,) of counted frames: as they say, or by the rate of the stream where they do not say or contradict."""
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) == len(stamps) and all(a < b for a, b in pairwise(known)):
        return (np.asarray(known, dtype=np.float64) - (known or [0])[0]) * float(stream.time_base), ()
    rate = float(stream.average_rate or stream.guessed_rate or _ASSUMED_RATE)
    return np.arange(len(stamps)) / rate, (f"the file does not say when frames are shown: {rate:g} a second assumed",)
