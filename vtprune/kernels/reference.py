"""The specification of every kernel, in plain PyTorch: tensors in, tensors out, fp32 inside, first-index ties."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vtprune.kernels import host
from vtprune.kernels.backends import kernel


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


@kernel("triton_rows")
def cut_sequence(tensors: Sequence[Tensor], indices: Tensor, valid: Tensor | None = None) -> list[Tensor]:
    """What is left of tensors that run along the same sequence: embeddings, position ids, masks, further inputs.

    Args:
        tensors: each (B, L, ...) of any dtype and strides.
        indices: (B, K), which of the L stay.
        valid: (B, K) bool, False at padding, where zeros are written; None: there is none.

    Returns:
        Of each (B, K, ...), laid out in memory as it was: where L and B lay behind other dimensions, they still do.
    """
    found = []
    for tensor in tensors:
        short = rows_at(tensor, indices)
        if valid is not None:
            padding = ~valid.view(*valid.shape, *(1,) * (tensor.ndim - 2))
            short = short.masked_fill(padding, 0)
        found.append(in_order_of(tensor, short))
    return found


def in_order_of(tensor: Tensor, short: Tensor) -> Tensor:
    """`short`, with its dimensions in memory in the order of those of `tensor`."""
    order = memory_order(tensor)
    return short.permute(order).contiguous().permute(undone(order))


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of a tensor, those of the largest steps in memory first; those that are repeated stay in place."""
    steps = tensor.stride()
    if 0 in steps:
        return list(range(tensor.ndim))
    return sorted(range(tensor.ndim), key=lambda dim: (-steps[dim], dim))


def undone(order: list[int]) -> list[int]:
    """The order that undoes a permutation of dimensions."""
    return [order.index(dim) for dim in range(len(order))]


@kernel("triton_rows")
def merge_rows(features: Tensor, into: Tensor, weights: Tensor, k: int) -> Tensor:
    """Weighted means of the tokens that each of k groups consists of: the same ones on every run.

    Args:
        features: (S, N, D); what is no number counts as 0.
        into: (S, N), the group of each token, -1 for none.
        weights: (S, N), what a token counts in the mean, nothing where negative; where those of a group add up to
            nothing, its tokens count alike.
        k: how many groups; every one has a token.

    Returns:
        (S, k, D), fp32.
    """
    finite = features.float().nan_to_num(nan=0.0)
    if host.holds(features):
        return host.merge_rows(finite, into, weights, k)
    return mixture_of(into, weights, k) @ finite


def mixture_of(into: Tensor, weights: Tensor, k: int) -> Tensor:
    """The means of `merge_rows` as a matrix (S, k, N)."""
    belongs = into[:, None] == torch.arange(k, device=into.device)[:, None]
    mixture = belongs * weights[:, None].clamp(min=0)
    total = mixture.sum(dim=2, keepdim=True)
    mixture = torch.where(total > 0, mixture, belongs.to(mixture.dtype))
    return mixture / mixture.sum(dim=2, keepdim=True)


def rows_at(rows: Tensor, indices: Tensor) -> Tensor:
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
