"""What `attention` specifies, in Triton: maps are walked through in tiles and never stored.

Rows of a tile are the tokens of one program, columns those it walks through: keys for queries, or queries for keys.
Tensors come to kernels with their strides, in one tuple. Scores are in base 2: their `scale` has log2(e) in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.errors import BackendUnavailable
from vtprune.kernels.attention import fits_tiles
from vtprune.kernels.backends import interpreted

_KEYS_PER_CHUNK, _MOST_CHUNKS, _INTERPRETED = 512, 32, tl.constexpr(interpreted())


def cls_attention(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """What `attention.cls_attention` says: (B, H, N, d) twice to (B, N - 1)."""
    return rows_attention(query[:, :, :1], key, None, scale=scale).mean(dim=1)[:, 0, 1:]


def rows_attention(query: Tensor, key: Tensor, allowed: Tensor | None, *, scale: float) -> Tensor:
    """What `attention.rows_attention` says: (B, H, R, d), (B, G, n, d) and (B, R, n) bool or None to (B, H, R, n)."""
    (B, H, R, _), (G, n) = query.shape, key.shape[1:3]
    tile = tile_for(query, key, H // G * R)
    chunks = min(_MOST_CHUNKS, triton.next_power_of_2(max(1, triton.cdiv(n, _KEYS_PER_CHUNK))))
    sums = _sums(query, key, scale, tile, allowed=allowed, chunks=chunks)
    out = query.new_empty(B, H, R, n, dtype=torch.float32)
    attend[(triton.cdiv(H // G * R, tile["ROWS"]) * B * G, triton.cdiv(n, tile["COLS"]))](
        *_pair(query, key, scale), _strided(allowed), sums, out, (G, H // G, R, n), CHUNKS=chunks, **tile
    )
    return out


def attention_to(query: Tensor, key: Tensor, weights: Tensor, *, scale: float, spans: Tensor | None = None) -> Tensor:
    """What `attention.attention_to` says: (B, H, N, d) twice, weights (B, H or 1, N) and spans (N, 2) to (B, H, N).

    `spans` must be symmetric, as those of segments and windows are: i sees j where j sees i.
    """
    B, H, N, _ = query.shape
    tile = tile_for(query, key, N)
    sums = _sums(query, key, scale, tile, spans=spans)
    weights, out = weights.float().expand(B, H, N), torch.empty_like(sums[..., 0])
    columns[(triton.cdiv(N, tile["ROWS"]) * B * H,)](
        *_pair(query, key, scale), _strided(spans), sums, _strided(weights), out, (H, 1, N, N), **tile
    )
    return out


def attention_from(query: Tensor, key: Tensor, *, scale: float, spans: Tensor | None = None) -> Tensor:
    """What `attention.attention_from` says: (B, H, N, d) twice and spans (N, 2) to (B, N)."""
    paid = query.new_empty(query.shape[:3], dtype=torch.float32)
    _sums(query, key, scale, tile_for(query, key, query.shape[2]), spans=spans, paid=paid)
    return paid.mean(dim=1)


def tile_for(query: Tensor, key: Tensor, rows: int) -> dict[str, int]:
    """Constants of a kernel for (B, H, R, d) and (B, G, n, d) that serves so many rows for each of B * G heads.

    Raises:
        BackendUnavailable: for what none of the kernels takes.
    """
    d = query.shape[3]
    if not fits_tiles(query, key):
        raise BackendUnavailable(f"queries and keys of {d} channels in {query.dtype} and {key.dtype}")
    for tokens in (query, key):
        if tokens.shape[2] * tokens.stride(2) >= 2**31:
            raise BackendUnavailable(f"{tokens.shape[2]} tokens are too many")
    return tile_of(d, rows, max(query.element_size(), key.element_size()))


def tile_of(d: int, rows: int, size: int) -> dict[str, int]:
    """Constants of a kernel for heads of d numbers of `size` bytes, its tile and its warps among them."""
    width, wide = width_of(d), size == 4
    most = min(32, 4096 // width) if wide else 128 if width <= 128 and rows > 1024 else 64
    tall = max(16, min(most, triton.next_power_of_2(rows)))
    cols = 32 if wide or width > 128 else 64
    return {"d": d, "ROWS": tall, "COLS": cols, "num_warps": 8 if tall == 128 else 4}


def _sums(
    query: Tensor,
    key: Tensor,
    scale: float,
    tile: dict[str, int],
    *,
    allowed: Tensor | None = None,
    spans: Tensor | None = None,
    paid: Tensor | None = None,
    chunks: int = 1,
) -> Tensor:
    """See `exponentials`."""
    (B, H, R, _), (G, n) = query.shape, key.shape[1:3]
    chunk = triton.cdiv(triton.cdiv(n, chunks), tile["COLS"]) * tile["COLS"]
    sums = query.new_empty(B, H, R, chunks, dtype=torch.float32)
    exponentials[(triton.cdiv(H // G * R, tile["ROWS"]) * B * G, chunks)](
        *_pair(query, key, scale), _strided(allowed), _strided(spans), sums, paid, (G, H // G, R, n), chunk, **tile
    )
    return sums


def _pair(query: Tensor, key: Tensor, scale: float) -> tuple[Any, ...]:
    """The arguments that all kernels begin with."""
    return _strided(query), _strided(key), scale * math.log2(math.e)


def _strided(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor, *tensor.stride())


@triton.constexpr_function
def width_of(d: int) -> int:
    """How wide a tile is for heads of d."""
    return max(16, triton.next_power_of_2(d))


@triton.jit
def exponentials(
    query: tl.tuple,
    key: tl.tuple,
    scale: tl.tensor,
    allowed: tl.tuple,
    spans: tl.tuple,
    sums: tl.tensor,
    paid: tl.tensor,
    sizes: tl.tuple,
    chunk: tl.tensor,
    d: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Log2 of the sum of the exponentials of what each row sees of each chunk of keys: (B, H, R, chunks).

    `sizes` are G, H / G, R and n. Where `paid` is given, it gets what rows (B, H, R) pay to the first key they see.
    """
    place, at, real, rows = _own(query, sizes, d, ROWS)
    begin = tl.program_id(1) * chunk
    starts, stops, begin, end = _span(spans, at, real, begin, tl.minimum(begin + chunk, sizes[3]))
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(begin, end, COLS):
        cols = first + tl.arange(0, COLS)
        seen = _seen(spans, starts, stops, end, cols)
        if allowed is not None:
            seen = seen & _allowed(allowed, sizes, place, at, cols)
        scores = tl.where(seen, _scores(rows, key, sizes, place, cols, d) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = _finite(higher)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        peak = higher
    whole = _finite(peak) + tl.log2(total)
    number = place * sizes[1] * sizes[2] + at
    tl.store(sums + number * tl.num_programs(1) + tl.program_id(1), whole, mask=real)
    if paid is not None:
        ones = _load(_head(key, sizes, place), starts * key[3], key[4], real, d)
        score = tl.sum(rows.to(tl.float32) * ones.to(tl.float32), 1) * scale
        tl.store(paid + number, tl.exp2(score - whole), mask=real)


@triton.jit
def attend(
    query: tl.tuple,
    key: tl.tuple,
    scale: tl.tensor,
    allowed: tl.tuple,
    sums: tl.tensor,
    out: tl.tensor,
    sizes: tl.tuple,
    CHUNKS: tl.constexpr,
    d: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One tile of the attention of rows to keys, from their `exponentials`: (B, H, R, n). `sizes` as there."""
    place, at, real, rows = _own(query, sizes, d, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    number = place * sizes[1] * sizes[2] + at
    parts = tl.load(sums + number[:, None] * CHUNKS + tl.arange(0, CHUNKS)[None, :], mask=real[:, None], other=0)
    base = _finite(tl.max(parts, 1))
    whole = base + tl.log2(tl.sum(tl.exp2(parts - base[:, None]), 1))
    weights = tl.exp2(_scores(rows, key, sizes, place, cols, d) * scale - whole[:, None])
    if allowed is not None:
        weights = tl.where(_allowed(allowed, sizes, place, at, cols), weights, 0)
    mask = real[:, None] & (cols < sizes[3])[None, :]
    tl.store(out + number[:, None] * sizes[3] + cols[None, :], weights, mask=mask)


@triton.jit
def columns(
    query: tl.tuple,
    key: tl.tuple,
    scale: tl.tensor,
    spans: tl.tuple,
    sums: tl.tensor,
    weights: tl.tuple,
    out: tl.tensor,
    sizes: tl.tuple,
    d: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Attention that keys get from weighted queries, of which `sums` has the `exponentials`: (B, H, N).

    `sizes` are H, 1, N and N. A key looks at the queries in its own span: that is why spans must be symmetric.
    """
    place, at, real, rows = _own(key, sizes, d, ROWS)
    starts, stops, begin, end = _span(spans, at, real, 0, sizes[3])
    shares, sums = _head(weights, sizes, place), sums + place * sizes[3]
    total = tl.zeros([ROWS], tl.float32)
    for first in range(begin, end, COLS):
        cols = first + tl.arange(0, COLS)
        share = tl.load(shares + cols * weights[3], mask=cols < end, other=0)
        whole = tl.load(sums + cols, mask=cols < end, other=0)
        gets = tl.exp2(_scores(rows, query, sizes, place, cols, d) * scale - whole[None, :]) * share[None, :]
        total += tl.sum(tl.where(_seen(spans, starts, stops, end, cols), gets, 0), 1)
    tl.store(out + place * sizes[3] + at, total, mask=real)


@triton.jit
def _own(tokens: tl.tuple, sizes: tl.tuple, d: tl.constexpr, ROWS: tl.constexpr) -> tl.tuple:
    """The rows of this program: number of their key head, their own numbers within it, which are real, and they."""
    blocks = tl.cdiv(sizes[1] * sizes[2], ROWS)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    real = at < sizes[1] * sizes[2]
    first = tokens[0] + place // sizes[0] * tokens[1] + place % sizes[0] * sizes[1] * tokens[2]
    offsets = at // sizes[2] * tokens[2] + at % sizes[2] * tokens[3]
    return place, at, real, _load(first, offsets, tokens[4], real, d)


@triton.jit
def _head(tokens: tl.tuple, sizes: tl.tuple, place: tl.tensor) -> tl.tensor:
    """Where the head of that number begins."""
    return tokens[0] + place // sizes[0] * tokens[1] + place % sizes[0] * tokens[2]


@triton.jit
def _load(first: tl.tensor, offsets: tl.tensor, step: tl.tensor, real: tl.tensor, d: tl.constexpr) -> tl.tensor:
    """Tokens so far from the `first`, zeros beyond d and where they are not real."""
    wide = tl.arange(0, width_of(d))
    at = first + offsets[:, None] + wide[None, :] * step
    return tl.load(at, mask=real[:, None] & (wide < d)[None, :], other=0)


@triton.jit
def _scores(
    rows: tl.tensor, tokens: tl.tuple, sizes: tl.tuple, place: tl.tensor, cols: tl.tensor, d: tl.constexpr
) -> tl.tensor:
    """Products of rows with the tokens that are columns."""
    others = _load(_head(tokens, sizes, place), cols * tokens[3], tokens[4], cols < sizes[3], d)
    if _INTERPRETED or rows.dtype != others.dtype:
        rows, others = rows.to(tl.float32), others.to(tl.float32)
    return tl.dot(rows, tl.trans(others), input_precision="ieee")


@triton.jit
def _span(spans: tl.tuple, at: tl.tensor, real: tl.tensor, begin: tl.tensor, end: tl.tensor) -> tl.tuple:
    """Where what each row sees begins and ends, and where what all of them see together does."""
    starts, stops = tl.zeros_like(at) + begin, tl.zeros_like(at) + end
    if spans is not None:
        own = spans[0] + at * spans[1]
        starts = tl.load(own, mask=real, other=end).to(tl.int32)
        stops = tl.load(own + spans[2], mask=real, other=0).to(tl.int32)
        begin, end = tl.min(starts), tl.max(stops)
    return starts, stops, begin, end


@triton.jit
def _seen(spans: tl.tuple, starts: tl.tensor, stops: tl.tensor, end: tl.tensor, cols: tl.tensor) -> tl.tensor:
    """Which columns are in the span of each row."""
    seen = (cols < end)[None, :]
    if spans is not None:
        seen = (cols[None, :] >= starts[:, None]) & (cols[None, :] < stops[:, None])
    return seen


@triton.jit
def _allowed(allowed: tl.tuple, sizes: tl.tuple, place: tl.tensor, at: tl.tensor, cols: tl.tensor) -> tl.tensor:
    """Which columns rows may see."""
    first = allowed[0] + place // sizes[0] * allowed[1]
    offsets = (at % sizes[2] * allowed[2])[:, None] + cols[None, :] * allowed[3]
    mask = (at < sizes[1] * sizes[2])[:, None] & (cols < sizes[3])[None, :]
    return tl.load(first + offsets, mask=mask, other=0) != 0


@triton.jit
def _finite(peak: tl.tensor) -> tl.tensor:
    """The highest score of each row to subtract, 0 where there is none."""
    return tl.where(peak == float("-inf"), 0.0, peak)
