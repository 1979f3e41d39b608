"""Rows of a grid and stretches of the raster order, and who is next to whom: known from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """`N` tokens cut into R pieces of at most W, one after the other: `owner` (N,) and `slot` (N,) in R x W of each."""

    owner: Tensor
    slot: Tensor
    count: int
    width: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Pieces:
        """Pieces of these lengths."""
        width = max(lengths)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        inside = np.concatenate([np.arange(length) for length in lengths])
        both = torch.from_numpy(np.stack([owner, owner * width + inside])).to(device, non_blocking=True)
        return cls(owner=both[0], slot=both[1], count=len(lengths), width=width)

    def split(self, values: Tensor) -> Tensor:
        """(S, N, ...) to (S, R, W, ...), 0 where a piece is shorter than W."""
        padded = values.new_zeros(values.shape[0], self.count * self.width, *values.shape[2:])
        return padded.index_copy_(1, self.slot, values).unflatten(1, (self.count, self.width))

    def join(self, values: Tensor) -> Tensor:
        """What `split` took apart: (S, R, W) to (S, N)."""
        return values.flatten(1).index_select(1, self.slot)


def neighbours(grids: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Indices (N, 5) of every token and the four around it in its own grid; at a border it stands in for the missing.

    Args:
        grids: `(h, w)` of the parts, whose tokens lie one after the other in raster order.
    """
    tables, start = [], 0
    for h, w in grids:
        ids = np.arange(start, start + h * w).reshape(h, w)
        wide = np.pad(ids, 1, mode="edge")
        around = [wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]]
        tables.append(np.stack([ids, *around], axis=-1).reshape(-1, 5))
        start += h * w
    return torch.from_numpy(np.concatenate(tables)).to(device, non_blocking=True)
