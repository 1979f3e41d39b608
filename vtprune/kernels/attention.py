"""What one attention says of each of its tokens, read from queries and keys: of every map at most 256 rows exist."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_QUERIES_PER_BLOCK = 256


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


def attention_to(query: Tensor, key: Tensor, weights: Tensor, *, scale: float) -> Tensor:
    """Attention that each token gets from queries weighted with `weights` (B, H or 1, N): (B, H, N), fp32."""
    columns = torch.zeros(query.shape[:3], device=query.device)
    for rows, attention in _tiles(query, key, scale):
        columns += (weights[:, :, None, rows] @ attention)[:, :, 0]
    return columns


def attention_from(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """Attention that each token pays to token 0, averaged over heads: (B, N), fp32."""
    return torch.cat([attention[..., 0].mean(dim=1) for _, attention in _tiles(query, key, scale)], dim=1)


def received_attention(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """Attention that each token gets, averaged over all queries and heads: (B, N), fp32."""
    B, _, N, _ = query.shape
    return attention_to(query, key, torch.full((B, 1, N), 1 / N, device=query.device), scale=scale).mean(dim=1)


def _tiles(query: Tensor, key: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the attention map, (B, H, rows, N) at a time."""
    turned = key.float().transpose(-1, -2)
    for start in range(0, query.shape[2], _QUERIES_PER_BLOCK):
        rows = slice(start, start + _QUERIES_PER_BLOCK)
        yield rows, torch.softmax(query[:, :, rows].float() @ turned * scale, dim=-1)
