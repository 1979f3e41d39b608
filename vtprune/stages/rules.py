"""Rules: what a reading makes of an attention of the vision encoder, or of the input of the projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.kernels import attention as kernels
from vtprune.readings import BlockAttention, OfAttention, OfProjector, Projection, Rule


@dataclass(frozen=True)
class ClsRow(OfAttention):
    """Attention of the CLS token, averaged over heads."""

    name: ClassVar[str] = "cls_attention"
    needs_cls: ClassVar[bool] = True

    def __call__(self, seen: BlockAttention) -> Tensor:
        return kernels.cls_attention(seen.query, seen.key, scale=seen.scale)


@dataclass(frozen=True)
class Received(OfAttention):
    """Attention that a patch gets from all tokens, averaged over them and over heads."""

    name: ClassVar[str] = "received_attention"
    spanning: ClassVar[bool] = True

    def __call__(self, seen: BlockAttention) -> Tensor:
        got = kernels.received_attention(seen.query, seen.key, scale=seen.scale, spans=seen.spans)
        return got[:, int(seen.has_cls) :]


@dataclass(frozen=True)
class ClsOrReceived(OfAttention):
    """`ClsRow` where the encoder has a CLS token, `Received` elsewhere."""

    name: ClassVar[str] = "importance"
    spanning: ClassVar[bool] = True

    def __call__(self, seen: BlockAttention) -> Tensor:
        return ClsRow()(seen) if seen.has_cls else Received()(seen)


@dataclass(frozen=True)
class VirtualCls(OfAttention):
    """Attention of the mean query of all patches, averaged over heads: a CLS token for encoders that have none.

    Source: FlowCut on encoders without a CLS token, arXiv 2505.19536.
    """

    name: ClassVar[str] = "virtual_cls_attention"

    def __call__(self, seen: BlockAttention) -> Tensor:
        first = int(seen.has_cls)
        query = seen.query[:, :, first:].float().mean(dim=2, keepdim=True)
        row = torch.softmax(query @ seen.key[:, :, first:].float().transpose(-1, -2) * seen.scale, dim=-1)
        return row.mean(dim=1)[:, 0]


@dataclass(frozen=True)
class MoreVaried(OfAttention):
    """Attention among patches only: what each gets, or what each pays, whichever varies more over a picture.

    Source: FoPru, arXiv 2411.14164. Without a CLS token all patches pay the same.
    """

    name: ClassVar[str] = "patch_attention"

    def __call__(self, seen: BlockAttention) -> Tensor:
        first = int(seen.has_cls)
        weights = torch.ones(len(seen.query), 1, seen.query.shape[2], device=seen.query.device)
        weights[..., :first] = 0
        patches = seen.query.shape[2] - first
        got = kernels.attention_to(seen.query, seen.key, weights / patches, scale=seen.scale).mean(dim=1)[:, first:]
        if not seen.has_cls:
            return got
        paid = (1 - kernels.attention_from(seen.query, seen.key, scale=seen.scale)[:, first:]) / patches
        wider = paid.var(dim=1, correction=0, keepdim=True) > got.var(dim=1, correction=0, keepdim=True)
        return torch.where(wider, paid, got)


@dataclass(frozen=True, kw_only=True)
class SinkRows(OfAttention):
    """Attention paid by the patches that get more than `threshold` times the mean themselves; by the top one at least.

    Source: VFlowOpt, arXiv 2508.05211.
    """

    threshold: float
    name: ClassVar[str] = "sink_attention"

    def __call__(self, seen: BlockAttention) -> Tensor:
        first = int(seen.has_cls)
        got = Received()(seen)
        sinks = (got > self.threshold * got.mean(dim=1, keepdim=True)) | (got == got.amax(dim=1, keepdim=True))
        weights = torch.nn.functional.pad(sinks / sinks.sum(dim=1, keepdim=True), (first, 0))[:, None]
        return kernels.attention_to(seen.query, seen.key, weights, scale=seen.scale).mean(dim=1)[:, first:]


@dataclass(frozen=True, kw_only=True)
class PageRank(OfAttention):
    """Weight of a patch after `steps` rounds of voting: each token hands its own on as it attends, head by head.

    Heads are joined by their root mean square. Source: Zero-TPrune, arXiv 2305.17328.
    """

    steps: int
    name: ClassVar[str] = "page_rank"

    def __call__(self, seen: BlockAttention) -> Tensor:
        B, H, n, _ = seen.query.shape
        votes = torch.full((B, H, n), 1 / n, device=seen.query.device)
        for _ in range(self.steps):
            votes = kernels.attention_to(seen.query, seen.key, votes, scale=seen.scale)
        return votes.square().mean(dim=1).sqrt()[:, int(seen.has_cls) :]


@dataclass(frozen=True)
class Keys(OfAttention):
    """Keys averaged over heads, (B, N, d)."""

    name: ClassVar[str] = "keys"

    def __call__(self, seen: BlockAttention) -> Tensor:
        return seen.key.float().mean(dim=1)[:, int(seen.has_cls) :]


@dataclass(frozen=True)
class EncoderFeatures(OfProjector):
    """What the projector gets, (B, N, C)."""

    name: ClassVar[str] = "encoder_features"

    def __call__(self, seen: Projection) -> Tensor:
        return seen.inputs.float()


NAMED_RULES: dict[str, Rule] = {
    rule.name: rule for rule in (ClsOrReceived(), ClsRow(), Received(), Keys(), EncoderFeatures())
}
"""Rules that stages may ask for by name."""
