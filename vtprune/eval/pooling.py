"""Average pooling of visual tokens: which grid, which cells, and features with the means in the middle of the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtprune.errors import UnsupportedCall
from vtprune.types import Part

Grid = tuple[int, int]
_LONGEST = 2.0


def pool_grids(parts: Sequence[Part], count: int) -> tuple[Grid, ...]:
    """A coarser grid for every part, by its share of `count`."""
    n = sum(part.tokens for part in parts)
    return tuple(pool_grid(part.grid, max(1, count * part.tokens // n)) for part in parts)


def pool_grid(grid: Grid, count: int) -> Grid:
    """The largest grid of at most `count` cells, none longer than twice its width; the squarest of equal ones."""

    def stretch(rows: int, columns: int) -> float:
        aspect = (grid[0] / rows) / (grid[1] / columns)
        return max(aspect, 1 / aspect)

    choices = [(rows, min(grid[1], count // rows)) for rows in range(1, min(grid[0], count) + 1)]
    fitting = [choice for choice in choices if stretch(*choice) <= _LONGEST]
    if not fitting:
        return min(choices, key=lambda choice: stretch(*choice))
    return max(fitting, key=lambda choice: (choice[0] * choice[1], -stretch(*choice)))


def pooled_cells(parts: Sequence[Part], grids: Sequence[Grid]) -> list[int]:
    """Tokens in the middle (rounded down) of every cell, separators left out of the count."""
    found: list[int] = []
    before = 0
    for part, (rows, columns) in zip(parts, grids, strict=True):
        middle = _middles(part.grid[0], rows)[:, None] * part.grid[1] + _middles(part.grid[1], columns)
        found += [before + int(token) for token in middle.flat]
        before += part.tokens
    return found


def _middles(size: int, cells: int) -> np.ndarray:
    """The middle of every cell of `adaptive_avg_pool2d` along one side."""
    number = np.arange(cells)
    first, last = number * size // cells, -(-(number + 1) * size // cells) - 1
    return (first + last) // 2


def pool_features(inputs: dict[str, Any], parts: Sequence[Part], grids: Sequence[Grid]) -> dict[str, Any]:
    """Encoded inputs of pictures of these parts, with the mean of every cell in place of the token in its middle.

    Raises:
        UnsupportedCall: where the model takes no pictures that are encoded already.
    """
    outputs = list(inputs.get("mm_encoder_outputs", {}).values())
    if not outputs:
        raise UnsupportedCall("this model takes no encoded pictures, so they cannot be pooled on the way")
    (output,) = outputs
    output.pooler_output = _pool_entries(output.pooler_output, parts, grids)
    if output.get("deepstack_features") is not None:
        output.deepstack_features = [_pool_entries(layer, parts, grids) for layer in output.deepstack_features]
    return inputs


def _pool_entries(pooled: Any, parts: Sequence[Part], grids: Sequence[Grid]) -> Any:
    """Pool a tensor of all pictures, or one for each."""
    if torch.is_tensor(pooled):
        return _pool_flat(pooled.flatten(0, -2), parts, grids).view_as(pooled)
    flat = _pool_flat(torch.cat([entry.flatten(0, -2) for entry in pooled]), parts, grids)
    pieces = flat.split([entry.shape[:-1].numel() for entry in pooled])
    return [piece.view_as(entry) for piece, entry in zip(pieces, pooled, strict=True)]


def _pool_flat(flat: Tensor, parts: Sequence[Part], grids: Sequence[Grid]) -> Tensor:
    """The same for the tokens of all pictures in a row, (all tokens, D)."""
    pictures = flat.clone().unflatten(0, (-1, parts[-1].stop))
    for part, grid in zip(parts, grids, strict=True):
        offsets = torch.from_numpy(part.candidates).to(flat.device)
        tokens = pictures[:, offsets].unflatten(1, part.grid).permute(0, 3, 1, 2)
        means = nn.functional.adaptive_avg_pool2d(tokens, grid).flatten(2).transpose(1, 2)
        middles = torch.tensor(pooled_cells([part], [grid]), device=flat.device)
        pictures[:, offsets[middles]] = means
    return pictures.flatten(0, 1)
