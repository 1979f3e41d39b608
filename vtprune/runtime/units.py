"""What a budget applies to: the visual tokens of a picture, of a part, or of a whole prompt, stacked where equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vtprune.types import Budget, Layout, Ordinal, Part


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of the tokens of one segment (separators left out of the count)."""

    segment: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Tokens that share one budget, `k` of which stay; `at` (N,) says where, prompt rows lying one after the other."""

    row: int
    at: np.ndarray
    parts: tuple[Part, ...]
    pieces: tuple[Piece, ...]
    ordinal: Ordinal
    k: int

    @property
    def shape(self) -> tuple[object, ...]:
        """Units of equal shape can be stacked."""
        return (len(self.at), self.k, tuple((part.kind, part.grid) for part in self.parts))


def make_units(layout: Layout, budget: Budget, seen: tuple[int, ...]) -> list[Unit]:
    """One unit for each picture, part or prompt; `seen` counts the pictures of earlier turns per row."""
    if budget.per == "prompt":
        return _prompt_units(layout, budget, seen)
    units: list[Unit] = []
    number: dict[int, int] = defaultdict(int)
    for index, segment in enumerate(layout.segments):
        ordinal = seen[segment.row] + number[segment.row]
        number[segment.row] += 1
        if budget.per == "image":
            pieces = (Piece(segment=index, start=0, stop=segment.tokens),)
            units.append(_unit(layout, budget, pieces, segment.parts, Ordinal(segment=ordinal)))
            continue
        start = 0
        for part_number, part in enumerate(segment.parts):
            piece = Piece(segment=index, start=start, stop=start + part.tokens)
            units.append(_unit(layout, budget, (piece,), (part,), Ordinal(segment=ordinal, part=part_number)))
            start += part.tokens
    return units


def split_unit(unit: Unit, counts: Sequence[int]) -> list[Unit]:
    """One unit for each part of `unit`, of which so many tokens stay."""
    found, offset = [], 0
    places = [(piece, start) for piece in unit.pieces for start in range(piece.start, piece.stop)]
    for number, (part, k) in enumerate(zip(unit.parts, counts, strict=True)):
        piece, start = places[offset]
        own = Piece(segment=piece.segment, start=start, stop=start + part.tokens)
        ordinal = replace(unit.ordinal, part=unit.ordinal.part + number)
        at = unit.at[offset : offset + part.tokens]
        found.append(Unit(row=unit.row, at=at, parts=(part,), pieces=(own,), ordinal=ordinal, k=k))
        offset += part.tokens
    return found


def _prompt_units(layout: Layout, budget: Budget, seen: tuple[int, ...]) -> list[Unit]:
    rows: dict[int, list[int]] = defaultdict(list)
    for index, segment in enumerate(layout.segments):
        rows[segment.row].append(index)
    units = []
    for row, indices in rows.items():
        pieces = tuple(Piece(segment=index, start=0, stop=layout.segments[index].tokens) for index in indices)
        parts = tuple(part for index in indices for part in layout.segments[index].parts)
        units.append(_unit(layout, budget, pieces, parts, Ordinal(segment=seen[row])))
    return units


def _unit(layout: Layout, budget: Budget, pieces: tuple[Piece, ...], parts: tuple[Part, ...], ordinal: Ordinal) -> Unit:
    segments = [layout.segments[piece.segment] for piece in pieces]
    row = segments[0].row
    found = [segment.candidates[piece.start : piece.stop] for segment, piece in zip(segments, pieces, strict=True)]
    positions = np.concatenate(found)
    return Unit(
        row=row,
        at=positions + row * layout.length,
        parts=parts,
        pieces=pieces,
        ordinal=ordinal,
        k=budget.resolve(len(positions)),
    )
