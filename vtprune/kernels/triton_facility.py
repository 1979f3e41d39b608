"""Facility location in Triton: what `greedy` says of `facility_select`, one program for a picture."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.directions import Directions
from vtprune.kernels.triton_common import NEGATIVE, block_of, in_groups, numbers, similar_of, warps_of


@triton.jit
def _gains(
    table: tl.tensor, inverse: tl.tensor, salience: tl.tensor, covered: tl.tensor, bound: tl.tensor, N: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The first gain of every token."""
    s, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    own = tl.load(inverse + s * N + at, mask=at < N, other=0)
    cover = tl.load(covered + s * N + at, mask=at < N, other=float("inf"))
    row = tl.load(table + (s * N + index) * N + at, mask=at < N, other=0)
    gain = tl.sum(tl.maximum(similar_of(row, inverse + s * N, own, index) - cover, 0), axis=0)
    barred = tl.load(bound + s * N + index) == NEGATIVE
    tl.store(bound + s * N + index, tl.where(barred, NEGATIVE, gain * tl.load(salience + s * N + index)))


@triton.jit
def _facility(
    table: tl.tensor,
    inverse: tl.tensor,
    salience: tl.tensor,
    covered: tl.tensor,
    bound: tl.tensor,
    chosen: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """All steps of one picture: a gain never grows, so an earlier one is a bound, brought up to date on demand."""
    s = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    own = tl.load(inverse + s * N + at, mask=at < N, other=0)
    cover = tl.load(covered + s * N + at, mask=at < N, other=float("inf"))
    bounds = tl.load(bound + s * N + at, mask=at < N, other=NEGATIVE)
    known = at >= 0
    for step in range(K):
        best = tl.argmax(bounds, axis=0, tie_break_left=True).to(tl.int64)
        while tl.max(tl.where(at == best, known.to(tl.int32), 0), axis=0) == 0:
            row = tl.load(table + (s * N + best) * N + at, mask=at < N, other=0)
            gain = tl.sum(tl.maximum(similar_of(row, inverse + s * N, own, best) - cover, 0), axis=0)
            bounds = tl.where(at == best, gain * tl.load(salience + s * N + best), bounds)
            known = known | (at == best)
            best = tl.argmax(bounds, axis=0, tie_break_left=True).to(tl.int64)
        tl.store(chosen + s * K + step, best)
        row = tl.load(table + (s * N + best) * N + at, mask=at < N, other=0)
        cover = tl.maximum(cover, similar_of(row, inverse + s * N, own, best))
        bounds = tl.where(at == best, NEGATIVE, bounds)
        known = bounds == NEGATIVE


def facility_select(
    features: Tensor,
    salience: Tensor,
    k: int,
    *,
    taken: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """As `greedy.facility_select`."""
    return in_groups(_select, k, features, salience, taken, available)


def _select(features: Tensor, salience: Tensor, taken: Tensor | None, available: Tensor | None, *, k: int) -> Tensor:
    """As `facility_select`, of pictures that hold their similarities together."""
    S, N, _ = features.shape
    directions, block = Directions.of(features), block_of(N)
    products = directions.products()
    covered = torch.zeros(S, N, device=features.device)
    if taken is not None:
        covered = directions.cosines(products, taken).amax(dim=1).clamp_min_(0)
    if available is not None:
        covered = covered.masked_fill(~available, float("inf"))
    bound = torch.where(covered == float("inf"), float("-inf"), 0.0)
    chosen, worth = torch.empty(S, k, dtype=torch.long, device=features.device), numbers(salience)
    warps = warps_of(block)
    _gains[(S, N)](products, directions.inverse, worth, covered, bound, N, BLOCK=block, num_warps=warps)
    _facility[(S,)](products, directions.inverse, worth, covered, bound, chosen, N, k, BLOCK=block, num_warps=warps)
    return chosen
