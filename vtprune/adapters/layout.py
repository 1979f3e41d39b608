"""Where the visual tokens of a call lie: placeholders of the prompt matched with entries of the encoder output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from vtprune.adapters.base import Encoding, Family, Host
from vtprune.errors import UnsupportedCall
from vtprune.types import Layout, Modality, Part, Segment


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """The encoder entries of one prompt row and the placeholders (positions) they fill."""

    row: int
    numbers: tuple[int, ...]
    positions: np.ndarray


def build_layout(
    *,
    ids: np.ndarray,
    valid: np.ndarray,
    tokens: Mapping[Modality, int | None],
    encodings: Mapping[Modality, Encoding],
    family: Family,
    inner: Host,
) -> Layout:
    """Match placeholders with encoder entries, row by row.

    Args:
        ids: (B, L) token ids on the host; the rows of beams stand next to each other.
        valid: (B, L) bool, False at padding.
        tokens: the placeholder id of each kind.
        encodings: what was encoded, once per prompt (not once per beam).
        family: how entries become pictures and parts.
        inner: the base model, for its config.

    Raises:
        UnsupportedCall: where placeholders and features do not match.
    """
    segments: list[Segment] = []
    beams = 1
    for kind, encoding in encodings.items():
        placeholders = [row.nonzero()[0] for row in ids == tokens[kind]]
        parts = family.parts(inner, encoding)
        beams = _beams(placeholders, encoding)
        for entries in _match_rows(placeholders, encoding, beams):
            segments += _row_segments(entries, encoding, parts, family)
    segments.sort(key=lambda segment: (segment.row, segment.runs[0][0]))
    return Layout(segments=tuple(segments), valid=valid, beams=beams)


def _beams(placeholders: list[np.ndarray], encoding: Encoding) -> int:
    """How many rows of the prompt share one encoded picture."""
    total, encoded = sum(map(len, placeholders)), sum(encoding.lengths)
    beams = total // encoded if encoded else 0
    if beams == 0 or beams * encoded != total or len(placeholders) % beams:
        raise _mismatch(encoding, total)
    return beams


def _match_rows(placeholders: list[np.ndarray], encoding: Encoding, beams: int) -> Iterator[_Entries]:
    total = sum(map(len, placeholders))
    first = 0
    for base in range(0, len(placeholders), beams):
        count = len(placeholders[base])
        last, filled = first, 0
        while filled < count and last < len(encoding.lengths):
            filled += encoding.lengths[last]
            last += 1
        if filled != count:
            raise _mismatch(encoding, total, row=base)
        for row in range(base, base + beams):
            if len(placeholders[row]) != count:
                raise _mismatch(encoding, total, row=row)
            yield _Entries(row=row, numbers=tuple(range(first, last)), positions=placeholders[row])
        first = last


def _mismatch(encoding: Encoding, total: int, row: int | None = None) -> UnsupportedCall:
    where = "" if row is None else f" (row {row} does not end where a picture ends)"
    return UnsupportedCall(
        f"the prompt has {total} {encoding.kind} placeholders, the encoder made {sum(encoding.lengths)} tokens of "
        f"lengths {list(encoding.lengths[:8])}{where}: build the prompt and the pictures with one call of the "
        "processor, and leave prefill_chunk_size out"
    )


def _row_segments(
    entries: _Entries, encoding: Encoding, parts: list[tuple[Part, ...]], family: Family
) -> Iterator[Segment]:
    bounds = list(accumulate((encoding.lengths[number] for number in entries.numbers), initial=0))
    for first, last in _groups(entries, bounds, family.entries(encoding)):
        positions = entries.positions[bounds[first] : bounds[last]]
        numbers = entries.numbers[first:last]
        yield Segment(
            row=entries.row,
            entries=numbers,
            runs=_runs(positions),
            kind=encoding.kind,
            parts=_join([parts[number] for number in numbers], thumbnail_last=family.thumbnail_last),
        )


def _groups(entries: _Entries, bounds: list[int], per_segment: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of entries that make one picture: a fixed number, or all that fill one run of placeholders."""
    count = len(entries.numbers)
    if per_segment is not None:
        for first in range(0, count, per_segment):
            yield first, min(first + per_segment, count)
        return
    first = 0
    for last in range(1, count + 1):
        end = bounds[last]
        if last == count or entries.positions[end] != entries.positions[end - 1] + 1:
            yield first, last
            first = last


def _runs(positions: np.ndarray) -> tuple[tuple[int, int], ...]:
    (breaks,) = (positions[1:] != positions[:-1] + 1).nonzero()
    starts, stops = positions[[0, *(breaks + 1)]], positions[[*breaks, -1]] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def _join(entries: list[tuple[Part, ...]], *, thumbnail_last: bool) -> tuple[Part, ...]:
    joined: list[Part] = []
    for parts in entries:
        offset = joined[-1].stop if joined else 0
        joined += [_shift(part, offset) for part in parts] if offset else parts
    if thumbnail_last and len(entries) > 1:
        joined[-1] = replace(joined[-1], kind="thumbnail")
    return tuple(joined)


def _shift(part: Part, offset: int) -> Part:
    return replace(
        part,
        start=part.start + offset,
        stop=part.stop + offset,
        separators=tuple(separator + offset for separator in part.separators),
    )
