"""What a few rows of a decoder layer say of every token: one number per key of their attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vtprune._checks import check_share, check_whole
from vtprune.errors import MissingEvidence
from vtprune.glances import RowAttention, RowRule


def _over_rows(values: Tensor, real: Tensor) -> Tensor:
    """Mean (B, n) of (B, R, n) over real rows."""
    weights = real / real.sum(dim=1, keepdim=True).clamp_min(1)
    return (weights[:, None] @ values)[:, 0]


@dataclass(frozen=True)
class MeanAttention:
    """Attention averaged over heads and rows: FastV, arXiv 2403.06764; PyramidDrop, arXiv 2410.17247."""

    name: ClassVar[str] = "attention"
    by_rows: ClassVar[bool] = True

    def __call__(self, seen: RowAttention) -> Tensor:
        return _over_rows(seen.weights.mean(dim=1), seen.real)


@dataclass(frozen=True)
class PeakAttention:
    """The most that any row pays, averaged over heads: MustDrop, arXiv 2411.10803."""

    name: ClassVar[str] = "peak_attention"

    def __call__(self, seen: RowAttention) -> Tensor:
        return seen.weights.mean(dim=1).masked_fill(~seen.real[:, :, None], 0).amax(dim=1)


@dataclass(frozen=True)
class AttentionWhereSeen:
    """Attention averaged over heads and those rows that may see a token: ZipVL, arXiv 2410.08584."""

    name: ClassVar[str] = "attention_where_seen"

    def __call__(self, seen: RowAttention) -> Tensor:
        keys = torch.arange(seen.weights.shape[3], device=seen.weights.device)
        sees = ((keys <= seen.own[..., None]) & seen.real[..., None]).sum(dim=1)
        total = (seen.weights.mean(dim=1) * seen.real[..., None]).sum(dim=1)
        return total / sees.clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class MassiveHeads:
    """Attention of the `heads` heads that pay most to the picture, averaged: SparseVLM+, arXiv 2410.04417."""

    name: ClassVar[str] = "massive_attention"
    heads: int = 14

    def __post_init__(self) -> None:
        check_whole("heads", self.heads, least=1)

    def __call__(self, seen: RowAttention) -> Tensor:
        _, H, R, n = seen.weights.shape
        mass = (seen.weights * seen.real[:, None, :, None] * seen.visual[:, None, None]).sum(dim=(2, 3))
        best = mass.sort(dim=1, descending=True, stable=True).indices[:, : min(self.heads, H)]
        chosen = seen.weights.gather(1, best[:, :, None, None].expand(-1, -1, R, n))
        return _over_rows(chosen.mean(dim=1), seen.real)


@dataclass(frozen=True)
class SymmetricText:
    """Rows weighted, in every head, by the attention among them in both directions: AdaptInfer, arXiv 2508.06084."""

    name: ClassVar[str] = "weighted_attention"

    def __call__(self, seen: RowAttention) -> Tensor:
        B, H, R, _ = seen.weights.shape
        among = seen.weights.gather(3, seen.own[:, None, None].expand(B, H, R, R))
        pairs = (seen.real[:, :, None] & seen.real[:, None])[:, None]
        among = among * pairs
        both = among + among.transpose(2, 3) - torch.diag_embed(among.diagonal(dim1=2, dim2=3))
        weight = both.sum(dim=2)
        return (weight[:, :, None] @ seen.weights)[:, :, 0].sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Undecayed:
    """A rule on attention divided, key by key, by what the rotary embedding alone makes of it.

    Source: SparseVLM+, arXiv 2410.04417; see `RowAttention.decay`.

    Args:
        rule: what is made of the attention then.
        least: where that map is lower, also below 0, it counts as so much, above 0.
    """

    rule: RowRule
    least: float = 0.05
    divides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("least", self.least, above=0)

    @property
    def name(self) -> str:
        return f"undecayed_{self.rule.name}"

    @property
    def by_rows(self) -> bool:
        """As the rule: each row is divided by itself."""
        return bool(getattr(self.rule, "by_rows", False))

    def __call__(self, seen: RowAttention) -> Tensor:
        if seen.decay is None:
            raise MissingEvidence(f"{self.name!r} divides by the decay of the rotary embedding, and none was given")
        return self.rule(replace(seen, weights=seen.weights / seen.decay.clamp_min(self.least)[:, None]))
