"""Token dropout: which visual tokens a training step keeps.

A mixture, so that no one kind of choice is favoured: uniform, block-wise, towards things and away from things.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

ODDS = {"uniform": 0.45, "blocks": 0.2, "things": 0.25, "ground": 0.1}


def choose_cells(share: Tensor, count: int, generator: Generator, side: int) -> Tensor:
    """Ascending indices of `count` of N cells, (B, count); every row draws a way.

    Args:
        share: (B, N), painted share of every cell.
        side: cells along a side of a picture; what is more than one square are frames.
    """
    rows, cells = share.shape
    way = torch.multinomial(torch.tensor(list(ODDS.values())), rows, replacement=True, generator=generator)[:, None]
    even = torch.rand(rows, cells, generator=generator)
    bias = torch.where(way == 2, 1.0, -1.0) * (way >= 2)
    strength = 0.3 + 1.7 * torch.rand(rows, 1, generator=generator)
    score = torch.where(way == 1, _blobs(rows, cells // side**2, side, generator) + 0.1 * even, even)
    score = score + bias * strength * (share.cpu() > 0)
    return score.topk(count, dim=1).indices.sort(dim=1).values.to(share.device)


def _blobs(rows: int, frames: int, side: int, generator: Generator) -> Tensor:
    """Smooth noise on square grids: its peaks are patches of neighbours, and there are more in some frames."""
    coarse = torch.rand(rows, frames, 5, 5, generator=generator)
    smooth = interpolate(coarse, size=(side, side), mode="bilinear")
    if frames > 1:
        smooth = smooth + torch.rand(rows, frames, 1, 1, generator=generator)
    return smooth.flatten(1)
