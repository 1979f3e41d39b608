"""Density peaks: clusters of the best of what a pick leaves, a token kept for each, and its cluster merged into it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune._checks import check_share, check_whole
from vtprune.kernels import reference as kernels
from vtprune.types import Groups, Selection, VisualTokens

_LOWEST = torch.finfo(torch.float32).min
"""What a token is worth that is no centre at all: still more than one that may not be chosen."""


@dataclass(frozen=True, kw_only=True)
class DensityPeaks:
    """The centres of k clusters of the best `share` of tokens by score: density peaks, SparseVLM, arXiv 2410.04417.

    The density of a token is exp(-x), x being the mean of its squared distances to the k nearest, itself among them; a
    centre is dense and far from the nearest token that is denser, or, of the densest, from the farthest of all.
    Distances are those of features, divided by the root of their width.
    """

    share: float = 0.3

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        left = scores.shape[1] - (0 if taken is None else taken.shape[1])
        members, real = clustered(scores, k, share=self.share, left=left)
        return members.gather(1, kernels.top_select(_peaks(_rows(tokens, members), real, k), k))


@dataclass(frozen=True, kw_only=True)
class IntoPeaks:
    """Each token that was clustered joins its nearest centre; the plain mean takes the place of that. Others are lost.

    Args:
        pick: number of the pick that chose the centres, by `DensityPeaks`.
        share: that of `DensityPeaks`.
    """

    pick: int
    share: float = 0.3

    def __post_init__(self) -> None:
        check_whole("pick", self.pick, least=0)
        check_share("share", self.share)

    def __call__(self, tokens: VisualTokens, selection: Selection) -> Groups:
        N, keep = tokens.features.shape[1], selection.keep
        into = torch.full(tokens.features.shape[:2], -1, device=keep.device)
        scores = selection.scores[self.pick] if self.pick < len(selection.scores) else None
        if scores is not None:
            left = N - sum(selection.counts[: self.pick])
            members, real = clustered(scores, selection.counts[self.pick], share=self.share, left=left)
            away = _distances(_rows(tokens, members), _rows(tokens, keep))
            nearest = away.masked_fill((selection.taken != self.pick)[:, None], float("inf")).argmin(dim=2)
            into = into.scatter(1, members, nearest.masked_fill(~real, -1))
        return Groups(into=into, weights=torch.ones_like(into, dtype=torch.float32))


def clustered(scores: Tensor, k: int, *, share: float, left: int) -> tuple[Tensor, Tensor]:
    """The tokens that k clusters are made of: int(`share` n) + 1 of the best of n that may be chosen, at least k.

    Args:
        scores: (S, N), -inf at what may not be chosen.
        k: how many clusters.
        share: of the tokens that may be chosen.
        left: the most that may be chosen in any row.

    Returns:
        `(members (S, m), ascending; real (S, m), False at what only fills up)`.
    """
    most = min(left, max(k, int(share * left) + 1))
    best = kernels.top_select(scores, most)
    free = (scores != float("-inf")).sum(dim=1, keepdim=True)
    rank = torch.arange(most, device=scores.device)
    real = ((rank <= share * free) | (rank < k)) & (rank < free)
    members, order = best.sort(dim=1)
    return members, real.gather(1, order)


def _rows(tokens: VisualTokens, at: Tensor) -> Tensor:
    """Features (S, m, D) of tokens (S, m), in fp32; what is no number is 0."""
    return kernels.rows_at(tokens.features, at).float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """(S, m, K), divided by the root of D."""
    away = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
    return away / rows.shape[2] ** 0.5


def _peaks(rows: Tensor, real: Tensor, k: int) -> Tensor:
    """Distance to what is denser times density (S, m), as a logarithm so that nothing vanishes; -inf where not real."""
    away = _distances(rows, rows)
    other = away.masked_fill(~real[:, None], float("inf"))
    density = -other.square().sort(dim=2).values[..., :k].mean(dim=2)
    denser = real[:, None] & (density[:, None] > density[..., None])
    apart = other.masked_fill(~denser, float("inf")).amin(dim=2)
    farthest = away.masked_fill(~(real[:, None] & real[..., None]), 0).amax(dim=(1, 2))
    apart = torch.where(denser.any(dim=2), apart, farthest[:, None])
    worth = apart.log() + density
    return worth.nan_to_num(nan=_LOWEST, neginf=_LOWEST).masked_fill(~real, float("-inf"))
