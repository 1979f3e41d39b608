"""Mergers: how dropped tokens live on in kept ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtprune.glances import Need
from vtprune.kernels import reference as kernels
from vtprune.protocols import Scorer
from vtprune.stages.cells import cells_of
from vtprune.stages.scorers import Constant
from vtprune.stages.vectors import FEATURES, needed_for, scores_of, vectors_of
from vtprune.types import Groups, Selection, VisualTokens


def _allowed(tokens: VisualTokens, into: Tensor) -> Tensor:
    """`into` without forbidden tokens: they live on nowhere."""
    forbidden = tokens.evidence.get("forbid")
    return into if forbidden is None else into.masked_fill(forbidden, -1)


def nearest_kept(units: Tensor, keep: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Index (S, N) into `keep` (S, K) of the kept token most similar to each, out of the `allowed` (S, K) ones."""
    chosen = kernels.rows_at(units, keep)
    similarity = units @ chosen.transpose(1, 2)
    if allowed is not None:
        similarity = similarity.masked_fill(~allowed[:, None], float("-inf"))
    return similarity.argmax(dim=2)


@dataclass(frozen=True, kw_only=True)
class IntoNearest:
    """Each dropped token joins the kept one it is most similar to; the mean takes its place.

    Args:
        vectors: what is compared: `"features"`, or the name of evidence (S, N, C).
        pick: number of the pick whose tokens take others over; None: all do.
        halfway: kept tokens move half the way to the mean only: the pivot merging of LOOK-M, arXiv 2406.18139.
    """

    vectors: str = FEATURES
    pick: int | None = None
    halfway: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return needed_for(self.vectors)

    def __call__(self, tokens: VisualTokens, selection: Selection) -> Groups:
        units = kernels.unit_rows(vectors_of(tokens, self.vectors))
        allowed = None if self.pick is None else selection.taken == self.pick
        into = nearest_kept(units, selection.keep, allowed)
        if allowed is not None:
            into = into.masked_fill(~allowed.any(dim=1, keepdim=True), -1)
        alike = torch.ones_like(into, dtype=torch.float32)
        return Groups(into=_allowed(tokens, into), weights=alike, stays=0.5 if self.halfway else 0.0)


@dataclass(frozen=True, kw_only=True)
class IntoCell:
    """Tokens join the kept one of their cell of the grid; there are as many cells as tokens that may take others over.

    Args:
        pick: number of the pick whose tokens these are; None: all.
        weights: scorer of what a token counts in the mean that takes the place of the kept one.
    """

    pick: int | None = None
    weights: Scorer = field(default_factory=Constant)

    @property
    def needs(self) -> frozenset[Need]:
        return self.weights.needs

    def __call__(self, tokens: VisualTokens, selection: Selection) -> Groups:
        K = selection.keep.shape[1]
        count = K if self.pick is None else selection.counts[self.pick]
        own = torch.arange(K, device=selection.keep.device).expand_as(selection.keep)
        weights = scores_of(self.weights, tokens, type(self).__name__)
        if count == 0:
            return Groups(into=torch.full_like(weights, -1, dtype=torch.long), weights=weights)
        cell = torch.from_numpy(cells_of(tokens.parts, count).owner).to(own.device, non_blocking=True)
        at_home = own if self.pick is None else own.masked_fill(selection.taken != self.pick, K)
        head = own.new_full((len(own), count), K).scatter_reduce_(1, cell[selection.keep], at_home, "amin")
        into = head[:, cell]
        return Groups(into=_allowed(tokens, into.masked_fill(into == K, -1)), weights=weights)


@dataclass(frozen=True, kw_only=True)
class NeighbourSum:
    """Each kept token gets the `count` tokens most similar to it on top, in proportion to their scores.

    Scores are scaled to add up to 1 over a picture. Source: LLaVA-PruMerge, arXiv 2403.15388.
    """

    weights: Scorer
    count: int = 32
    vectors: str = FEATURES

    @property
    def needs(self) -> frozenset[Need]:
        return self.weights.needs | needed_for(self.vectors)

    def __call__(self, tokens: VisualTokens, selection: Selection) -> Tensor:
        units = kernels.unit_rows(vectors_of(tokens, self.vectors))
        N = units.shape[1]
        similarity = kernels.rows_at(units, selection.keep) @ units.transpose(1, 2)
        similarity = similarity.scatter(2, selection.keep[..., None], float("-inf"))
        near = similarity.sort(dim=2, descending=True, stable=True).indices[..., : min(self.count, N - 1)]
        worth = scores_of(self.weights, tokens, type(self).__name__).clamp(min=0)
        if "forbid" in tokens.evidence:
            worth = worth.masked_fill(tokens.evidence["forbid"], 0)
        worth = worth / worth.sum(dim=1, keepdim=True).clamp_min(1e-12)
        added = torch.zeros_like(similarity).scatter(2, near, 1.0) * worth[:, None]
        return added.scatter(2, selection.keep[..., None], 1.0)
