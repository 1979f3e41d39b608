"""Filters: tokens that pass come before those that do not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vtprune._checks import check_share
from vtprune.glances import Need
from vtprune.kernels import reference as kernels
from vtprune.protocols import Scorer
from vtprune.stages.debiasers import MinMax
from vtprune.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class DualFilter:
    """Scores in three tiers: the key tokens, those that pass, the others; by `overall` in each.

    A token passes whose share of the sum of `overall` is `least_overall` or more, or whose `single` score is
    `least_single` or more. Key tokens are the share `keys` of the tokens at first with the highest `importance`.
    Source: MustDrop, arXiv 2411.10803.
    """

    overall: Scorer
    single: Scorer
    importance: Scorer
    least_overall: float = 0.001
    least_single: float = 0.001
    keys: float = 0.08

    def __post_init__(self) -> None:
        check_share("least_overall", self.least_overall)
        check_share("least_single", self.least_single)
        check_share("keys", self.keys)

    @property
    def needs(self) -> frozenset[Need]:
        return self.overall.needs | self.single.needs | self.importance.needs

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return self.tiers(tokens) + MinMax()(tokens, self.overall(tokens).float()) / 2

    def tiers(self, tokens: VisualTokens) -> Tensor:
        """2 for key tokens, 1 for those that pass, 0 for the others, (S, N)."""
        overall, single = self.overall(tokens).float(), self.single(tokens).float()
        whole = overall.sum(dim=1, keepdim=True)
        passes = ((overall >= self.least_overall * whole) | (single >= self.least_single)).float()
        first = sum(part.tokens for part in tokens.parts)
        count = min(tokens.features.shape[1], math.ceil(self.keys * first))
        key = kernels.top_select(self.importance(tokens).float(), count)
        return passes.scatter(1, key, 2.0)


@dataclass(frozen=True, kw_only=True)
class Passing:
    """As many as are key tokens of a filter or pass it."""

    filter: DualFilter

    @property
    def needs(self) -> frozenset[Need]:
        return self.filter.needs

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor:
        return (self.filter.tiers(tokens) > 0).sum(dim=1)
