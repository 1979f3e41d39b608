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


def holds(tensor: Tensor) -> bool:
    """Whether `tensor` lies in host memory."""
    return tensor.device.type == "cpu"


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    return bool(np.isfinite(_values(tensor)).all())


def has_nan(scores: Tensor) -> bool:
    """Whether a number is missing among scores (S, N); infinite ones are numbers."""
    return bool(scores.isnan().any())


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
    first: Tensor,
    k: int,
    *,
    weight: float,
    reduce: Literal["min", "sum"],
    worths: Tensor | None,
    taken: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    """What `reference.greedy_select` says, row by row in numpy: a step costs a tenth of what torch would take."""
    S, N, _ = units.shape
    if worths is None and 3 * k > N:
        worths = cosine_similarity(units).mul_(-weight).add_(relevance[:, None])
    merge, neutral = (np.minimum, np.inf) if reduce == "min" else (np.add, 0.0)
    base, starts, chosen = _values(relevance), _values(first), np.empty((S, k), dtype=np.int64)
    for row in range(S):
        seen_from = _Worths(units[row], base[row], weight).seen_from if worths is None else _known(worths[row])
        worth = np.full(N, neutral, dtype=np.float32)
        if available is not None:
            worth[~_values(available[row])] = -np.inf
        promise, candidates = base[row], merge(starts[row], worth)
        unseen = [] if taken is None else taken[row].tolist()
        for step in range(k):
            for index in unseen:
                merge(worth, seen_from(index, promise), out=worth)
                worth[index] = -np.inf
                promise = candidates = worth
            best = int(candidates.argmax())
            chosen[row, step] = best
            unseen = [best]
    return torch.from_numpy(chosen)


def facility_select(similarity: Tensor, salience: Tensor, covered: Tensor, barred: Tensor, k: int) -> Tensor:
    """What `greedy.facility_select` says, lazily: a gain never grows, so one known from an earlier step is a bound.

    Each step brings the highest bounds up to date until the highest of all is.
    """
    S, N, _ = similarity.shape
    chosen = np.empty((S, k), dtype=np.int64)
    for row in range(S):
        table, worth = _values(similarity[row]), _values(salience[row].float())
        cover, bound = _values(covered[row]).copy(), np.full(N, np.inf, dtype=np.float32)
        bound[_values(barred[row])] = -np.inf
        for step in range(k):
            known = np.isneginf(bound)
            while not known[best := int(bound.argmax())]:
                stale = np.where(known, -np.inf, bound)
                likely = range(N) if step == 0 else np.argpartition(stale, -min(_GAINS_AT_ONCE, N))[-_GAINS_AT_ONCE:]
                likely = np.asarray(likely)[~known[likely]]
                bound[likely] = worth[likely] * np.maximum(table[likely] - cover, 0).sum(axis=1)
                known[likely] = True
            chosen[row, step] = best
            np.maximum(cover, table[best], out=cover)
            bound[best] = -np.inf
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


def _known(worths: Tensor) -> Callable[[int, np.ndarray], np.ndarray]:
    """`_Worths.seen_from` where all rows `worths` (N, N) are known."""
    table = _values(worths)
    return lambda index, promise: table[index]


class _Worths:
    """Rows of `relevance - weight * similarity` of `units` (N, D), computed when asked for.

    With each go those that are likely to be asked for next: a product with a few rows costs little more than one with a
    single row. Where guesses fail, everything is computed.
    """

    def __init__(self, units: Tensor, relevance: np.ndarray, weight: float) -> None:
        self._units = units
        self._relevance = relevance
        self._weight = weight
        self._known: dict[int, np.ndarray] = {}

    def seen_from(self, index: int, promise: np.ndarray) -> np.ndarray:
        """Row `index` (N,); `promise` (N,) is high where rows are likely to be asked for soon."""
        row = self._known.get(index)
        if row is None:
            self._compute(index, promise)
            row = self._known[index]
        return row

    def _compute(self, index: int, promise: np.ndarray) -> None:
        N = self._units.shape[0]
        if 2 * len(self._known) >= N:
            wanted, rows = range(N), _values(cosine_similarity(self._units[None])[0].mul_(-self._weight))
        else:
            likely = promise.copy()
            likely[list(self._known)] = -np.inf
            likely[index] = np.inf
            guesses = np.argpartition(likely, -min(_ROWS_AT_ONCE, N))[-_ROWS_AT_ONCE:]
            product = _product(self._units, self._units.index_select(0, torch.from_numpy(guesses)))
            wanted, rows = guesses.tolist(), np.multiply(_values(product).T, -self._weight, order="C")
        rows += self._relevance
        self._known.update(zip(wanted, rows, strict=True))
