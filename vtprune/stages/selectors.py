"""Selectors: which k tokens of each row, as distinct indices (S, k). Ties go to the lower index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune._checks import check_share, check_whole
from vtprune.kernels import greedy
from vtprune.kernels import reference as kernels
from vtprune.types import Ordinal, VisualTokens


@dataclass(frozen=True)
class TopK:
    """The highest scores."""

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        return kernels.top_select(scores, k)


@dataclass(frozen=True)
class Stride:
    """Evenly spaced tokens of what may be picked, scores unread."""

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        free = scores != float("-inf")
        rank = free.cumsum(dim=1) - 1
        count = free.sum(dim=1, keepdim=True)
        steps = torch.arange(k, device=scores.device)
        wanted = (2 * steps + 1) * count // (2 * k)
        source = torch.arange(scores.shape[1], device=scores.device).expand_as(rank)
        slot = rank.masked_fill(~free, scores.shape[1])
        free_to_index = source.new_zeros(scores.shape[0], scores.shape[1] + 1).scatter_(1, slot, source)
        return free_to_index.gather(1, wanted)


@dataclass(frozen=True, kw_only=True)
class Random:
    """Uniformly random tokens: a function of the seed, the picture's place in the conversation, N and k alone."""

    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("seed", self.seed)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        N = scores.shape[1]
        draw = torch.stack([self._draw(ordinal, N) for ordinal in tokens.ordinals]).to(scores.device, non_blocking=True)
        return kernels.top_select(draw.masked_fill(scores == float("-inf"), float("-inf")), k)

    def _draw(self, ordinal: Ordinal, N: int) -> Tensor:
        mixed = ((self.seed * 1_000_003 + ordinal.segment) * 65_537 + ordinal.part) % 2**63
        return torch.rand(N, generator=torch.Generator().manual_seed(mixed))


@dataclass(frozen=True, kw_only=True)
class MMR:
    """Maximal marginal relevance: `lam` x score - (1 - `lam`) x highest cosine similarity to what is chosen."""

    lam: float = 0.5

    def __post_init__(self) -> None:
        check_share("lam", self.lam)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        forbidden = scores == float("-inf")
        relevance = self.lam * scores.masked_fill(forbidden, 0.0)
        return greedy.greedy_select(
            tokens.features, relevance, relevance, k, weight=1 - self.lam, taken=taken, available=~forbidden
        )
