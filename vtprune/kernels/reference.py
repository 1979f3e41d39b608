"""The specification of every kernel, in plain PyTorch: tensors in, tensors out, fp32 inside, first-index ties."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from vtprune.kernels import host


def unit_rows(features: Tensor) -> Tensor:
    """Features (S, N, D) in fp32 with rows of length 1; a row of zeros or without end is similar to nothing."""
    wide = features.float()
    length = wide.norm(dim=-1, keepdim=True).clamp_min_(1e-12)
    units = wide / length if wide is features else wide.div_(length)
    return units if host.holds(length) and host.is_finite(length) else units.nan_to_num_(nan=0.0)


def cosine_similarity(units: Tensor) -> Tensor:
    """Cosine similarity (S, N, N) of `unit_rows` (S, N, D)."""
    return host.cosine_similarity(units) if host.holds(units) else units @ units.transpose(1, 2)


def top_select(scores: Tensor, k: int) -> Tensor:
    """Indices (S, k) of the k highest scores (S, N), best first; the lower index wins a tie."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]


def greedy_select(
    units: Tensor,
    relevance: Tensor,
    first: Tensor,
    k: int,
    *,
    weight: float = 1.0,
    reduce: Literal["min", "sum"] = "min",
    worths: Tensor | None = None,
    taken: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """Greedy selection: k steps for the whole stack at once, without a host synchronisation.

    Seen from a chosen c, candidate i is worth `relevance_i - weight * cos(i, c)`, reduced over all chosen; each step
    takes the best one, the lowest index on ties. Max-min, max-sum and MMR are of this form.

    Args:
        units: (S, N, D) from `unit_rows`.
        relevance: (S, N).
        first: (S, N) worth of being the first choice, where available; unused where `taken` is given.
        k: how many to choose.
        weight: of similarity against relevance.
        reduce: `"min"` or `"sum"` over the chosen ones.
        worths: (S, N, N) where known: what each (last axis) is worth, seen from each; overwritten. Its diagonal may
            hold anything but NaN. `units`, `relevance` and `weight` are not read then.
        taken: (S, m) indices chosen before, m >= 1; they count as chosen and are not chosen again.
        available: (S, N) bool, False at what must not be chosen.

    Returns:
        (S, k) indices in the order of choice.
    """
    if host.holds(units):
        return host.greedy_select(
            units, relevance, first, k, weight=weight, reduce=reduce, worths=worths, taken=taken, available=available
        )
    S, N, _ = units.shape
    table = cosine_similarity(units).mul_(-weight).add_(relevance[:, None]) if worths is None else worths
    table.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    start = torch.arange(S, device=units.device) * N
    if available is not None:
        first = first.masked_fill(~available, float("-inf"))

    def seen_from(best: Tensor) -> Tensor:
        return table.view(S * N, N).index_select(0, best + start)

    merge = torch.minimum if reduce == "min" else torch.add
    chosen = [first.argmax(dim=1)] if taken is None else []
    worth = functools.reduce(merge, map(seen_from, chosen if taken is None else taken.unbind(1)))
    if available is not None:
        worth = worth.masked_fill(~available, float("-inf"))
    for _ in range(k - len(chosen)):
        chosen.append(worth.argmax(dim=1))
        worth = merge(worth, seen_from(chosen[-1]))
    return torch.stack(chosen, dim=1)


def kept_indices(kept: Tensor, size: int, *, left_padded: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending indices of the True entries of every row, padded to `size`, without a host synchronisation.

    Args:
        kept: (B, L) bool with at most `size` True entries a row.
        size: length of the result, known from shapes.
        left_padded: put the padding on the left.

    Returns:
        `(indices (B, size), valid (B, size), slots (B, L))`; padding points at an entry that was not kept, or at 0.
        `slots` says where in `indices` each entry stands, or the last True one before it.
    """
    if host.holds(kept):
        return host.kept_indices(kept, size, left_padded=left_padded)
    B, L = kept.shape
    count = kept.sum(dim=1, keepdim=True)
    slots = kept.cumsum(dim=1) - 1
    if left_padded:
        slots = slots + (size - count)
    source = torch.arange(L, device=kept.device).expand(B, L)
    indices = slots.new_zeros(B, size + 1).scatter_(1, slots.masked_fill(~kept, size), source)[:, :size]
    ramp = torch.arange(size, device=kept.device).expand(B, size)
    valid = ramp >= size - count if left_padded else ramp < count
    return indices, valid, slots.clamp_(min=0)


def moved(at: Tensor, slots: Tensor, size: int) -> Tensor:
    """Where tokens at places `at`, counted through all of `slots` (B, L), stand in B sequences of `size`: as counted.

    `slots` is as `kept_indices` returns it.
    """
    return at // slots.shape[1] * size + slots.reshape(-1)[at]


def vacated_below(ids: Tensor, was: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """How far every id (B, M) moves down when the ids are closed up that some token had and none has any more.

    Args:
        ids: (B, M) position ids.
        was: (B, M) bool, tokens that had them.
        stays: (B, M) bool, those of them that still do.

    Returns:
        `(number of vacated ids below each that stays (B, M), 0 where nothing was; number of all vacated ids (B, 1))`.
    """
    if host.holds(ids):
        return host.vacated_below(ids, was, stays)
    nothing = torch.iinfo(ids.dtype).max
    ordered, order = ids.masked_fill(~was, nothing).sort(dim=1)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = first.cumsum(dim=1) - 1
    occupied = torch.zeros_like(ordered).scatter_reduce_(1, group, stays.gather(1, order).to(ids.dtype), "amax")
    vacated = first & (occupied.gather(1, group) == 0) & (ordered != nothing)
    below = vacated.cumsum(dim=1) - vacated.to(ids.dtype)
    moves = torch.zeros_like(ids).scatter_(1, order, below).masked_fill(~was, 0)
    return moves, vacated.sum(dim=1, keepdim=True)


def cut_sequence(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows (B, K, ...) of `rows` (B, L, ...) at `indices` (B, K)."""
    B, L = rows.shape[:2]
    return take_rows(rows, indices if B == 1 else indices + torch.arange(0, B * L, L, device=indices.device)[:, None])


def take_rows(rows: Tensor, at: Tensor) -> Tensor:
    """Rows (S, K, ...) of `rows` (B, L, ...) at `at` (S, K), which counts through all B * L of them."""
    return rows.flatten(0, 1).index_select(0, at.reshape(-1)).view(*at.shape, *rows.shape[2:])


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which autocast changes nothing."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Tensors one after the other along `dim`; a single one is no copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)
