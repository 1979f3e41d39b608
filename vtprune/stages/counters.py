"""Counters: how many tokens a picture is worth, from what it holds. They make a method adaptive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune._checks import check_share
from vtprune.errors import InvalidOption
from vtprune.glances import Need
from vtprune.protocols import Scorer
from vtprune.stages.vectors import scores_of
from vtprune.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """What goes by the scores of tokens."""

    scorer: Scorer

    @property
    def needs(self) -> frozenset[Need]:
        return self.scorer.needs

    def scores(self, tokens: VisualTokens) -> Tensor:
        """(S, N)."""
        return scores_of(self.scorer, tokens, type(self).__name__)


@dataclass(frozen=True, kw_only=True)
class Outliers(_Scored):
    """`factor` for every token whose score is an outlier: above the third quartile by 1.5 interquartile ranges.

    Source: LLaVA-PruMerge, arXiv 2403.15388; quartiles are those of one picture (in the authors' code of the batch).
    """

    factor: float = 1.0

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor:
        scores = self.scores(tokens)
        low, high = (scores.quantile(share, dim=1, keepdim=True) for share in (0.25, 0.75))
        found = (scores > high + 1.5 * (high - low)).sum(dim=1)
        return (self.factor * found + 0.5).floor().long()


@dataclass(frozen=True, kw_only=True)
class _Shared(_Scored):
    """A share, above 0, of what the scores reach."""

    share: float

    def __post_init__(self) -> None:
        check_share("share", self.share, above=0)


@dataclass(frozen=True, kw_only=True)
class Mass(_Shared):
    """As many of the highest scores as hold a `share` of the sum of all."""

    share: float = 0.9

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor:
        scores = _from_zero(self.scores(tokens)).sort(dim=1, descending=True).values
        held = scores.cumsum(dim=1) - scores
        return (held < self.share * scores.sum(dim=1, keepdim=True)).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Negligible(_Shared):
    """All but the lowest scores that add up to a `share` at most, whatever the others are: ZipVL, arXiv 2410.08584.

    Scores are to be shares of one whole, as attention is.
    """

    share: float = 0.025

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor:
        lost = self.scores(tokens).clamp(min=0).sort(dim=1).values.cumsum(dim=1)
        return (lost > self.share).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Above(_Shared):
    """As many as score `share` of the highest score or more."""

    share: float = 0.5

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor:
        scores = _from_zero(self.scores(tokens))
        return (scores >= self.share * scores.amax(dim=1, keepdim=True)).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class AllOrNone(_Scored):
    """All that may stay, or none where the scores of a picture add up to less than `below`, or their mean is less.

    With attention for scores it is a rule for the exit of a picture: ToDRE, arXiv 2505.18757. The mean is for scores
    that all tokens share.
    """

    below: float = 0.1
    reduce: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        check_share("below", self.below)
        if self.reduce not in ("sum", "mean"):
            raise InvalidOption(f"reduce={self.reduce!r}: expected 'sum' or 'mean'")

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor:
        scores = self.scores(tokens)
        mass = scores.sum(dim=1) if self.reduce == "sum" else scores.mean(dim=1)
        return torch.where(mass < self.below, 0, k)


def _from_zero(scores: Tensor) -> Tensor:
    """Scores with negative ones at 0; where none is above 0, moved up so that the lowest is 0."""
    low, high = scores.aminmax(dim=1, keepdim=True)
    return torch.where(high <= 0, scores - low, scores.clamp(min=0))
