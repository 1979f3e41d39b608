"""Stages inside the vision encoder: which patches go on from block to block, and which swallow others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune._checks import check_share, check_whole
from vtprune.errors import InvalidOption
from vtprune.kernels import attention as attentions
from vtprune.kernels import reference as kernels
from vtprune.readings import BlockAttention
from vtprune.stages.rules import ClsOrReceived, Keys, PageRank
from vtprune.types import EncoderCut


@dataclass(frozen=True)
class Survivors:
    """What a stage inside the encoder left, and in which order of worth: 0 where a patch is gone."""

    name: ClassVar[str] = "survivors"
    of: ClassVar[Literal["cut"]] = "cut"
    needs_cls: ClassVar[bool] = False

    def __call__(self, seen: EncoderCut) -> Tensor:
        return seen.keep


def kept(keep: Tensor, n: int, *, memory: Tensor | None = None) -> EncoderCut:
    """The cut that only drops."""
    own = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    into = torch.full((keep.shape[0], n), -1, device=keep.device).scatter_(1, keep, own)
    return EncoderCut(keep=keep, into=into, memory=memory)


def everything(patches: Tensor, *, memory: Tensor | None = None) -> EncoderCut:
    """The cut that keeps all n patches (B, n, D)."""
    B, n, _ = patches.shape
    own = torch.arange(n, device=patches.device).expand(B, n)
    return EncoderCut(keep=own, into=own, memory=memory)


@dataclass(frozen=True)
class MatchAndMerge:
    """Bipartite soft matching: ToMe, arXiv 2210.09461.

    Every second patch is matched, by its keys, with the most similar one of the others; the best matches merge. Every
    block loses the same number, or more where halving in those to come would not do.
    """

    needs_cls: ClassVar[bool] = False

    def counts(self, n: int, k: int, blocks: int) -> tuple[int, ...]:
        found = []
        for to_go in range(blocks, 0, -1):
            even, reachable = n - -(-(n - k) // to_go), k << (to_go - 1)
            n = max(n - n // 2, min(even, reachable))
            found.append(n)
        if n > k:
            raise InvalidOption(f"merging pairs in {blocks} blocks leaves {n} patches at least, not {k}")
        return tuple(found)

    def __call__(self, seen: BlockAttention, patches: Tensor, count: int, memory: Tensor | None) -> EncoderCut:
        n = patches.shape[1]
        gone = n - count
        if gone == 0:
            return everything(patches)
        units = kernels.unit_rows(Keys()(seen))
        best, match = (units[:, 0::2] @ units[:, 1::2].transpose(1, 2)).max(dim=2)
        merged = kernels.top_select(best, gone)
        stays = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device).scatter(1, 2 * merged, False)
        keep, _, slots = kernels.kept_indices(stays, count)
        into = slots.scatter(1, 2 * merged, slots.gather(1, 2 * match.gather(1, merged) + 1))
        return EncoderCut(keep=keep, into=into)


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Attention and likeness of values to the CLS token, weighted by the size of values: FlowCut, arXiv 2505.19536.

    Scores are averaged over blocks with `momentum` for the past. Every second block drops `pace` of the rest over the
    root of the blocks to go; the last one but one drops what is left to drop.
    """

    momentum: float = 0.5
    pace: float = 0.2
    needs_cls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("momentum", self.momentum)
        check_share("pace", self.pace)

    def counts(self, n: int, k: int, blocks: int) -> tuple[int, ...]:
        found = []
        for to_go in range(blocks - 2, -2, -1):
            if to_go <= 0:
                n = k
            elif to_go % 2 == 0:
                n -= math.floor((n - k) * self.pace / math.sqrt(to_go) + 0.5)
            found.append(n)
        return tuple(found)

    def __call__(self, seen: BlockAttention, patches: Tensor, count: int, memory: Tensor | None) -> EncoderCut:
        score = self._score(seen)
        total = score if memory is None else self.momentum * memory + (1 - self.momentum) * score
        if count == patches.shape[1]:
            return everything(patches, memory=total)
        return kept(kernels.top_select(total, count).sort(dim=1).values, patches.shape[1], memory=total)

    @staticmethod
    def _score(seen: BlockAttention) -> Tensor:
        assert seen.value is not None
        value = seen.value.float()
        likeness = torch.softmax((value[:, :, :1] @ value.transpose(-1, -2))[:, :, 0], dim=-1).mean(dim=1)[:, 1:]
        attention = attentions.cls_attention(seen.query, seen.key, scale=seen.scale)
        both = sum(part / part.sum(dim=1, keepdim=True).clamp_min(1e-12) for part in (attention, likeness))
        return both * value.mean(dim=1)[:, 1:].abs().sum(dim=2)


