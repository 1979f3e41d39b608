"""Greedy choice in Triton where similarities are not held: a step computes them, and memory is O(N).

A step is two launches, one program for each picture and then many, replayed from a graph.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.directions import Directions
from vtprune.kernels.graphs import repeat
from vtprune.kernels.triton_common import NEGATIVE, begun, nothing_seen, similar_of

_ROWS, _CHANNELS = 32, 128


@triton.jit
def _take(
    values: tl.tensor,
    indices: tl.tensor,
    chosen: tl.tensor,
    best: tl.tensor,
    count: tl.tensor,
    K: tl.tensor,
    PARTS: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Take the best of what every part of a picture offers, the next in the order of choice."""
    s = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    offers = tl.load(values + s * PARTS + at, mask=at < PARTS, other=NEGATIVE)
    index = tl.load(indices + s * PARTS + tl.argmax(offers, axis=0, tie_break_left=True))
    step = tl.load(count + s)
    tl.store(chosen + s * K + step, index)
    tl.store(best + s, index)
    tl.store(count + s, step + 1)


@triton.jit
def _look(
    features: tl.tensor,
    inverse: tl.tensor,
    relevance: tl.tensor,
    weight: tl.tensor,
    worth: tl.tensor,
    best: tl.tensor,
    values: tl.tensor,
    indices: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    PARTS: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
) -> None:
    """What the tokens of one part are worth, seen from the one just taken, and the best of them."""
    s, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * ROWS + tl.arange(0, ROWS)
    inside = at < N
    index = tl.load(best + s)
    summed = tl.zeros([ROWS, CHANNELS], tl.float32)
    rows = features + s * N * D
    for start in range(0, D, CHANNELS):
        d = start + tl.arange(0, CHANNELS)
        one = tl.load(rows + index * D + d, mask=d < D, other=0).to(tl.float32)
        all_ = tl.load(rows + at.to(tl.int64)[:, None] * D + d, mask=inside[:, None] & (d < D), other=0)
        summed += all_.to(tl.float32) * one
    own = tl.load(inverse + s * N + at, mask=inside, other=0)
    similar = similar_of(tl.sum(summed, axis=1), inverse + s * N, own, index)
    base = tl.load(relevance + s * N + at, mask=inside, other=0)
    seen = base - tl.load(weight + s * N + at, mask=inside, other=0) * similar
    now = tl.load(worth + s * N + at, mask=inside, other=NEGATIVE)
    now = now + seen if SUM else tl.minimum(now, seen)
    now = tl.where((at == index) | ~inside, NEGATIVE, now)
    tl.store(worth + s * N + at, now, mask=inside)
    tl.store(values + s * PARTS + part, tl.max(now, axis=0))
    tl.store(indices + s * PARTS + part, part * ROWS + tl.argmax(now, axis=0, tie_break_left=True))


def unheld_select(
    directions: Directions,
    relevance: Tensor,
    weight: Tensor,
    first: Tensor,
    k: int,
    *,
    reduce: Literal["min", "sum"],
    taken: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    """All steps, similarities computed anew in each: what is stored is O(N)."""
    rows, device = directions.rows, first.device
    (S, N, D), parts = rows.shape, triton.cdiv(rows.shape[1], _ROWS)
    worth = nothing_seen(first, available, reduce)
    chosen, seeds = begun(first, k, taken)
    values = torch.empty(S, parts, device=device)
    indices = torch.empty(S, parts, dtype=torch.long, device=device)
    best = torch.empty(S, dtype=torch.long, device=device)
    count = torch.full_like(best, int(taken is None))

    def look() -> None:
        _look[(S, parts)](
            *(rows, directions.inverse, relevance, weight, worth, best, values, indices, N, D, parts),
            ROWS=_ROWS,
            CHANNELS=_CHANNELS,
            SUM=reduce == "sum",
        )

    def step() -> None:
        _take[(S,)](values, indices, chosen, best, count, k, parts, BLOCK=triton.next_power_of_2(parts))
        look()

    for index in seeds.unbind(1):
        best.copy_(index)
        look()
    repeat(step, k - (taken is None), device)
    return chosen
