"""The specification of every kernel, in plain PyTorch: tensors in, tensors out, fp32 inside, first-index ties."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_QUERIES_PER_BLOCK = 256
_MIRRORED_BLOCK = 96


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    rows: Literal["cls", "received"],
    segments: Tensor | None = None,
) -> Tensor:
    """Attention that each patch gets, averaged over heads: from the CLS row, or over all queries.

    Args:
        query: (B, H, N, d), after norm and RoPE.
        key: (B, H, N, d).
        scale: factor on the product of query and key.
        rows: `"cls"` reads the row of token 0 and leaves its own column out; `"received"` averages all rows.
        segments: cumulative lengths (pictures + 1,) where several pictures share the sequence: none sees another.

    Returns:
        (B, N - 1) for `"cls"`, (B, N) for `"received"`, fp32. At most 256 rows of the attention matrix exist at once.
    """
    key = key.float().transpose(-1, -2)
    if rows == "cls":
        row = torch.softmax(query[:, :, :1].float() @ key * scale, dim=-1)
        return row.mean(dim=1)[:, 0, 1:]
    owner = None if segments is None else _owner_of_position(segments, query.shape[2])
    received = key.new_zeros(query.shape[0], query.shape[2])
    for start in range(0, query.shape[2], _QUERIES_PER_BLOCK):
        block = slice(start, start + _QUERIES_PER_BLOCK)
        logits = query[:, :, block].float() @ key * scale
        if owner is not None:
            logits = logits.masked_fill(owner[block, None] != owner[None], float("-inf"))
        received += torch.softmax(logits, dim=-1).mean(dim=1).sum(dim=1)
    return received / query.shape[2]


def _owner_of_position(segments: Tensor, length: int) -> Tensor:
    positions = torch.arange(length, device=segments.device)
    return torch.bucketize(positions, segments[1:], right=True)


def cosine_similarity(features: Tensor) -> Tensor:
    """Cosine similarity (S, N, N) of features (S, N, D) in fp32; a zero vector is similar to nothing.

    On a CPU, where the product is what selection costs, the blocks below the diagonal are mirrored, not multiplied.
    """
    features = features.to(torch.float32, copy=True)
    features.div_(features.norm(dim=-1, keepdim=True).clamp_min_(1e-12))
    S, N, _ = features.shape
    if features.device.type != "cpu" or N <= _MIRRORED_BLOCK:
        return features @ features.transpose(1, 2)
    similarity = features.new_empty(S, N, N)
    for start in range(0, N, _MIRRORED_BLOCK):
        rows = slice(start, start + _MIRRORED_BLOCK)
        similarity[:, rows, start:] = features[:, rows] @ features[:, start:].transpose(1, 2)
        similarity[:, start:, rows] = similarity[:, rows, start:].transpose(1, 2)
    return similarity


def top_select(scores: Tensor, k: int) -> Tensor:
    """Indices (S, k) of the k highest scores (S, N), best first; the lower index wins a tie."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]


def greedy_select(
    pairwise: Tensor,
    first: Tensor,
    k: int,
    *,
    reduce: Literal["min", "sum"] = "min",
    taken: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """Greedy selection without a host synchronisation: K steps for the whole stack at once, O(K N) after `pairwise`.

    The worth of candidate i is `pairwise[:, c, i]` reduced over the chosen c; each step takes the best (lowest index
    on ties). Max-min, max-sum, MMR and score times distance are all of this form.

    Args:
        pairwise: (S, N, N); overwritten (its diagonal becomes -inf).
        first: (S, N) worth of being the first choice; unused where `taken` is given.
        k: how many to choose.
        reduce: `"min"` or `"sum"` over the chosen ones.
        taken: (S, m) indices chosen before, m >= 1; they count as chosen and are not chosen again.
        available: (S, N) bool, False at what must not be chosen.

    Returns:
        (S, k) indices in the order of choice.
    """
    S, N, _ = pairwise.shape
    pairwise.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    table = pairwise.view(S * N, N)
    offset = torch.arange(S, device=pairwise.device) * N
    worth = first.float().clone()
    if taken is not None:
        rows = table[taken + offset[:, None]]
        worth = rows.amin(dim=1) if reduce == "min" else rows.sum(dim=1)
    if available is not None:
        worth = worth.masked_fill(~available, float("-inf"))
    chosen = torch.empty(S, k, dtype=torch.long, device=pairwise.device)
    for step in range(k):
        best = worth.argmax(dim=1)
        chosen[:, step] = best
        row = table.index_select(0, best + offset)
        if step == 0 and taken is None:
            worth = row if available is None else row.masked_fill(~available, float("-inf"))
        else:
            worth = torch.minimum(worth, row) if reduce == "min" else worth + row
    return chosen


def kept_indices(kept: Tensor, size: int, *, left_padded: bool = True) -> tuple[Tensor, Tensor]:
    """Ascending indices of the True entries of every row, padded to `size`, without a host synchronisation.

    Args:
        kept: (B, L) bool with at most `size` True entries a row.
        size: length of the result, known from shapes.
        left_padded: put the padding on the left.

    Returns:
        `(indices (B, size), valid (B, size))`; padding points at an entry that was not kept, or at 0.
    """
    B, L = kept.shape
    slot = kept.cumsum(dim=1) - 1
    if left_padded:
        slot = slot + (size - kept.sum(dim=1, keepdim=True))
    slot = slot.masked_fill(~kept, size)
    source = torch.arange(L, device=kept.device).expand(B, L)
    indices = slot.new_zeros(B, size + 1).scatter_(1, slot, source)[:, :size]
    ramp = torch.arange(size, device=kept.device).expand(B, size)
    count = kept.sum(dim=1, keepdim=True)
    valid = ramp >= size - count if left_padded else ramp < count
    return indices, valid


def cut_sequence(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows (B, K, D) of `rows` (B, L, D) at `indices` (B, K)."""
    return take_rows(rows, torch.arange(rows.shape[0], device=indices.device)[:, None], indices)


def take_rows(rows: Tensor, batch: Tensor, indices: Tensor) -> Tensor:
    """Rows (S, K, D) of `rows` (B, L, D): for each s those of batch row `batch` (S, 1) at `indices` (S, K)."""
    B, L, D = rows.shape
    flat = (indices + batch * L).view(-1)
    return rows.reshape(B * L, D).index_select(0, flat).view(*indices.shape, D)
