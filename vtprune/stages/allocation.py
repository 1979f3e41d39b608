"""Budgets that several groups of tokens share: exact counts, a row of the stack at a time, known from no host read."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels import reference as kernels
from vtprune.kernels import thinning


def largest_remainder(weights: Tensor, total: int | Tensor, cap: Tensor) -> Tensor:
    """Whole numbers (S, G) in proportion to the weights: rounded down, then one more by the largest remainder.

    What caps cut off is handed out one each, the largest remainder first, round after round among groups with room.

    Args:
        weights: (S, G), read as 0 where negative; a row without any weight shares evenly.
        total: sum of a row, or one for each row (S, 1).
        cap: (S, G) long, the most a group can take.

    Returns:
        (S, G) long, of sum `total`, or that of `cap` where it is smaller. The lower index wins a tie.
    """
    weights = weights.float().nan_to_num(nan=0.0).clamp(min=0)
    mass = weights.sum(dim=1, keepdim=True)
    exact = torch.where(mass > 0, weights / mass, 1 / weights.shape[1]) * total
    given = torch.minimum(exact.floor().long(), cap)
    room = cap - given
    rest = total - given.sum(dim=1, keepdim=True)
    level = _level(room, rest)
    poured = torch.minimum(room, level)
    over = rest - poured.sum(dim=1, keepdim=True)
    remainder = (exact - exact.floor()).masked_fill(room <= level, float("-inf"))
    last = thinning.places_in(kernels.top_select(remainder, remainder.shape[1])) < over
    return given + poured + (last & (room > level)).long()


def filled(weights: Tensor, total: int | Tensor, cap: Tensor) -> Tensor:
    """Reals (S, G) in proportion to the weights and none above `cap`: what exceeds one goes to the others by weight.

    Their sum is `total`, or that of the caps of all groups with a weight, where it is smaller.
    """
    weights = weights.float().nan_to_num(nan=0.0).clamp(min=0)
    ratio = torch.where(weights > 0, cap / weights, float("inf"))
    ratio, order = ratio.sort(dim=1, stable=True)
    caps, worth = cap.gather(1, order), weights.gather(1, order)
    before = caps.cumsum(dim=1) - caps
    behind = worth.flip(1).cumsum(dim=1).flip(1).clamp_min(1e-30)
    level = (total - before) / behind
    full = (level >= ratio).sum(dim=1, keepdim=True)
    shares = weights * level.gather(1, full.clamp(max=weights.shape[1] - 1)).clamp(min=0)
    return torch.where(thinning.places_in(order) < full, cap, torch.minimum(shares, cap))


def best_of_groups(scores: Tensor, groups: Tensor, quotas: Tensor, k: int) -> Tensor:
    """The tokens with the highest scores of every group.

    Args:
        scores: (S, N); the lower index wins a tie.
        groups: (S, N) long in [0, G).
        quotas: (S, G) long of sum `k` a row, none above the number of tokens of its group.
        k: how many to choose.

    Returns:
        (S, k) indices, group after group, best first.
    """
    N = scores.shape[1]
    order = kernels.top_select(scores, N)
    owner, place = groups.gather(1, order).sort(dim=1, stable=True)
    members = order.gather(1, place)
    sizes = group_sizes(groups, torch.ones_like(groups), quotas.shape[1])
    starts = sizes.cumsum(dim=1) - sizes
    rank = torch.arange(N, device=scores.device) - starts.gather(1, owner)
    return members.gather(1, kernels.top_select((rank < quotas.gather(1, owner)).float(), k))


def group_sizes(groups: Tensor, members: Tensor, count: int) -> Tensor:
    """How many (S, count) of the `members` (S, N) are in each of `groups` (S, N)."""
    return groups.new_zeros(groups.shape[0], count).scatter_add_(1, groups, members.long())


def _level(room: Tensor, rest: Tensor) -> Tensor:
    """The highest level (S, 1) that groups with `room` (S, G) can all be filled to, as far as they go, with `rest`.

    Filling to a level takes the smallest, over all i, of the i smallest rooms together and the level for each other.
    """
    ascending = room.sort(dim=1).values
    below = ascending.cumsum(dim=1) - ascending
    others = torch.arange(room.shape[1], 0, -1, device=room.device)
    return torch.div(rest - below, others, rounding_mode="floor").amax(dim=1, keepdim=True)
