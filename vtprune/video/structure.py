"""What a file tells of its damage without decoding: Matroska, FLV, MPEG-TS and AVI are made of pieces.

Padding behind the last piece, heads that were never filled in and counters that jump where two recordings were joined
are no damage.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

BROKEN = "the file is damaged: its pieces do not fit together from byte {} on, frames may be missing"
ENDS = "the file ends early, in the middle of a piece"
CHECKSUM = "the file is damaged: a checksum does not match, its frames may show damage"
_CLUSTER, _SEGMENT = 0x1F43B675, 0x18538067
_CRC = b"\xbf\x84"
_TRACKS, _ENTRY, _TRACK_NUMBER = 0x1654AE6B, 0xAE, 0xD7
_BLOCKS = (0xA3, 0xAF)
_CHECKED = (0x1549A966, _TRACKS)
"""What the file as a whole is, and its tracks."""
_PLAIN = (0x1A45DFA3, 0x114D9B74, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469, 0x1B538667)
"""Other elements at the top of Matroska."""
_IN_CLUSTERS = (0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0xAF, 0xBF, 0xEC, 0x5854)
_KNOWN = frozenset((_CLUSTER, _SEGMENT, *_CHECKED, *_PLAIN, *_IN_CLUSTERS))
_TAGS = (8, 9, 15, 18)
_SCRIPT = 1 << 16
_SIZED = b"\0\x08filesize\0"
"""A number of the first tag, by its name."""
_CELL = 188
_BLOCK = _CELL << 14


def broken_structure(path: Path) -> str:
    """What is wrong with a file, as far as its structure tells; empty for other formats and where nothing is."""
    size = os.path.getsize(path)
    with path.open("rb") as file:
        head = file.read(2 * _CELL + 1)
        file.seek(0)
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            return _matroska(file, size)
        if head.startswith(b"FLV\x01"):
            return _flash(file, size)
        if head[::_CELL] == b"GGG":
            return _transport(file, size)
        if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
            return _interleaved(file, size)
    return ""


def _broken(file: IO[bytes], place: int, *, used: int = 0) -> str:
    """That pieces do not fit from here on; nothing where all that follows, but for some bytes, is padding."""
    file.seek(place + used)
    while data := file.read(_BLOCK):
        if data.strip(b"\0") and data.strip(b"\xff"):
            return BROKEN.format(place)
    return ""


def _matroska(file: IO[bytes], size: int) -> str:
    """Segments and clusters are gone into, whose length need not be known; everything else is passed over."""
    place, end = 0, size
    tracks: set[int] = set()
    while place < end:
        file.seek(place)
        head = file.read(12)
        name, used = _number(head, 0, marked=True)
        length, behind = _number(head, used, marked=False)
        unknown = behind > used > 0 and length == (1 << 7 * (behind - used)) - 1
        if not used or not behind or (unknown and name not in (_SEGMENT, _CLUSTER)):
            return ENDS if len(head) < 12 and head.strip(b"\0") else _broken(file, place)
        if name not in _KNOWN:
            return _broken(file, place)
        place += behind
        if not unknown and place + length > size:
            return ENDS
        if name == _SEGMENT:
            end = size if unknown else place + length
        elif name != _CLUSTER:
            if name in _BLOCKS and tracks and _number(_at(file, place, 8), 0, marked=False)[0] not in tracks:
                return BROKEN.format(place)
            if name == _TRACKS:
                tracks |= _tracks(_at(file, place, min(length, _BLOCK)))
            place += length
        if not unknown and name in (_CLUSTER, *_CHECKED):
            matches = _matches(file, place if name == _CLUSTER else place - length, length)
            if matches is False:
                return CHECKSUM
            if matches and name == _CLUSTER:
                place += length
    return ""


def _at(file: IO[bytes], place: int, length: int) -> bytes:
    """Some bytes of a file."""
    file.seek(place)
    return file.read(length)


def _tracks(data: bytes) -> set[int]:
    """Numbers of tracks; none where this is not understood."""
    entries = _children(data, _ENTRY)
    return {int.from_bytes(number, "big") for entry in entries for number in _children(entry, _TRACK_NUMBER)}


def _children(data: bytes, name: int) -> Iterator[bytes]:
    """What elements of that name hold, of those in a row."""
    place = 0
    while place < len(data):
        found, used = _number(data, place, marked=True)
        length, behind = _number(data, used, marked=False)
        if not used or not behind:
            return
        if found == name:
            yield data[behind : behind + length]
        place = behind + length


def _number(data: bytes, start: int, *, marked: bool) -> tuple[int, int]:
    """A number whose first bits say how long it is, with that mark or without, and where it ends; 0, 0 for none."""
    first = data[start] if start < len(data) else 0
    count = 9 - first.bit_length()
    if not first or start + count > len(data) or (marked and count > 4):
        return 0, 0
    value = int.from_bytes(data[start : start + count], "big")
    return (value if marked else value & ((1 << 7 * count) - 1)), start + count


def _matches(file: IO[bytes], begin: int, length: int) -> bool | None:
    """Whether an element is what the checksum says that it may begin with; None where it has none."""
    file.seek(begin)
    head = file.read(6)
    if not head.startswith(_CRC) or length < 6:
        return None
    found, left = 0, length - 6
    while left:
        data = file.read(min(left, _BLOCK))
        if not data:
            return False
        found, left = zlib.crc32(data, found), left - len(data)
    return found == int.from_bytes(head[2:], "little")


def _flash(file: IO[bytes], size: int) -> str:
    """Tags in a row, of few kinds and of one stream, each with its length behind it, which the last one may lack."""
    if _promised(_at(file, 0, _SCRIPT)) > size + 4:
        return ENDS
    place = int.from_bytes(_at(file, 5, 4), "big")
    stream = _at(file, place + 12, 3)
    while place + 4 < size:
        head = _at(file, place, 15)
        if head[4] & 31 not in _TAGS or head[12:] != stream[: len(head[12:])]:
            return _broken(file, place, used=4)  # behind the length of the tag before
        place += 15 + int.from_bytes(head[5:8], "big")
    return ENDS if place > size else ""


def _promised(head: bytes) -> float:
    """The bytes that the first tag of an FLV promises for the whole file, 0 where it does not."""
    found = head.find(_SIZED)
    data = head[found + len(_SIZED) :][:8] if found >= 0 else b""
    return float(struct.unpack(">d", data)[0]) if len(data) == 8 else 0.0


def _interleaved(file: IO[bytes], size: int) -> str:
    """One RIFF behind the other, each with its length; a writer that could not go back left it out."""
    place = 0
    while place + 8 <= size:
        head = _at(file, place, 8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            return ""
        place += 8 + length
        if place > size:
            return ENDS
        place += length & 1
    return ""


def _transport(file: IO[bytes], size: int) -> str:
    """Every packet begins with the same byte."""
    place = 0
    while data := file.read(_BLOCK):
        begins = np.frombuffer(data, dtype=np.uint8)[::_CELL]
        wrong = np.flatnonzero(begins != ord("G"))
        if len(wrong):
            return _broken(file, place + int(wrong[0]) * _CELL)
        place += len(data)
    return ENDS if size % _CELL else ""
