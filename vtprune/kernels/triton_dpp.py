"""Determinantal point processes in Triton: what `greedy` says of `dpp_select`, one program for a picture."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.directions import Directions
from vtprune.kernels.greedy import NOVEL
from vtprune.kernels.triton_common import NEGATIVE, block_of, in_groups, numbers, similar_of, warps_of


@triton.jit
def _determinantal(
    table: tl.tensor,
    inverse: tl.tensor,
    relevance: tl.tensor,
    barred: tl.tensor,
    factor: tl.tensor,
    taken: tl.tensor,
    chosen: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    M: tl.tensor,
    novel: tl.tensor,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """All steps of one picture: each adds a row to the Cholesky factor (M + K, N), read back `STEPS` rows at a time."""
    s = tl.program_id(0).to(tl.int64)
    at, earlier = tl.arange(0, BLOCK), tl.arange(0, STEPS)
    inside = at < N
    own = tl.load(inverse + s * N + at, mask=inside, other=0)
    base = tl.load(relevance + s * N + at, mask=inside, other=0)
    closed = tl.load(barred + s * N + at, mask=inside, other=1) != 0
    novelty = tl.load(table + (s * N + at.to(tl.int64)) * N + at, mask=inside, other=0).to(tl.float32) * own * own
    novelty = tl.where((own > 0) & (novelty > 0.5), 1.0, 0.0)
    for step in range(K + M):
        if step < M:
            index = tl.load(taken + s * M + step)
        else:
            worth = base * tl.sqrt(tl.maximum(novelty, 0))
            worth = tl.where((novelty > novel) & (base > 0), worth, base - 2)
            index = tl.argmax(tl.where(closed, NEGATIVE, worth), axis=0, tie_break_left=True).to(tl.int64)
            tl.store(chosen + s * K + step - M, index)
        row = tl.load(table + (s * N + index) * N + at, mask=inside, other=0)
        left = similar_of(row, inverse + s * N, own, index)
        for begin in range(0, step, STEPS):
            rows = factor + (s * (K + M) + begin + earlier) * N
            past = begin + earlier < step
            shares = tl.load(rows + index, mask=past, other=0)
            known = tl.load(rows[:, None] + at[None, :], mask=past[:, None] & inside[None, :], other=0)
            left -= tl.sum(shares[:, None] * known, axis=0)
        pivot = tl.sum(tl.where(at == index, novelty, 0), axis=0)
        new = tl.where(pivot > novel, left / tl.sqrt(tl.maximum(pivot, novel)), 0.0)
        tl.store(factor + (s * (K + M) + step) * N + at, new, mask=inside)
        tl.debug_barrier()
        novelty -= new * new
        closed = closed | (at == index)


def dpp_select(
    features: Tensor,
    relevance: Tensor,
    k: int,
    *,
    taken: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """As `greedy.dpp_select`."""
    return in_groups(_select, k, features, relevance, taken, available)


def _select(features: Tensor, relevance: Tensor, taken: Tensor | None, available: Tensor | None, *, k: int) -> Tensor:
    """As `dpp_select`, of pictures that hold their similarities together."""
    S, N, _ = features.shape
    m, block = 0 if taken is None else taken.shape[1], block_of(N)
    directions = Directions.of(features)
    scale = relevance.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    barred = torch.zeros(S, N, dtype=torch.int8, device=features.device)
    chosen = torch.empty(S, k, dtype=torch.long, device=features.device)
    _determinantal[(S,)](
        directions.products(),
        directions.inverse,
        numbers(relevance / scale),
        barred if available is None else (~available).to(torch.int8).contiguous(),
        torch.empty(S, m + k, N, device=features.device),
        chosen if taken is None else taken.contiguous(),
        chosen,
        N,
        k,
        m,
        NOVEL,
        BLOCK=block,
        STEPS=max(1, 32768 // block) if block > 4096 else 8,
        num_warps=max(8, warps_of(block)),
    )
    return chosen
