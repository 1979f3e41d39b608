"""What one attention says of each of its tokens, read from queries and keys: of every map at most 256 rows exist."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtprune.kernels.backends import kernel

_QUERIES_PER_BLOCK = 256
_IN_TILES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256
"""Heads of more channels have no tiles in Triton."""


def fits_tiles(query: Tensor, key: Tensor) -> bool:
    """Whether Triton has tiles for queries and keys (..., d) of such types."""
    return query.shape[-1] <= WIDEST and all(tokens.dtype in _IN_TILES for tokens in (query, key))


@kernel("triton_attention")
def cls_attention(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """Attention of token 0 to all others, averaged over heads.

    Args:
        query: (B, H, N, d), after norm and RoPE.
        key: (B, H, N, d).
        scale: factor on the product of query and key.

    Returns:
        (B, N - 1), fp32.
    """
    row = torch.softmax(query[:, :, :1].float() @ key.float().transpose(-1, -2) * scale, dim=-1)
    return row.mean(dim=1)[:, 0, 1:]


@kernel("triton_attention")
def rows_attention(query: Tensor, key: Tensor, allowed: Tensor, *, scale: float) -> Tensor:
    """Attention of a few rows to all keys, over grouped heads.

    Args:
        query: (B, H, R, d), after norm and RoPE.
        key: (B, G, n, d), H a multiple of G.
        allowed: (B, R, n) bool, which keys a row may see.
        scale: factor on the product of query and key.

    Returns:
        (B, H, R, n), fp32; rows that may see nothing are zeros.
    """
    B, H, R, d = query.shape
    G = key.shape[1]
    grouped = query.float().reshape(B, G, H // G * R, d)
    logits = (grouped @ key.float().transpose(-1, -2) * scale).view(B, H, R, -1)
    hidden = ~allowed[:, None]
    return torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1).masked_fill(hidden, 0)


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """What rows (B, H, R, n) of attention make of values (B, G, n, d), over grouped heads: (B, H, R, d)."""
    B, H, R, n = weights.shape
    grouped = weights.to(value.dtype).reshape(B, value.shape[1], -1, n)
    return (grouped @ value).view(B, H, R, -1)


@kernel("triton_attention")
def attention_to(query: Tensor, key: Tensor, weights: Tensor, *, scale: float, spans: Tensor | None = None) -> Tensor:
    """Attention that each token gets from weighted queries.

    Args:
        query: (B, H, N, d), after norm and RoPE.
        key: (B, H, N, d).
        weights: (B, H or 1, N), of the queries.
        scale: factor on the product of query and key.
        spans: (N, 2) integers where pictures, frames or windows share a sequence: the first key that each query sees,
            and the first after them that it does not; all keys by default. They are symmetric, i sees j where j sees
            i, and each token sees itself.

    Returns:
        (B, H, N), fp32.
    """
    columns = torch.zeros(query.shape[:3], device=query.device)
    for rows, attention in _tiles(query, key, scale, spans):
        columns += (weights[:, :, None, rows] @ attention)[:, :, 0]
    return columns


@kernel("triton_attention")
def attention_from(query: Tensor, key: Tensor, *, scale: float, spans: Tensor | None = None) -> Tensor:
    """Attention that each token pays to the first one it sees, averaged over heads: (B, N), fp32.

    That is token 0 without `spans`, which see `attention_to`.
    """
    paid = []
    for rows, attention in _tiles(query, key, scale, spans):
        if spans is None:
            paid.append(attention[..., 0].mean(dim=1))
        else:
            paid.append(attention.mean(dim=1).gather(2, spans[rows, :1].long().expand(len(query), -1, -1))[..., 0])
    return torch.cat(paid, dim=1)


def received_attention(query: Tensor, key: Tensor, *, scale: float, spans: Tensor | None = None) -> Tensor:
    """Attention that each token gets, averaged over heads and over the queries that see it: (B, N), fp32.

    A query counts by 1 / the number of keys it sees: where `spans`, which see `attention_to`, are segments, that makes
    the mean over the segment of the token, as if it were alone.
    """
    B, _, N, _ = query.shape
    if spans is None:
        weights = torch.full((B, 1, N), 1 / N, device=query.device)
    else:
        weights = (1 / (spans[:, 1] - spans[:, 0])).expand(B, 1, N)
    return attention_to(query, key, weights, scale=scale, spans=spans).mean(dim=1)


def _tiles(query: Tensor, key: Tensor, scale: float, spans: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the attention map, (B, H, rows, N) at a time."""
    turned = key.float().transpose(-1, -2)
    for start in range(0, query.shape[2], _QUERIES_PER_BLOCK):
        rows = slice(start, start + _QUERIES_PER_BLOCK)
        scores = query[:, :, rows].float() @ turned * scale
        if spans is None:
            yield rows, torch.softmax(scores, dim=-1)
        else:
            places = torch.arange(key.shape[2], device=key.device)
            hidden = (places < spans[rows, :1]) | (places >= spans[rows, 1:])
            yield rows, torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1).masked_fill(hidden, 0)
