"""The specification of the kernels that select step by step.

All take the whole stack at once, wait for no device, and give ties to the first index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vtprune.errors import InvalidOption
from vtprune.kernels import host
from vtprune.kernels.backends import kernel
from vtprune.kernels.reference import cosine_similarity, rows_at, unit_rows

NOVEL = 1e-5
"""A token this close to the span of the chosen ones (squared sine) is not told from rounding errors of fp32."""
MOST_HELD = 2**31
"""Similarities of more bytes than that are not held at once where nothing else is said."""
_ROWS_AT_ONCE = 1024

Held = Literal["auto"] | torch.dtype | None


@kernel("triton_greedy")
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
    """Greedy selection by cosine similarity: k steps for the whole stack at once, without a host synchronisation.

    Seen from a chosen c, candidate i is worth `relevance_i - weight_i * cos(i, c)`, reduced over all chosen; each step
    takes the best one, the lowest index on ties. Max-min, max-sum, MMR and score x distance are of this form.

    Args:
        features: (S, N, D), of any length.
        relevance: (S, N).
        first: (S, N) worth of being the first choice, where available; None: to resemble the token it resembles most
            as little as possible. Unused where `taken` is given.
        k: how many to choose.
        weight: of similarity against relevance, one number or (S, N).
        reduce: `"min"` or `"sum"` over the chosen ones.
        taken: (S, m) indices chosen before, m >= 1; they count as chosen and are not chosen again.
        available: (S, N) bool, False at what must not be chosen.
        held: dtype in which S x N x N similarities are held; None: they are computed anew in every step, and memory is
            O(N). `"auto"` holds them in fp32 up to `MOST_HELD` bytes. On the host it changes nothing.

    Returns:
        (S, k) indices in the order of choice.
    """
    if (none := none_chosen(features, k)) is not None:
        return none
    units = unit_rows(features)
    if host.holds(units):
        return host.greedy_select(
            units, relevance, first, k, weight=weight, reduce=reduce, taken=taken, available=available
        )
    S, N, _ = units.shape
    if first is None:
        first = relevance if taken is not None else isolation(units)
    dtype = held_dtype(S, N, held)
    table = None if dtype is None else cosine_similarity(units).to(dtype).view(S * N, N)
    start = torch.arange(S, device=units.device) * N

    def seen_from(best: Tensor) -> Tensor:
        if table is None:
            similar = torch.bmm(units, rows_at(units, best[:, None]).transpose(1, 2))[..., 0]
        else:
            similar = table.index_select(0, best + start).float()
        return relevance - weight * similar

    return _steps(seen_from, first, k, reduce=reduce, taken=taken, available=available)


@kernel("triton_greedy")
def pairwise_select(
    worths: Tensor,
    first: Tensor,
    k: int,
    *,
    reduce: Literal["min", "sum"] = "min",
    taken: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """`greedy_select` where it is known what each token (last axis) is worth, seen from each: `worths` (S, N, N).

    The diagonal may hold anything but NaN. All else as there.
    """
    if (none := none_chosen(worths, k)) is not None:
        return none
    if host.holds(worths):
        return host.pairwise_select(worths, first, k, reduce=reduce, taken=taken, available=available)
    S, N, _ = worths.shape
    rows, start = worths.view(S * N, N), torch.arange(S, device=worths.device) * N

    def seen_from(best: Tensor) -> Tensor:
        return rows.index_select(0, best + start)

    return _steps(seen_from, first, k, reduce=reduce, taken=taken, available=available)


def _steps(
    seen_from: Callable[[Tensor], Tensor],
    first: Tensor,
    k: int,
    *,
    reduce: Literal["min", "sum"],
    taken: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    """The steps of a greedy selection; `seen_from` tells what all (S, N) are worth, seen from one of each row (S,)."""
    merge = torch.minimum if reduce == "min" else torch.add

    def worth_of(best: Tensor) -> Tensor:
        return seen_from(best).scatter(1, best[:, None], float("-inf"))

    if available is not None:
        first = first.masked_fill(~available, float("-inf"))
    chosen = [first.argmax(dim=1)] if taken is None else []
    worth = functools.reduce(merge, map(worth_of, chosen if taken is None else taken.unbind(1)))
    if available is not None:
        worth = worth.masked_fill(~available, float("-inf"))
    for _ in range(k - len(chosen)):
        chosen.append(worth.argmax(dim=1))
        worth = merge(worth, worth_of(chosen[-1]))
    return torch.stack(chosen, dim=1)


def none_chosen(tokens: Tensor, k: int) -> Tensor | None:
    """The choice (S, k) where there are no pictures among `tokens` (S, N, ...), or nothing is to be chosen."""
    if len(tokens) and k:
        return None
    return torch.empty(len(tokens), k, dtype=torch.long, device=tokens.device)


def held_dtype(S: int, N: int, held: Held) -> torch.dtype | None:
    """What `held` of `greedy_select` comes to for S x N x N similarities."""
    if held == "auto":
        return torch.float32 if 4 * S * N * N <= MOST_HELD else None
    if held not in (None, torch.float32, torch.bfloat16):
        raise InvalidOption(f"held={held!r}: expected 'auto', torch.float32, torch.bfloat16 or None")
    return held


def isolation(units: Tensor) -> Tensor:
    """How little each of `units` (S, N, D) resembles the one it resembles most, itself left out: (S, N)."""
    found = []
    for start in range(0, units.shape[1], _ROWS_AT_ONCE):
        similar = units[:, start : start + _ROWS_AT_ONCE] @ units.transpose(1, 2)
        similar.diagonal(offset=start, dim1=1, dim2=2).fill_(float("-inf"))
        found.append(similar.amax(dim=2).neg_())
    return torch.cat(found, dim=1)


@kernel("triton_dpp")
def dpp_select(
    features: Tensor,
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
        features: (S, N, D), of any length.
        relevance: (S, N), 0 or more; their scale does not matter.
        k: how many to choose.
        taken: (S, m) indices chosen before; they are conditioned on, whatever their relevance.
        available: (S, N) bool, False at what must not be chosen.

    Returns:
        (S, k) indices in the order of choice.
    """
    if (none := none_chosen(features, k)) is not None:
        return none
    units = unit_rows(features)
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


@kernel("triton_facility")
def facility_select(
    features: Tensor,
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
        features: (S, N, D), of any length.
        salience: (S, N), 0 or more.
        k: how many to choose.
        taken: (S, m) indices chosen before; what they cover is covered.
        available: (S, N) bool, False at what must not be chosen and need not be covered.

    Returns:
        (S, k) indices in the order of choice.
    """
    if (none := none_chosen(features, k)) is not None:
        return none
    units = unit_rows(features)
    S, N, _ = units.shape
    similarity = cosine_similarity(units)
    rows, start = similarity.view(S * N, N), torch.arange(S, device=units.device) * N
    salience = salience.float()
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
