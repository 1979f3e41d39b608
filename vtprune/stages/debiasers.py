"""Debiasers: scores in, scores out, a known bias or scale removed. None looks at batch-mates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune._checks import check_positive
from vtprune.kernels import reference as kernels
from vtprune.stages.vectors import FEATURES, needed_for, vectors_of
from vtprune.types import VisualTokens

BARS = "bars"
"""Evidence of which tokens are padding, where features do not tell."""


@dataclass(frozen=True)
class MinMax:
    """Stretch the scores of each picture to [0, 1]; equal scores become 0. What rules tokens out (-inf) stays."""

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        endless = scores.isinf()
        low = scores.masked_fill(endless, float("inf")).amin(dim=1, keepdim=True)
        high = scores.masked_fill(endless, float("-inf")).amax(dim=1, keepdim=True)
        return torch.where(endless, scores, ((scores - low) / (high - low)).nan_to_num(nan=0.0))


@dataclass(frozen=True, kw_only=True)
class WithoutSinks:
    """Bring scores of sinks down: those more than `limit` deviations above the median get the median.

    Deviations are median absolute ones; where more than half of the scores are equal nothing is a sink.
    """

    limit: float = 12.0

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        return torch.where(_far_above(scores, self.limit), _median(scores), scores)


@dataclass(frozen=True, kw_only=True)
class WithoutHighNorms:
    """Bring scores of high-norm tokens down to the median: encoders use them as registers (arXiv 2309.16588).

    A norm is high that lies more than `limit` median absolute deviations above the median of the picture.
    """

    limit: float = 6.0
    vectors: str = FEATURES

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)

    @property
    def needs(self) -> frozenset[str]:
        return needed_for(self.vectors)

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        norms = vectors_of(tokens, self.vectors).float().norm(dim=2)
        return torch.where(_far_above(norms, self.limit), _median(scores), scores)


@dataclass(frozen=True)
class WithoutTrend:
    """Take from every score the mean of its row and of its column of the grid, as far as they differ from that of all.

    Each part has rows and columns of its own; one of a single row or column keeps its scores along it.
    """

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        pieces = []
        for part, own in zip(tokens.parts, scores.split([part.tokens for part in tokens.parts], dim=1), strict=True):
            grid = own.unflatten(1, part.grid)
            every = grid.mean(dim=(1, 2), keepdim=True)
            for axis in (1, 2):
                if part.grid[2 - axis] > 1 and part.grid[axis - 1] > 1:
                    grid = grid - (grid.mean(dim=3 - axis, keepdim=True) - every)
            pieces.append(grid.flatten(1))
        return torch.cat(pieces, dim=1)


@dataclass(frozen=True, kw_only=True)
class WithoutPadding:
    """Rule out bars of padding: whole rows or columns at an edge whose tokens all resemble the corner.

    Pictures padded to a square have such bars on two sides. They score lowest of the picture, but may still be taken
    where nothing else is left. A single row or column of tokens has none. `alike` is the cosine similarity from which
    tokens count as equal. Between layers, where hidden states resemble nothing any more, `evidence["bars"]` tells.
    """

    alike: float = 0.999

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        lowest = scores.amin(dim=1, keepdim=True) - 1
        known = tokens.evidence.get(BARS)
        return torch.where(self.bars(tokens) if known is None else known, lowest, scores)

    def bars(self, tokens: VisualTokens) -> Tensor:
        """(S, N), True at tokens of bars, by the features in front of the language model."""
        sizes = [part.tokens for part in tokens.parts]
        units = kernels.unit_rows(tokens.features).split(sizes, dim=1)
        barred = [self._bars(own, part.grid) for own, part in zip(units, tokens.parts, strict=True)]
        return torch.cat(barred, dim=1)

    def _bars(self, units: Tensor, grid: tuple[int, int]) -> Tensor:
        """(S, n): tokens in bars, unless the whole part is one."""
        pictures = units.unflatten(1, grid)
        barred = torch.zeros(pictures.shape[:3], dtype=torch.bool, device=units.device)
        for corner in (pictures[:, :1, :1], pictures[:, -1:, -1:]):
            same = (pictures * corner).sum(dim=3) >= self.alike
            for axis in (1, 2):
                if grid[2 - axis] == 1:
                    continue  # a corner always resembles itself
                line = same.all(dim=3 - axis)
                ahead, back = line.cumprod(dim=1), line.flip(1).cumprod(dim=1).flip(1)
                barred |= (ahead + back > 0).unsqueeze(3 - axis)
        return (barred & ~barred.all(dim=(1, 2), keepdim=True)).flatten(1)


def _median(values: Tensor) -> Tensor:
    return values.median(dim=1, keepdim=True).values


def _far_above(values: Tensor, limit: float) -> Tensor:
    middle = _median(values)
    spread = _median((values - middle).abs())
    return (values > middle + limit * spread) & (spread > 0)
