"""Forms of the kernels for tensors in host memory, where the reference would pay more for its operators than for work.

Nothing here waits for a device, so reading values is free. What is computed is what `reference` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_BLOCK = 96
_ROWS_AT_ONCE = 48
_GAINS_AT_ONCE = 8
_CHEAP_PRODUCT = 2**27
"""Up to that many multiplications all similarities of a picture are computed rather than those that are asked for."""


def holds(tensor: Tensor) -> bool:
    """Whether `tensor` lies in host memory."""
    return tensor.device.type == "cpu"


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    return bool(np.isfinite(_values(tensor)).all())


def has_nan(scores: Tensor) -> bool:
    """Whether a number is missing among scores (S, N); infinite ones are numbers."""
    return bool(scores.isnan().any())


def is_within(values: Tensor, least: int, end: int) -> bool:
    """Whether no number is below `least`, or as high as `end`."""
    return values.numel() == 0 or (int(values.min()) >= least and int(values.max()) < end)


def read_counts(counts: Tensor) -> list[int]:
    """Numbers that depend on what tokens hold, one after the other: the one place that waits to learn them."""
    return [int(count) for count in counts.flatten().tolist()]


def cosine_similarity(units: Tensor) -> Tensor:
    """Products (S, N, N) of all rows of `units` (S, N, D); blocks above the diagonal are mirrored, not multiplied."""
    S, N, _ = units.shape
    similarity = units.new_empty(S, N, N)
    for own, rows in zip(_values(similarity), units, strict=True):
        for start in range(0, N, _BLOCK):
            _place(own, start, _values(_product(rows[start:], rows[start : start + _BLOCK])))
    return similarity


def _place(similarity: np.ndarray, start: int, product: np.ndarray) -> None:
    """Write `product` (N - start, m), of all rows from `start` on with the first m of them, on both sides."""
    m = product.shape[1]
    similarity[start:, start : start + m] = product
    similarity[start : start + m, start + m :] = product[m:].T


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.T`, (n, D) and (m, D) to (n, m), as a 1 x 1 convolution of a picture of n pixels.

    Convolutions go to oneDNN, whose fp32 code is up to twice as fast as that behind `@`. On one thread torch would turn
    this one back into `@`, were it not for the dilation, which means nothing to a 1 x 1 kernel.
    """
    n, D = rows.shape
    picture = rows.view(1, n, 1, D).permute(0, 3, 1, 2)
    return torch.conv2d(picture, columns[:, :, None, None], dilation=2)[0, :, :, 0].T


