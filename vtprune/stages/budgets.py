"""Budgets of parts: how the tokens that a clip, or a picture of several crops, may keep are shared out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune._checks import check_positive
from vtprune.glances import Need
from vtprune.protocols import Scorer
from vtprune.stages.allocation import largest_remainder
from vtprune.stages.vectors import scores_of
from vtprune.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Proportional:
    """Shares in proportion to the mean score of a part to the power of `power`, and to its size, by largest remainder.

    What exceeds a part goes to the others; where no part scores above 0 all weigh by their size. With a power of 2 and
    scores of frames it is the budget of QuoTA, arXiv 2503.08689, whose frames are resized instead of pruned.
    """

    scorer: Scorer
    power: float = 1.0

    def __post_init__(self) -> None:
        check_positive("power", self.power)

    @property
    def needs(self) -> frozenset[Need]:
        return self.scorer.needs

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor:
        sizes = [part.tokens for part in tokens.parts]
        scores = scores_of(self.scorer, tokens, type(self).__name__).float()
        means = [own.mean(dim=1) for own in scores.split(sizes, dim=1)]
        weights = torch.stack(means, dim=1).clamp(min=0) ** self.power
        cap = torch.tensor(sizes).to(weights.device, non_blocking=True).expand(weights.shape)
        weights = torch.where((weights > 0).any(dim=1, keepdim=True), weights, 1.0)
        return largest_remainder(weights * cap, k, cap)
