"""Cells of a grid: as many as there are tokens to keep, and what is at home in each. Known from shapes alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtprune.stages.allocation import best_of_groups, group_sizes, largest_remainder
from vtprune.types import Part, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Cells:
    """`count` cells of N tokens: `owner` (N,) numbers the cell of each, `off_centre` (N,) is its way to the middle."""

    owner: np.ndarray
    off_centre: np.ndarray
    count: int


def cells_of(parts: Sequence[Part], count: int) -> Cells:
    """Cut the grids of all parts into `count` cells, as square as may be: bands of rows, each cut evenly.

    Parts share the cells by their tokens. Where there are fewer cells than parts, those without one join the last
    before them that has.
    """
    ends = np.cumsum([0, *(part.tokens for part in parts)]) * count // sum(part.tokens for part in parts)
    owners, distances = [], []
    for part, (first, last) in zip(parts, itertools.pairwise(ends), strict=True):
        own, distance = _cut(part.grid, max(1, last - first))
        owners.append(own + (first if last > first else max(0, first - 1)))
        distances.append(distance)
    return Cells(owner=np.concatenate(owners), off_centre=np.concatenate(distances), count=count)


def _cut(grid: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell of every token of a grid (h, w), and its distance in steps from the middle of the cell, rounded down."""
    h, w = grid
    bands = min(h, count, max(-(-count // w), round(math.sqrt(count * h / w))))
    ends = np.arange(bands + 1) * count // bands
    owner, distance = np.empty(grid, dtype=np.int64), np.empty(grid, dtype=np.int64)
    for band, (first, last) in enumerate(itertools.pairwise(ends)):
        rows = np.arange(band * h // bands, (band + 1) * h // bands)
        column = np.arange(w) * (last - first) // w
        owner[rows] = first + column
        distance[rows] = _from_middle(rows * 0)[:, None] + _from_middle(column)
    return owner.ravel(), distance.ravel()


def _from_middle(cell: np.ndarray) -> np.ndarray:
    """Steps between each index and the middle, rounded down, of the run of equal numbers it belongs to; ascending."""
    first, after = np.searchsorted(cell, cell, "left"), np.searchsorted(cell, cell, "right")
    return np.abs(np.arange(len(cell)) - (first + after - 1) // 2)


@dataclass(frozen=True)
class CellCentres:
    """One token for each of k cells of the grid, the one nearest to the middle. Scores only rule tokens out."""

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        cells = cells_of(tokens.parts, k)
        near = torch.from_numpy(-cells.off_centre).to(scores.device, non_blocking=True).to(scores)
        return _one_each(near.masked_fill(scores == float("-inf"), float("-inf")), cells, k)


@dataclass(frozen=True)
class CellBest:
    """The highest score of each of k cells of the grid."""

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        return _one_each(scores, cells_of(tokens.parts, k), k)


def _one_each(scores: Tensor, cells: Cells, k: int) -> Tensor:
    """The best token of every cell; where a cell has none left, others give a second."""
    owner = torch.from_numpy(cells.owner).to(scores.device, non_blocking=True).expand(scores.shape)
    free = group_sizes(owner, scores != float("-inf"), cells.count)
    quotas = largest_remainder(torch.ones_like(free), k, free)
    return best_of_groups(scores, owner, quotas, k)
