"""Gathering and merging rows in Triton: what `reference` says of `cut_sequence` and `merge_rows`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.errors import BackendUnavailable
from vtprune.kernels.reference import memory_order, undone

_BYTES_AT_ONCE = 4096
_MOST_TENSORS = 16
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _cut(
    sources: tl.tuple,
    targets: tl.tuple,
    shapes: tl.tuple,
    indices: tl.tensor,
    valid: tl.tensor,
    K: tl.tensor,
    PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Copy one row of every tensor; `shapes` holds width and steps (b, l, d of the source, then of the target)."""
    place = tl.program_id(0).to(tl.int64)
    b, j = place // K, place % K
    row = tl.load(indices + place)
    real = True
    if PADDED:
        real = tl.load(valid + place) != 0
    for i in tl.static_range(COUNT):
        width, from_b, from_l, from_d, to_b, to_l, to_d = shapes[i]
        source = sources[i] + b * from_b + row * from_l
        target = targets[i] + b * to_b + j * to_l
        for start in range(0, width, BLOCKS[i]):
            at = (start + tl.arange(0, BLOCKS[i])).to(tl.int64)
            values = tl.load(source + at * from_d, mask=(at < width) & real, other=0)
            tl.store(target + at * to_d, values, mask=at < width)


def cut_sequence(tensors: Sequence[Tensor], indices: Tensor, valid: Tensor | None = None) -> list[Tensor]:
    """As `reference.cut_sequence`, in one launch: all tensors together, copied as integers of their size."""
    if len(tensors) > _MOST_TENSORS:
        raise BackendUnavailable(f"{len(tensors)} tensors at once: expected at most {_MOST_TENSORS}")
    B, K = indices.shape
    shorts = [_room_for(tensor, B, K) for tensor in tensors]
    if not shorts or B * K == 0:
        return shorts
    pairs = [(_rows_of(tensor), _rows_of(short)) for tensor, short in zip(tensors, shorts, strict=True)]
    shapes = tuple((source.shape[2], *source.stride(), *target.stride()) for source, target in pairs)
    blocks = tuple(_block(source.shape[2], source.element_size()) for source, _ in pairs)
    _cut[(B * K,)](
        tuple(source for source, _ in pairs),
        tuple(target for _, target in pairs),
        shapes,
        indices.contiguous(),
        indices if valid is None else valid.contiguous().view(torch.int8),
        K,
        PADDED=valid is not None,
        COUNT=len(pairs),
        BLOCKS=blocks,
        num_warps=4 if max(blocks) > 256 else 1,
    )
    return shorts


def _room_for(tensor: Tensor, B: int, K: int) -> Tensor:
    """An empty (B, K, ...), its dimensions in memory in the order of those of `tensor`."""
    order, shape = memory_order(tensor), (B, K, *tensor.shape[2:])
    empty = torch.empty([shape[dim] for dim in order], dtype=tensor.dtype, device=tensor.device)
    return empty.permute(undone(order))


def _rows_of(tensor: Tensor) -> Tensor:
    """The same memory as integers (B, L, D)."""
    size = tensor.element_size()
    if size not in _INTEGERS:
        raise BackendUnavailable(f"elements of {size} bytes")
    plain = tensor.view(_INTEGERS[size])
    if plain.ndim == 2:
        return plain[..., None]
    if plain.ndim == 3:
        return plain
    try:
        return plain.view(*plain.shape[:2], -1)
    except RuntimeError as error:
        raise BackendUnavailable(f"a tensor {tuple(tensor.shape)} with steps {tensor.stride()}") from error


def _block(width: int, size: int) -> int:
    return min(triton.next_power_of_2(width), _BYTES_AT_ONCE // size)


@triton.jit
def _merge(
    features: tl.tensor,
    order: tl.tensor,
    begins: tl.tensor,
    weights: tl.tensor,
    merged: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    D: tl.tensor,
    step_s: tl.tensor,
    step_n: tl.tensor,
    step_d: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Add up one group for a block of channels, member after member."""
    s, group = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(begins + s * (K + 1) + group), tl.load(begins + s * (K + 1) + group + 1)
    total = 0.0
    for i in range(begin, end):
        total += tl.load(weights + s * N + i)
    alike, summed = (total > 0) == 0, tl.zeros([BLOCK], tl.float32)
    total = tl.where(alike, (end - begin).to(tl.float32), total)
    for i in range(begin, end):
        share = tl.div_rn(tl.where(alike, 1.0, tl.load(weights + s * N + i)), total)
        row = features + s * step_s + tl.load(order + s * N + i) * step_n
        values = tl.load(row + at * step_d, mask=at < D, other=0).to(tl.float32)
        values = tl.where(values == values, values, 0.0)
        summed += share * tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    tl.store(merged + (s * K + group) * D + at, summed, mask=at < D)


def merge_rows(features: Tensor, into: Tensor, weights: Tensor, k: int) -> Tensor:
    """As `reference.merge_rows`: each group is summed up in the order of its tokens, alike on every run."""
    S, N, D = features.shape
    if features.dtype == torch.float64:
        raise BackendUnavailable("float64")
    merged = torch.empty(S, k, D, device=features.device)
    if merged.numel() == 0:
        return merged
    groups, order = into.sort(dim=1, stable=True)
    bounds = torch.arange(k + 1, device=into.device).expand(S, -1).contiguous()
    begins = torch.searchsorted(groups, bounds)
    counts = weights.float().clamp(min=0).gather(1, order)
    block = min(triton.next_power_of_2(D), 1024)
    _merge[(S * k, triton.cdiv(D, block))](
        features, order, begins, counts, merged, N, k, D, *features.stride(), BLOCK=block, num_warps=4
    )
    return merged
