"""Budgets of parts: how the tokens that a clip, or a picture of several crops, may keep are shared out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune._checks import check_positive, check_share, check_whole
from vtprune.glances import Need
from vtprune.protocols import Scorer
from vtprune.stages.allocation import filled, largest_remainder
from vtprune.stages.vectors import scores_of
from vtprune.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Proportional:
    """Shares in proportion to the mean score of a part to the power of `power`, and to its size, by largest remainder.

    Every part gets `floor` tokens first, or as many as the budget has for each, and none gets more than the share `cap`
    of its own while others have room below theirs. What exceeds a part goes to the others by weight; where no part
    scores above 0 all weigh by their size. With a power of 2 and scores of frames it is the budget of QuoTA,
    arXiv 2503.08689.
    """

    scorer: Scorer
    power: float = 1.0
    floor: int = 0
    cap: float = 1.0

    def __post_init__(self) -> None:
        check_positive("power", self.power)
        check_whole("floor", self.floor, least=0)
        check_share("cap", self.cap, above=0)

    @property
    def needs(self) -> frozenset[Need]:
        return self.scorer.needs

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor:
        sizes = [part.tokens for part in tokens.parts]
        scores = scores_of(self.scorer, tokens, type(self).__name__).float()
        means = [own.mean(dim=1) for own in scores.split(sizes, dim=1)]
        worth = torch.stack(means, dim=1).clamp(min=0)
        weights = (worth / worth.amax(dim=1, keepdim=True).clamp_min(torch.finfo(worth.dtype).tiny)) ** self.power
        weights = torch.where((weights > 0).any(dim=1, keepdim=True), weights, 1.0)
        least, most, whole = (
            torch.tensor(bounds).to(weights.device, non_blocking=True).expand(weights.shape)
            for bounds in self._bounds(sizes, k)
        )
        given = least + _shared(weights * whole, k - least.sum(dim=1, keepdim=True), most - least)
        rest = k - given.sum(dim=1, keepdim=True)
        return given + _shared(weights * whole, rest, whole - given)

    def _bounds(self, sizes: list[int], k: int) -> tuple[list[int], list[int], list[int]]:
        """Of every part the least it gets, the most while others have room, and all it has."""
        floor = min(self.floor, k // len(sizes))
        least = [min(floor, size) for size in sizes]
        most = [max(own, math.floor(self.cap * size + 0.5)) for own, size in zip(least, sizes, strict=True)]
        return least, most, sizes


def _shared(weights: Tensor, total: Tensor, cap: Tensor) -> Tensor:
    """Whole numbers (S, G) by weight, none above `cap`; parts without a weight get what no other can take."""
    return largest_remainder(filled(weights, total, cap), total, cap)
