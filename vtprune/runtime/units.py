"""What a budget applies to: the visual tokens of a picture, of a part, or of a whole prompt, stacked where equal."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vtprune.types import Budget, Layout, Ordinal, Part


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Some tokens of one segment: `at` are their numbers, ascending (separators left out of the count)."""

    segment: int
    at: np.ndarray

    def of(self, values: Tensor) -> Tensor:
        """The entries (n, ...) of the segment that are its own; those that lie one after the other need no copy."""
        first, last = int(self.at[0]), int(self.at[-1])
        if last - first + 1 == len(self.at):
            return values[first : last + 1]
        return values[torch.from_numpy(self.at).to(values.device, non_blocking=True)]


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

    @property
    def numbers(self) -> np.ndarray:
        """The numbers (N,) of its tokens in their segment; of tokens of several pictures, through all of them."""
        return self.pieces[0].at if len(self.pieces) == 1 else np.arange(len(self.at))


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
            pieces = (Piece(segment=index, at=np.arange(segment.tokens)),)
            units.append(_unit(layout, budget, pieces, segment.parts, Ordinal(segment=ordinal)))
            continue
        for part_number, (part, at) in enumerate(_crops(segment.parts)):
            piece = Piece(segment=index, at=at)
            units.append(_unit(layout, budget, (piece,), (part,), Ordinal(segment=ordinal, part=part_number)))
    return units


def _crops(parts: Sequence[Part]) -> list[tuple[Part, np.ndarray]]:
    """Every part by itself, and every crop of those that were stitched, with the numbers of its tokens."""
    found, start = [], 0
    for part in parts:
        numbers = np.arange(start, start + part.tokens).reshape(part.grid)
        rows, columns = part.crops
        if len(rows) < 2:
            found.append((part, numbers.ravel()))
        for top, bottom in itertools.pairwise(rows):
            for left, right in itertools.pairwise(columns):
                grid = (bottom - top, right - left)
                crop = Part(start=0, stop=grid[0] * grid[1], kind=part.kind, grid=grid)
                found.append((crop, numbers[top:bottom, left:right].ravel()))
        start += part.tokens
    return found


def split_unit(unit: Unit, counts: Sequence[int]) -> list[Unit]:
    """One unit for each part of `unit`, of which so many tokens stay."""
    found, offset = [], 0
    places = [(piece.segment, number) for piece in unit.pieces for number in piece.at]
    for number, (part, k) in enumerate(zip(unit.parts, counts, strict=True)):
        own = places[offset : offset + part.tokens]
        piece = Piece(segment=own[0][0], at=np.array([token for _, token in own]))
        ordinal = replace(unit.ordinal, part=unit.ordinal.part + number)
        at = unit.at[offset : offset + part.tokens]
        found.append(Unit(row=unit.row, at=at, parts=(part,), pieces=(piece,), ordinal=ordinal, k=k))
        offset += part.tokens
    return found


def _prompt_units(layout: Layout, budget: Budget, seen: tuple[int, ...]) -> list[Unit]:
    rows: dict[int, list[int]] = defaultdict(list)
    for index, segment in enumerate(layout.segments):
        rows[segment.row].append(index)
    units = []
    for row, indices in rows.items():
        pieces = tuple(Piece(segment=index, at=np.arange(layout.segments[index].tokens)) for index in indices)
        parts = tuple(part for index in indices for part in layout.segments[index].parts)
        units.append(_unit(layout, budget, pieces, parts, Ordinal(segment=seen[row])))
    return units


def _unit(layout: Layout, budget: Budget, pieces: tuple[Piece, ...], parts: tuple[Part, ...], ordinal: Ordinal) -> Unit:
    segments = [layout.segments[piece.segment] for piece in pieces]
    row = segments[0].row
    found = [segment.candidates[piece.at] for segment, piece in zip(segments, pieces, strict=True)]
    positions = np.concatenate(found)
    return Unit(
        row=row,
        at=positions + row * layout.length,
        parts=parts,
        pieces=pieces,
        ordinal=ordinal,
        k=budget.resolve(len(positions)),
    )
