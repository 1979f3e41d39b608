"""What could not be decoded, and which frames lean on it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vtprune.video.packets import PacketIndex


class Faults:
    """Packets that are damaged or could not be decoded, by their numbers, `places`."""

    def __init__(self, index: PacketIndex, places: Iterable[int] = ()) -> None:
        self.places = set(places)
        self._index = index

    def add(self, place: int, since: int) -> None:
        """Remember a packet. Decoding began at packet `since`: what leans on earlier ones is expected to fail."""
        stamps, keys = self._index.stamps, self._index.keys
        if place >= len(stamps) or (len(keys) and place < keys[0]) or (since and stamps[place] < stamps[since]):
            return
        self.places.add(place)

    def touch(self, frame: int) -> bool:
        """Whether that frame may show damage: something failed between the packet to decode from and its own."""
        place, key = int(self._index.shown[frame]), self._index.key_of(frame)
        return any(key <= fault <= place and self._spreads(fault, place) for fault in self.places)

    def _spreads(self, fault: int, place: int) -> bool:
        """Frames stored after a key frame but shown before it fail without harm to what is shown after it."""
        stamps, keys = self._index.stamps, self._index.keys
        number = int(np.searchsorted(keys, fault, side="right")) - 1
        if number < 0 or stamps[fault] >= stamps[keys[number]]:
            return True
        return bool(stamps[place] < stamps[keys[number]])
