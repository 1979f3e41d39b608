"""Greedy choice in Triton: what `greedy` says of `greedy_select` and `pairwise_select`, without a host loop.

One program goes through all steps of a picture: a step reads one row of similarities, and worths are in its cache.
Where similarities are not held, `triton_unheld` computes them.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.directions import Directions
from vtprune.kernels.greedy import MOST_HELD, Held, held_dtype, none_chosen
from vtprune.kernels.triton_common import (
    NEGATIVE,
    barred,
    begun,
    nothing_seen,
    numbers,
    similar_of,
    warps_of,
)
from vtprune.kernels.triton_unheld import unheld_select

_BLOCK = 4096


@triton.jit
def _look_from(
    index: tl.tensor,
    table: tl.tensor,
    inverse: tl.tensor,
    relevance: tl.tensor,
    slopes: tl.tensor,
    worth: tl.tensor,
    N: tl.tensor,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
    PAIRWISE: tl.constexpr,
) -> tl.tensor:
    """Bring up to date what all tokens of a picture are worth, a block of them at a time; the best one, ties to the
    first. Behind the barrier any thread may read what another wrote."""
    lane = tl.arange(0, BLOCK)
    highest, place = tl.full([BLOCK], NEGATIVE, tl.float32), lane
    for start in range(0, N, BLOCK):
        at = start + lane
        inside = at < N
        seen = tl.load(table + index * N + at, mask=inside, other=0).to(tl.float32)
        if not PAIRWISE:
            slope = tl.load(slopes + at, mask=inside, other=0)
            seen = tl.load(relevance + at, mask=inside, other=0) - similar_of(seen, inverse, slope, index)
        now = tl.load(worth + at, mask=inside, other=NEGATIVE)
        now = now + seen if SUM else tl.minimum(now, seen)
        now = tl.where(at == index, NEGATIVE, now)
        tl.store(worth + at, now, mask=inside)
        better = inside & (now > highest)
        highest, place = tl.where(better, now, highest), tl.where(better, at, place)
    tl.debug_barrier()
    return tl.min(tl.where(highest == tl.max(highest, axis=0), place, N), axis=0).to(tl.int64)


@triton.jit
def _greedy(
    table: tl.tensor,
    inverse: tl.tensor,
    relevance: tl.tensor,
    slopes: tl.tensor,
    worth: tl.tensor,
    seeds: tl.tensor,
    chosen: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    M: tl.tensor,
    DONE: tl.tensor,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
    PAIRWISE: tl.constexpr,
) -> None:
    """All steps of one picture, from the `M` seeds on; `DONE` of them are in `chosen` already.

    `slopes` are weights times inverse lengths.
    """
    s = tl.program_id(0).to(tl.int64)
    own, best = s * N, tl.load(seeds + s * M)
    table, worth = table + own * N, worth + own
    if not PAIRWISE:
        inverse, relevance, slopes = inverse + own, relevance + own, slopes + own
    for i in range(M):
        best = tl.load(seeds + s * M + i)
        best = _look_from(best, table, inverse, relevance, slopes, worth, N, BLOCK, SUM, PAIRWISE)
    for step in range(DONE, K):
        tl.store(chosen + s * K + step, best)
        best = _look_from(best, table, inverse, relevance, slopes, worth, N, BLOCK, SUM, PAIRWISE)


def greedy_select(
    features: Tensor,
    relevance: Tensor,
    first: Tensor | None,
    k: int,
    *,
    weight: float | Tensor = 1.0,
    reduce: Literal["min", "sum"] = "min",
    taken: Tensor | None = None,
    available: Tensor | None = None,
    held: Held = "auto",
) -> Tensor:
    """As `greedy.greedy_select`."""
    if (none := none_chosen(features, k)) is not None:
        return none
    S, N, _ = features.shape
    dtype = held_dtype(S, N, held)
    directions = Directions.as_they_are(features) if dtype is None else Directions.of(features)
    products = None if dtype is None else directions.products(dtype=dtype)
    if first is None:
        first = relevance if taken is not None else _isolation(directions, products)
    factor = weight if isinstance(weight, Tensor) else torch.full_like(relevance, weight, dtype=torch.float32)
    worths = numbers(relevance), numbers(factor), barred(first, available)
    if products is None:
        return unheld_select(directions, *worths, k, reduce=reduce, taken=taken, available=available)
    return _with_table(products, directions.inverse, *worths, k, reduce=reduce, taken=taken, available=available)


def pairwise_select(
    worths: Tensor,
    first: Tensor,
    k: int,
    *,
    reduce: Literal["min", "sum"] = "min",
    taken: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """As `greedy.pairwise_select`."""
    if (none := none_chosen(worths, k)) is not None:
        return none
    start, table = barred(first, available), worths.contiguous()
    return _with_table(table, None, None, None, start, k, reduce=reduce, taken=taken, available=available)


def _with_table(
    table: Tensor,
    inverse: Tensor | None,
    relevance: Tensor | None,
    weight: Tensor | None,
    first: Tensor,
    k: int,
    *,
    reduce: Literal["min", "sum"],
    taken: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    S, N = first.shape
    chosen, seeds = begun(first, k, taken)
    block = min(max(16, triton.next_power_of_2(N)), _BLOCK)
    _greedy[(S,)](
        table,
        inverse,
        relevance,
        None if weight is None or inverse is None else weight * inverse,
        nothing_seen(first, available, reduce),
        seeds,
        chosen,
        N,
        k,
        seeds.shape[1],
        int(taken is None),
        BLOCK=block,
        SUM=reduce == "sum",
        PAIRWISE=inverse is None,
        num_warps=warps_of(block),
    )
    return chosen


@triton.jit
def _farthest(
    table: tl.tensor,
    inverse: tl.tensor,
    found: tl.tensor,
    N: tl.tensor,
    begin: tl.tensor,
    ROWS: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """How little a token resembles the one it resembles most, itself left out, from its row of products."""
    row, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index, highest = begin + row, tl.full([BLOCK], NEGATIVE, tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = tl.load(inverse + s * N + at, mask=at < N, other=0)
        products = tl.load(table + (s * ROWS + row) * N + at, mask=at < N, other=0)
        similar = similar_of(products, inverse + s * N, own, index)
        highest = tl.maximum(highest, tl.where((at < N) & (at != index), similar, NEGATIVE))
    tl.store(found + s * N + index, -tl.max(highest, axis=0))


def _isolation(directions: Directions, products: Tensor | None) -> Tensor:
    """What `greedy.isolation` says; products that are not held are computed for a block of tokens at a time."""
    S, N, _ = directions.rows.shape
    found = torch.empty(S, N, device=directions.rows.device)
    size = N if products is not None else max(1, min(N, MOST_HELD // 16 // (4 * S * N)))
    for begin in range(0, N, size):
        block = directions.products(begin, begin + size) if products is None else products
        _farthest[(block.shape[1], S)](
            block, directions.inverse, found, N, begin, block.shape[1], BLOCK=min(triton.next_power_of_2(N), 1024)
        )
    return found
