"""Selectors of diverse tokens, on cosine similarity of the projected features; ties go to the lower index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune._checks import check_positive
from vtprune.kernels import greedy
from vtprune.types import VisualTokens

First = Literal["score", "isolated"]
"""What a greedy choice starts from: the highest score, or the token whose nearest other token is farthest."""


@dataclass(frozen=True, kw_only=True)
class Dispersion:
    """Tokens far apart: greedy k-center (`"min"`) or max-sum dispersion (`"sum"`) on cosine distance.

    Each step takes the token with the largest distance to the nearest of the chosen ones, or to all of them together.
    Scores only say where to start. Source: ToDRE, arXiv 2505.18757 (k-center in its first version, max-sum in its
    second); with `"min"` and `"isolated"` DivPrune, arXiv 2503.02175.
    """

    reduce: Literal["min", "sum"] = "sum"
    first: First = "score"

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        return greedy.greedy_select(
            tokens.features,
            torch.zeros_like(scores, dtype=torch.float32),
            scores if self.first == "score" else None,
            k,
            reduce=self.reduce,
            taken=taken,
            available=_available(scores),
        )


@dataclass(frozen=True, kw_only=True)
class SensitiveDiversity:
    """Score times distance to the nearest chosen token, greedily: ZOO-Prune, arXiv 2509.24837.

    Scores are read as 0 where negative, and as 1 where all are equal.
    """

    first: First = "score"

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        weights = _weights(scores)
        return greedy.greedy_select(
            tokens.features,
            weights,
            weights if self.first == "score" else None,
            k,
            weight=weights,
            taken=taken,
            available=_available(scores),
        )


@dataclass(frozen=True)
class DPP:
    """The likeliest set of a determinantal point process, greedily, scores being relevance: CDPruner, arXiv 2506.10967.

    Scores are read as 0 where negative, and as 1 where all are equal. Where nothing is left that the chosen tokens do
    not span, the highest scores follow.
    """

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        return greedy.dpp_select(tokens.features, _weights(scores), k, taken=taken, available=_available(scores))


@dataclass(frozen=True, kw_only=True)
class Facility:
    """Salient tokens that the others resemble (facility location), greedily: SCOPE, arXiv 2510.24214.

    The gain in coverage of a token counts times its score to the power of `alpha`. Scores are read as 0 where negative,
    and as 1 where all are equal.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_positive("alpha", self.alpha, zero=True)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        salience = _weights(scores) ** self.alpha
        return greedy.facility_select(tokens.features, salience, k, taken=taken, available=_available(scores))


def _available(scores: Tensor) -> Tensor:
    return scores != float("-inf")


def _weights(scores: Tensor) -> Tensor:
    """Scores (S, N) as weights of 0 or more; 1 in rows that prefer no token to another."""
    low = scores.masked_fill(~_available(scores), float("inf")).amin(dim=1, keepdim=True)
    high = scores.amax(dim=1, keepdim=True)
    return scores.clamp(min=0).masked_fill(low == high, 1.0)