def greedy_select(
    units: Tensor,
    relevance: Tensor,
    first: Tensor | None,
    k: int,
    *,
    weight: float | Tensor,
    reduce: Literal["min", "sum"],
    taken: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    """What `greedy.greedy_select` says of unit vectors, all rows of the stack in each step."""
    factor = weight.float()[:, None] if isinstance(weight, Tensor) else weight
    _, N, D = units.shape
    # The best by a minimum are likely to be good in the next step too, so that their rows can be computed ahead.
    ahead = reduce == "min" and (first is not None or taken is not None)
    if ahead and 3 * k <= N and N * N * D > _CHEAP_PRODUCT:
        worths = _Worths(units, _values(relevance.float()), factor)
        start = relevance if first is None else first
        return _steps(worths.seen_from, start, k, reduce=reduce, taken=taken, available=available)
    similarity = cosine_similarity(units)
    if first is None:
        similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        first = similarity.amax(dim=2).neg_()
    known = similarity.mul_(-factor).add_(relevance[:, None])
    return pairwise_select(known, first, k, reduce=reduce, taken=taken, available=available)


def pairwise_select(
    worths: Tensor,
    first: Tensor,
    k: int,
    *,
    reduce: Literal["min", "sum"],
    taken: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    """What `greedy.pairwise_select` says, all rows of the stack in each step."""
    table, stack = _values(worths.float()), np.arange(len(worths))

    def seen_from(best: np.ndarray, promise: np.ndarray) -> np.ndarray:
        return table[0, best] if len(table) == 1 else table[stack, best]

    return _steps(seen_from, first, k, reduce=reduce, taken=taken, available=available)


def _steps(
    seen_from: Callable[[np.ndarray, np.ndarray], np.ndarray],
    first: Tensor,
    k: int,
    *,
    reduce: Literal["min", "sum"],
    taken: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    """The steps of a greedy selection in numpy: each costs a tenth of what torch would take.

    `seen_from` tells what all (S, N) are worth, seen from one of each row (S,); the second argument is high where rows
    are likely to be asked for soon.
    """
    S, N = first.shape
    merge, neutral = (np.minimum, np.inf) if reduce == "min" else (np.add, 0.0)
    begins, chosen = np.arange(0, S * N, N), np.empty((k, S), dtype=np.int64)
    worth = np.full((S, N), neutral, dtype=np.float32)
    flat, start = worth.reshape(-1), _values(first.float())
    if available is not None:
        worth[~_values(available)] = -np.inf
        start = np.where(_values(available), start, -np.inf)
    candidates = start
    unseen = [] if taken is None else list(_values(taken).T)
    for step in range(k):
        for best in unseen:
            merge(worth, seen_from(best, candidates), out=worth)
            flat[begins + best] = -np.inf
            candidates = worth
        unseen = [candidates.argmax(axis=1, out=chosen[step])]
    return torch.from_numpy(chosen).T.contiguous()


def merge_rows(features: Tensor, into: Tensor, weights: Tensor, k: int) -> Tensor:
    """What `reference.merge_rows` says of finite features in fp32: every token is added where it belongs, and once."""
    S, N, D = features.shape
    weights = weights.float().clamp(min=0)
    groups = torch.where(into < 0, k, into) + torch.arange(S)[:, None] * (k + 1)
    total = torch.zeros(S * (k + 1)).index_add(0, groups.flatten(), weights.flatten())
    counts = torch.where(total.gather(0, groups.flatten()).view(S, N) > 0, weights, 1.0)
    amount = torch.zeros(S * (k + 1)).index_add(0, groups.flatten(), counts.flatten())
    shares = counts / amount.gather(0, groups.flatten()).view(S, N)
    rows = (features * shares[..., None]).flatten(0, 1)
    return torch.zeros(S * (k + 1), D).index_add(0, groups.flatten(), rows).view(S, k + 1, D)[:, :k]


def facility_select(similarity: Tensor, salience: Tensor, covered: Tensor, barred: Tensor, k: int) -> Tensor:
    """What `greedy.facility_select` says, lazily: a gain never grows, so one known from an earlier step is a bound.

    Each step brings the highest bounds up to date, in all pictures that need it, until the highest of all is.
    """
    S, N, _ = similarity.shape
    table, worth, cover = _values(similarity), _values(salience.float()), _values(covered).copy()
    stack, chosen = np.arange(S), np.empty((S, k), dtype=np.int64)

    def gains_of(rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        gained = np.maximum(table[rows[:, None], tokens] - cover[rows][:, None], 0).sum(axis=2)
        return worth[rows[:, None], tokens] * gained

    blocks = np.array_split(np.arange(N), -(-N // _ROWS_AT_ONCE))
    bound = np.concatenate([gains_of(stack, np.broadcast_to(block, (S, len(block)))) for block in blocks], axis=1)
    bound[_values(barred)] = -np.inf
    known = np.ones((S, N), dtype=bool)
    for step in range(k):
        best = bound.argmax(axis=1)
        while len(stale := np.flatnonzero(~known[stack, best])):
            count = min(_GAINS_AT_ONCE, N)
            likely = np.argpartition(np.where(known, -np.inf, bound)[stale], -count, axis=1)[:, -count:]
            where = (stale[:, None], likely)
            bound[where] = np.where(known[where], bound[where], gains_of(stale, likely))
            known[where] = True
            best[stale] = bound[stale].argmax(axis=1)
        chosen[:, step] = best
        np.maximum(cover, table[stack, best], out=cover)
        bound[stack, best] = -np.inf
        known = np.isneginf(bound)
    return torch.from_numpy(chosen)


def kept_indices(kept: Tensor, size: int, *, left_padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `reference.kept_indices` says."""
    B, L = kept.shape
    indices, valid = np.zeros((B, size), dtype=np.int64), np.zeros((B, size), dtype=bool)
    slots = np.empty((B, L), dtype=np.int64)
    for row, own, real, slot in zip(_values(kept), indices, valid, slots, strict=True):
        (found,) = row.nonzero()
        start = size - len(found) if left_padded else 0
        own[start : start + len(found)], real[start : start + len(found)] = found, True
        np.maximum(row.cumsum() + (start - 1), 0, out=slot)
    return torch.from_numpy(indices), torch.from_numpy(valid), torch.from_numpy(slots)


def vacated_below(ids: Tensor, was: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """What `reference.vacated_below` says."""
    owned = _values(ids)
    below, count = np.zeros_like(owned), np.empty_like(owned, shape=(len(owned), 1))
    for own, before, after, found, total in zip(owned, _values(was), _values(stays), below, count, strict=True):
        vacated = np.zeros(own.max(initial=0) + 1, dtype=bool)
        vacated[own[before]] = True
        vacated[own[after]] = False
        found[before] = (vacated.cumsum() - vacated)[own[before]]
        total[:] = vacated.sum()
    return torch.from_numpy(below), torch.from_numpy(count)


def _values(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


class _Worths:
    """Rows of `relevance - weight * similarity` of a stack of `units` (S, N, D), computed when asked for.

    With each go those that are likely to be asked for next: a product with a few rows costs little more than one with a
    single row. Where guesses fail, everything is computed.
    """

    def __init__(self, units: Tensor, relevance: np.ndarray, weight: float | Tensor) -> None:
        self._units = units
        self._relevance = relevance
        self._weight = _values(weight[:, 0]) if isinstance(weight, Tensor) else np.full((len(units), 1), weight, "f4")
        self._known: list[dict[int, np.ndarray]] = [{} for _ in units]

    def seen_from(self, best: np.ndarray, promise: np.ndarray) -> np.ndarray:
        """Rows (S, N), one of each picture; `promise` (S, N) is high where rows are likely to be asked for soon."""
        found = [self._row(picture, index, promise[picture]) for picture, index in enumerate(best.tolist())]
        return found[0][None] if len(found) == 1 else np.stack(found)

    def _row(self, picture: int, index: int, promise: np.ndarray) -> np.ndarray:
        known = self._known[picture]
        if index not in known:
            self._compute(picture, index, promise)
        return known[index]

    def _compute(self, picture: int, index: int, promise: np.ndarray) -> None:
        units, known, N = self._units[picture], self._known[picture], len(promise)
        if 2 * len(known) >= N:
            wanted, product = np.arange(N), _values(cosine_similarity(units[None])[0])
        else:
            likely = promise.copy()
            likely[list(known)] = -np.inf
            likely[index] = np.inf
            wanted = np.argpartition(likely, -min(_ROWS_AT_ONCE, N))[-_ROWS_AT_ONCE:]
            product = _values(_product(units, units.index_select(0, torch.from_numpy(wanted)))).T
        rows = np.multiply(product, -self._weight[picture], order="C")
        rows += self._relevance[picture]
        known.update(zip(wanted.tolist(), rows, strict=True))