@dataclass(frozen=True, kw_only=True)
class MergeWindows:
    """Windows of like patches become one patch after the first block: MustDrop, arXiv 2411.10803.

    As many windows of `side` x `side` merge as the budget needs, the most alike first; at the last block the patches
    with the most attention stay. Rows and columns that fill no window are left alone.
    """

    side: int = 3
    needs_cls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole("side", self.side, least=2)

    def counts(self, n: int, k: int, blocks: int) -> tuple[int, ...]:
        each = self.side**2 - 1
        return (*(n - each * min(self._count(n), (n - k) // each),) * (blocks - 1), k)[-blocks:]

    def __call__(self, seen: BlockAttention, patches: Tensor, count: int, memory: Tensor | None) -> EncoderCut:
        n = patches.shape[1]
        gone = (n - count) // (self.side**2 - 1)
        seen_before = torch.zeros(patches.shape[:2], device=patches.device) if memory is None else memory
        if count == n:
            return everything(patches, memory=seen_before)
        if memory is not None or not 0 < gone <= self._count(n) or (n - count) % (self.side**2 - 1):
            attention = ClsOrReceived()(seen)
            return kept(kernels.top_select(attention, count).sort(dim=1).values, n, memory=attention)
        windows = self._windows(n, patches.device)
        units = kernels.rows_at(kernels.unit_rows(patches), windows.flatten()[None].expand(len(patches), -1))
        together = units.unflatten(1, windows.shape)
        alike = together.sum(dim=2).square().sum(dim=2) - together.square().sum(dim=(2, 3))
        merged = windows[kernels.top_select(alike, gone)]
        stays = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        stays = stays.scatter(1, merged[..., :-1].flatten(1), False)
        keep, _, slots = kernels.kept_indices(stays, count)
        heads = slots.gather(1, merged[..., -1])[..., None].expand(-1, -1, self.side**2)
        return EncoderCut(
            keep=keep,
            into=slots.scatter(1, merged.flatten(1), heads.flatten(1)),
            memory=seen_before.scatter(1, merged[..., -1], 1.0),
        )

    def _count(self, n: int) -> int:
        """How many windows there are, none where n patches are no square."""
        edge = math.isqrt(n)
        return (edge // self.side) ** 2 if edge**2 == n else 0

    def _windows(self, n: int, device: torch.device) -> Tensor:
        """Patches (windows, side²) of every window, the one at the bottom right last."""
        edge = math.isqrt(n)
        whole = edge // self.side * self.side
        grid = torch.arange(n, device=device).view(edge, edge)[:whole, :whole]
        return grid.unfold(0, self.side, self.side).unfold(1, self.side, self.side).flatten(0, 1).flatten(1)


@dataclass(frozen=True, kw_only=True)
class RankAndPrune:
    """Near-duplicates of the less important half go, then the least important: Zero-TPrune, arXiv 2305.17328.

    Importance is page rank on the attention of a block. Half of what a block drops goes for likeness, by keys.
    """

    steps: int = 5
    every: int = 2
    needs_cls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, least=1)
        check_whole("every", self.every, least=1)

    def counts(self, n: int, k: int, blocks: int) -> tuple[int, ...]:
        turns = [block for block in range(blocks) if (blocks - 1 - block) % self.every == 0]
        found = []
        for block in range(blocks):
            if block in turns:
                n -= (n - k) // (len(turns) - turns.index(block))
            found.append(n)
        return tuple(found)

    def __call__(self, seen: BlockAttention, patches: Tensor, count: int, memory: Tensor | None) -> EncoderCut:
        B, n, _ = patches.shape
        if count == n:
            return everything(patches)
        rank = PageRank(steps=self.steps)(seen)
        order = kernels.top_select(rank, n)
        units = kernels.rows_at(kernels.unit_rows(Keys()(seen)), order)
        half = n // 2
        likeness = (units[:, n - half :] @ units[:, : n - half].transpose(1, 2)).amax(dim=2)
        alike = kernels.top_select(likeness, min(half, (n - count) // 2)) + n - half
        left = torch.ones(B, n, dtype=torch.bool, device=patches.device).scatter(1, alike, False)
        first = left.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
        return kept(order.gather(1, first).sort(dim=1).values, n, memory=rank)
