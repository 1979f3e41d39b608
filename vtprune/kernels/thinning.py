"""The specification of the kernels that thin lists of tokens out: nothing is waited for, ties go to the first index."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_redundant(similarity: Tensor, order: Tensor, count: Tensor, k: int, *, step: int) -> Tensor:
    """Thin out lists of tokens to `k` each, `step` at a time, by the alternating partition of ToMe (arXiv 2210.09461).

    Of a list, every second token from the first on is held against the others. The `step` with the highest similarity
    to any of those go (never more than too many, of equal ones the later in the list); the others of the first half,
    most similar first, and then the second half are the next list.

    Args:
        similarity: (S, N, N).
        order: (S, L) indices: the lists.
        count: (S, 1) long, k <= count <= L: how many of `order` are in the list, from its beginning.
        k: how many to leave.
        step: how many to drop in a round.

    Returns:
        (S, k) indices.
    """
    stack = torch.arange(order.shape[0], device=order.device)[:, None, None]
    while order.shape[1] > k:
        length = order.shape[1]
        listed = torch.arange(length, device=order.device) < count
        ours, theirs = order[:, 0::2], order[:, 1::2]
        match = similarity[stack, ours[:, :, None], theirs[:, None]]
        nearest = match.masked_fill(~listed[:, None, 1::2], float("-inf")).amax(dim=2)
        # Later first among equals: a stable sort of the reversed list. Below any match stand those not listed.
        nearest = nearest.clamp_min(-2).masked_fill(~listed[:, 0::2], -3).flip(1)
        ranked = nearest.sort(dim=1, descending=True, stable=True).indices
        drops = (count - k).clamp(max=step).minimum((count + 1) // 2)
        stays = torch.cat([listed[:, 0::2].flip(1).gather(1, ranked), listed[:, 1::2]], dim=1)
        stays[:, : ours.shape[1]] &= torch.arange(ours.shape[1], device=order.device) >= drops
        joined = torch.cat([ours.flip(1).gather(1, ranked), theirs], dim=1)
        shorter = length - min(step, length - k, (length + 1) // 2)
        order = joined.gather(1, stays.byte().sort(dim=1, descending=True, stable=True).indices[:, :shorter])
        count = count - drops
    return order


def suppress(conflicts: Tensor, order: Tensor) -> Tensor:
    """Non-maximum suppression: in the given order, whoever is still there removes all that conflict with it.

    Args:
        conflicts: (S, N, N) bool, symmetric, False on the diagonal.
        order: (S, N) indices, best first.

    Returns:
        (S, N) bool, True at survivors.
    """
    S, N = order.shape
    rows, start = conflicts.view(S * N, N), torch.arange(S, device=order.device) * N
    removed = torch.zeros_like(order, dtype=torch.bool)
    for index in order.unbind(1):
        own = removed.gather(1, index[:, None])
        removed |= rows.index_select(0, index + start) & ~own
    return ~removed


def places_in(order: Tensor) -> Tensor:
    """Where (S, N) each index stands in `order` (S, N)."""
    ramp = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ramp)
