"""The specification of the kernels that select step by step, beyond `reference.greedy_select`.

All take the whole stack at once, wait for no device, and give ties to the first index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels import host
from vtprune.kernels.reference import cosine_similarity

NOVEL = 1e-5
"""A token this close to the span of the chosen ones (squared sine) is not told from rounding errors of fp32."""


def dpp_select(
    units: Tensor,
    relevance: Tensor,
    k: int,
    *,
    taken: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """Greedy MAP of a determinantal point process with kernel `relevance_i cos(i, j) relevance_j`, arXiv 1709.05135.

    Each step takes the token with the largest `relevance_i ** 2 * novelty_i`, where the novelty is what the chosen
    tokens leave of a unit vector (its squared distance to their span). Where nothing is left that is novel and of any
    relevance, the most relevant tokens follow.

    Args:
        units: (S, N, D) from `unit_rows`.
        relevance: (S, N), 0 or more; their scale does not matter.
        k: how many to choose.
        taken: (S, m) indices chosen before; they are conditioned on, whatever their relevance.
        available: (S, N) bool, False at what must not be chosen.

    Returns:
        (S, k) indices in the order of choice.
    """
    S, N, _ = units.shape
    m = 0 if taken is None else taken.shape[1]
    similarity = cosine_similarity(units)
    rows, start = similarity.view(S * N, N), torch.arange(S, device=units.device) * N
    novelty = similarity.diagonal(dim1=1, dim2=2).round()
    factor = similarity.new_zeros(S, m + k, N)
    relevance = relevance / relevance.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    barred = torch.zeros_like(novelty, dtype=torch.bool) if available is None else ~available

    def condition_on(index: Tensor, step: int) -> None:
        """One row of the Cholesky factor, and what it takes from the novelty of the others."""
        known = factor[:, :step]
        own = known.gather(2, index[:, None, None].expand(-1, step, 1))
        left = torch.baddbmm(rows.index_select(0, index + start)[:, None], own.transpose(1, 2), known, alpha=-1)
        pivot = novelty.gather(1, index[:, None])
        factor[:, step] = torch.where(pivot > NOVEL, left[:, 0] * pivot.clamp_min(NOVEL).rsqrt(), 0.0)
        novelty.sub_(factor[:, step].square())
        barred.scatter_(1, index[:, None], True)

    for step, index in enumerate(() if taken is None else taken.unbind(1)):
        condition_on(index, step)
    chosen = []
    for step in range(m, m + k):
        worth = torch.where((novelty > NOVEL) & (relevance > 0), relevance * novelty.clamp_min(0).sqrt(), relevance - 2)
        chosen.append(worth.masked_fill(barred, float("-inf")).argmax(dim=1))
        condition_on(chosen[-1], step)
    return torch.stack(chosen, dim=1)


def facility_select(
    units: Tensor,
    salience: Tensor,
    k: int,
    *,
    taken: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """Greedy facility location: each step takes the token whose salience times gain in coverage is largest.

    A token i is covered as far as its highest cosine similarity to a chosen token, at least 0. The gain of j is the sum
    over all i of what j would add to that.

    Args:
        units: (S, N, D) from `unit_rows`.
        salience: (S, N), 0 or more.
        k: how many to choose.
        taken: (S, m) indices chosen before; what they cover is covered.
        available: (S, N) bool, False at what must not be chosen and need not be covered.

    Returns:
        (S, k) indices in the order of choice.
    """
    S, N, _ = units.shape
    similarity = cosine_similarity(units)
    rows, start = similarity.view(S * N, N), torch.arange(S, device=units.device) * N
    covered = torch.zeros_like(salience)
    if taken is not None:
        covered = similarity.gather(1, taken[:, :, None].expand(-1, -1, N)).amax(dim=1).clamp_min_(0)
    barred = torch.zeros_like(salience, dtype=torch.bool) if available is None else ~available
    covered = covered.masked_fill(barred, float("inf"))
    if host.holds(units):
        return host.facility_select(similarity, salience, covered, barred, k)
    chosen = []
    for _ in range(k):
        gain = (similarity - covered[:, None]).clamp_min_(0).sum(dim=2)
        chosen.append((salience * gain).masked_fill(barred, float("-inf")).argmax(dim=1))
        covered = torch.maximum(covered, rows.index_select(0, chosen[-1] + start))
        barred = barred.scatter(1, chosen[-1][:, None], True)
    return torch.stack(chosen, dim=1)


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
