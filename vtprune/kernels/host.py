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


def holds(tensor: Tensor) -> bool:
    """Whether `tensor` lies in host memory."""
    return tensor.device.type == "cpu"


def cosine_similarity(units: Tensor) -> Tensor:
    """Products (S, N, N) of all rows of `units` (S, N, D); blocks above the diagonal are mirrored, not multiplied."""
    S, N, _ = units.shape
    similarity = units.new_empty(S, N, N)
    for own, rows in zip(similarity, units, strict=True):
        for start in range(0, N, _BLOCK):
            stop = min(start + _BLOCK, N)
            own[start:, start:stop] = _product(rows[start:], rows[start:stop])
            own[start:stop, stop:] = own[stop:, start:stop].T
    return similarity


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
    similarity: Tensor | None,
    taken: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    """What `reference.greedy_select` says, in numpy: a step costs a fifth of what operators of torch cost."""
    S, N, _ = units.shape
    if similarity is None and 3 * k > N:
        similarity = cosine_similarity(units)
    similar_to = _looked_up(similarity) if similarity is not None else _computed(units)
    merge, neutral = (np.minimum, np.inf) if reduce == "min" else (np.add, 0.0)
    base, stack = _values(relevance), np.arange(S)
    worth = np.full((S, N), neutral, dtype=np.float32)
    if available is not None:
        worth[~_values(available)] = -np.inf

    def see_from(chosen: np.ndarray, promise: np.ndarray) -> None:
        row = similar_to(chosen, promise)
        np.multiply(row, -weight, out=row)
        np.add(row, base, out=row)
        merge(worth, row, out=worth)
        worth[stack, chosen] = -np.inf

    promise, candidates = base, _values(first)
    steps = torch.empty(k, S, dtype=torch.long)
    unseen = [] if taken is None else list(_values(taken).T)
    for best in _values(steps):
        for chosen in unseen:
            see_from(chosen, promise)
            promise = candidates = worth
        candidates.argmax(axis=1, out=best)
        unseen = [best]
    return steps.T


def kept_indices(kept: Tensor, size: int, *, left_padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `reference.kept_indices` says."""
    B, L = kept.shape
    indices, slots = torch.zeros(B, size, dtype=torch.long), torch.empty(B, L, dtype=torch.long)
    valid = torch.zeros(B, size, dtype=torch.bool)
    rows = (_values(tensor) for tensor in (kept, indices, valid, slots))
    for row, own, real, slot in zip(*rows, strict=True):
        found = np.flatnonzero(row)
        start = size - len(found) if left_padded else 0
        own[start : start + len(found)], real[start : start + len(found)] = found, True
        np.maximum(row.cumsum() + (start - 1), 0, out=slot)
    return indices, valid, slots


def vacated_below(ids: Tensor, was: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """What `reference.vacated_below` says."""
    below, count = torch.zeros_like(ids), ids.new_empty(ids.shape[0], 1)
    rows = (_values(tensor) for tensor in (ids, was, stays, below, count))
    for own, before, after, found, total in zip(*rows, strict=True):
        vacated = np.zeros(own.max(initial=0) + 1, dtype=bool)
        vacated[own[before]] = True
        vacated[own[after]] = False
        found[before] = (vacated.cumsum() - vacated)[own[before]]
        total[:] = vacated.sum()
    return below, count


def _values(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _looked_up(similarity: Tensor) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function from indices (S,) to a copy of these rows (S, N) of `similarity`, valid until the next call."""
    S, N, _ = similarity.shape
    rows, start, found = _values(similarity.view(S * N, N)), np.arange(S) * N, np.empty((S, N), dtype=np.float32)
    return lambda chosen, promise: rows.take(chosen + start, axis=0, out=found, mode="clip")


def _computed(units: Tensor) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The same, computed when asked for; `promise` (S, N) is high where rows are likely to be asked for soon."""
    stack = [_Rows(rows) for rows in units.detach()]
    found = np.empty(units.shape[:2], dtype=np.float32)

    def similar_to(chosen: np.ndarray, promise: np.ndarray) -> np.ndarray:
        for rows, own, index, hint in zip(stack, found, chosen.tolist(), promise, strict=True):
            own[:] = rows.similar_to(index, hint)
        return found

    return similar_to


class _Rows:
    """Rows of the similarity of `units` (N, D), computed when asked for, with each those likely to be asked for next.

    A product with a few rows costs little more than one with a single row. Where guesses fail, everything is computed.
    """

    def __init__(self, units: Tensor) -> None:
        self._units = units
        self._known: dict[int, np.ndarray] = {}

    def similar_to(self, index: int, promise: np.ndarray) -> np.ndarray:
        """Row `index` (N,); `promise` (N,) is high where rows are likely to be asked for soon."""
        if index not in self._known:
            self._compute(index, promise)
        return self._known[index]

    def _compute(self, index: int, promise: np.ndarray) -> None:
        N = self._units.shape[0]
        if 2 * len(self._known) >= N:
            self._known = dict(enumerate(_values(cosine_similarity(self._units[None])[0])))
            return
        likely = promise.copy()
        likely[list(self._known)] = -np.inf
        likely[index] = np.inf
        wanted = np.argpartition(likely, -min(_ROWS_AT_ONCE, N))[-_ROWS_AT_ONCE:]
        rows = _product(self._units, self._units[torch.from_numpy(wanted)]).T.contiguous()
        self._known.update(zip(wanted.tolist(), _values(rows), strict=True))
