"""Attention in Triton against the specification, and both against a loop where tokens see spans only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.test_reference import drawn
from vtprune.errors import BackendUnavailable
from vtprune.kernels import attention, backends
from vtprune.readings import BlockAttention
from vtprune.runtime.encoded import by_segment
from vtprune.stages.rules import ClsOrReceived, PageRank, Received

# The interpreter is numpy: rows that see nothing take the logarithm of 0, and those of NaN have no highest score.
pytestmark = [pytest.mark.filterwarnings("ignore:divide by zero"), pytest.mark.filterwarnings("ignore:All-NaN")]

LOW = [torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda heads: heads.contiguous(),
    "tokens first": lambda heads: heads.transpose(1, 2).contiguous().transpose(1, 2),
    "side by side": lambda heads: torch.stack([heads.transpose(1, 2)] * 3, dim=2)[:, :, 1].transpose(1, 2),
    "channels first": lambda heads: heads.mT.contiguous().mT,
    "every second token": lambda heads: heads.repeat_interleave(2, dim=2)[:, :, ::2],
}
SPANS = {
    "segments": [1, 7, 33, 2, 1, 26],
    "one segment": [70],
    "windows": [16, 16, 16, 16, 6],
}


def pair(device: torch.device, B: int, H: int, N: int, d: int, G: int = 0, R: int = 0) -> tuple[Tensor, Tensor]:
    """Queries (B, H, R or N, d) and keys (B, G or H, N, d)."""
    return drawn(B, H, R or N, d).to(device), drawn(B, G or H, N, d, seed=1).to(device)


def spans_of(lengths: list[int], device: torch.device) -> Tensor:
    ends = np.cumsum(lengths)
    spans = [(end - length, end) for length, end in zip(lengths, ends, strict=True) for _ in range(length)]
    return torch.tensor(spans, device=device)


def near(N: int, reach: int, device: torch.device) -> Tensor:
    """Windows that slide."""
    at = torch.arange(N, device=device)
    return torch.stack([(at - reach).clamp(min=0), (at + reach + 1).clamp(max=N)], dim=1)


def close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


def loop(query: Tensor, key: Tensor, weights: Tensor, spans: Tensor, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """What keys get from weighted queries (B, H, N), and what queries pay to the first key they see (B, N)."""
    q, k, w = (tensor.double().cpu().numpy() for tensor in (query, key, weights))
    B, H, N, _ = q.shape
    got, paid = np.zeros((B, H, N)), np.zeros((B, N))
    for b in range(B):
        for h in range(H):
            for i, (start, stop) in enumerate(spans.tolist()):
                exponentials = np.exp(k[b, h, start:stop] @ q[b, h, i] * scale)
                row = exponentials / exponentials.sum()
                got[b, h, start:stop] += w[b, min(h, w.shape[1] - 1), i] * row
                paid[b, i] += row[0] / H
    return got, paid


@pytest.mark.parametrize(("B", "H", "N", "d"), [(1, 1, 1, 1), (1, 2, 2, 8), (2, 3, 67, 24), (1, 1, 601, 72)])
def test_what_the_cls_token_attends_to(device: torch.device, B: int, H: int, N: int, d: int) -> None:
    query, key = pair(device, B, H, N, d)
    got = attention.cls_attention.triton(query, key, scale=d**-0.5)
    assert got.shape == (B, N - 1)
    close(got, attention.cls_attention.specification(query, key, scale=d**-0.5))


@pytest.mark.parametrize(
    ("B", "H", "G", "R", "n", "d"),
    [(1, 1, 1, 1, 1, 1), (2, 3, 3, 5, 37, 16), (2, 4, 1, 3, 70, 20), (1, 14, 2, 7, 41, 64), (1, 2, 1, 1, 1031, 80)],
)
def test_what_rows_attend_to(device: torch.device, B: int, H: int, G: int, R: int, n: int, d: int) -> None:
    query, key = pair(device, B, H, n, d, G, R)
    allowed = (drawn(B, R, n, seed=2) > 0).to(device)
    allowed[..., 0] = True
    got = attention.rows_attention.triton(query, key, allowed, scale=0.3)
    close(got, attention.rows_attention.specification(query, key, allowed, scale=0.3))


def test_rows_see_what_is_allowed_only(device: torch.device) -> None:
    """Causal rows from the middle on; one row sees nothing, one a key of the last chunk only."""
    B, R, n = 2, 9, 530
    query, key = pair(device, B, 2, n, 16, 1, R)
    allowed = (torch.arange(n) <= torch.arange(n - R, n)[:, None]).expand(B, -1, -1).clone()
    allowed[1, 3] = False
    allowed[0, 2] = torch.arange(n) == n - 1
    allowed = allowed.to(device)
    got = attention.rows_attention.triton(query, key, allowed, scale=0.25)
    close(got, attention.rows_attention.specification(query, key, allowed, scale=0.25))
    assert not got.masked_fill(allowed[:, None], 0).any()
    assert not got[1, :, 3].any()
    assert got[0, :, 2, -1].tolist() == [1.0] * 2
    assert torch.equal(got, attention.rows_attention.triton(query, key, allowed.mT.contiguous().mT, scale=0.25))
    short, shared = key[:, :, :20], allowed[:1, :, -20:].expand(B, -1, -1)
    expected = attention.rows_attention.specification(query, short, shared, scale=0.25)
    close(attention.rows_attention.triton(query, short, shared, scale=0.25), expected)


@pytest.mark.parametrize(
    ("B", "H", "N", "d", "weighs"), [(1, 1, 1, 1, 1), (2, 3, 5, 8, 1), (2, 2, 67, 24, 2), (1, 2, 70, 80, 1)]
)
def test_what_tokens_get_and_pay(device: torch.device, B: int, H: int, N: int, d: int, weighs: int) -> None:
    query, key = pair(device, B, H, N, d)
    weights = drawn(B, weighs, N, seed=2).to(device)
    got = attention.attention_to.triton(query, key, weights, scale=0.3)
    close(got, attention.attention_to.specification(query, key, weights, scale=0.3))
    paid = attention.attention_from.triton(query, key, scale=0.3)
    close(paid, attention.attention_from.specification(query, key, scale=0.3))
    assert torch.equal(got, attention.attention_to.triton(query, key, weights, scale=0.3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_read_where_they_lie(device: torch.device, layout: str) -> None:
    query, key = pair(device, 2, 3, 19, 24)
    weights, allowed = drawn(2, 1, 19, seed=2).to(device), torch.ones(2, 19, 19, dtype=torch.bool, device=device)
    moved, other = LAYOUTS[layout](query), LAYOUTS[layout](key)
    assert torch.equal(moved, query)
    for kernel, rest in (
        (attention.cls_attention, ()),
        (attention.rows_attention, (allowed,)),
        (attention.attention_to, (weights,)),
        (attention.attention_from, ()),
    ):
        expected = kernel.specification(query, key, *rest, scale=0.3)
        close(kernel.triton(moved, other, *rest, scale=0.3), expected)


@pytest.mark.parametrize("kind", [*SPANS, "sliding windows", "spans of 32 bits, not contiguous"])
def test_spans_are_those_of_the_loop(device: torch.device, kind: str) -> None:
    B, N = (2, 70) if kind == "segments" else (1, 70)
    query, key = pair(device, B, 2, N, 12)
    spans = spans_of(SPANS[kind], device) if kind in SPANS else near(N, 5, device)
    if kind.startswith("spans of"):
        spans = spans.to(torch.int32).mT.contiguous().mT
    weights = drawn(B, 1, N, seed=2).to(device)
    got, paid = (torch.from_numpy(found).float().to(device) for found in loop(query, key, weights, spans, 0.3))
    mean = (1 / (spans[:, 1] - spans[:, 0])).expand(B, 1, N)
    received, _ = (torch.from_numpy(found).float().to(device) for found in loop(query, key, mean, spans, 0.3))
    for form in ("triton", "specification"):
        close(getattr(attention.attention_to, form)(query, key, weights, scale=0.3, spans=spans), got)
        close(getattr(attention.attention_from, form)(query, key, scale=0.3, spans=spans), paid)
        with backends.using("triton" if form == "triton" else "torch"):
            close(attention.received_attention(query, key, scale=0.3, spans=spans), received.mean(dim=1))


def test_a_number_missing_in_one_segment_is_missing_there_only(device: torch.device) -> None:
    query, key = pair(device, 1, 2, 70, 12)
    query[0, 1, 5, 3] = float("nan")
    spans, weights = spans_of(SPANS["segments"], device), torch.ones(1, 1, 70, device=device)
    for limits in (spans, None):
        got = attention.attention_to.triton(query, key, weights, scale=0.3, spans=limits)
        expected = attention.attention_to.specification(query, key, weights, scale=0.3, spans=limits)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5, equal_nan=True)
        assert got.isnan().sum() == (70 if limits is None else 7)


def naive(query: Tensor, key: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Attention as plain operators compute it in the precision of their inputs."""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * scale
    return torch.softmax(scores if allowed is None else scores.masked_fill(~allowed[:, None], float("-inf")), dim=-1)


def no_worse(got: Tensor, low: Tensor, exact: Tensor) -> None:
    """At most twice as far off as low precision all the way."""
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= 2 * (low.float() - exact).abs().max() + 1e-6


@pytest.mark.parametrize(
    ("N", "d", "dtype"), [(67, 80, torch.float16), (67, 72, torch.bfloat16), (1030, 8, torch.bfloat16)]
)
def test_low_precision_is_multiplied_out_in_full(device: torch.device, N: int, d: int, dtype: torch.dtype) -> None:
    query, key = (heads.to(dtype) for heads in pair(device, 1, 2 if N < 100 else 1, N, d))
    weights = torch.full((1, 1, N), 1 / N, device=device)
    low = naive(query, key, None, 0.3)
    wide = (query.float(), key.float())
    for kernel, rest, plain in (
        (attention.cls_attention, (), low[:, :, 0, 1:].mean(dim=1)),
        (attention.attention_to, (weights,), low.mean(dim=2)),
        (attention.attention_from, (), low[..., 0].mean(dim=1)),
    ):
        got = kernel.triton(query, key, *rest, scale=0.3)
        no_worse(got, plain, kernel.specification(*wide, *rest, scale=0.3))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rows_of_low_precision_are_multiplied_out_in_full(device: torch.device, dtype: torch.dtype) -> None:
    query, key = (heads.to(dtype) for heads in pair(device, 2, 6, 61, 72, 3, 29))
    allowed = (drawn(2, 29, 61, seed=2) > 0).to(device)
    got = attention.rows_attention.triton(query, key, allowed, scale=0.3)
    exact = attention.rows_attention.specification(query.float(), key.float(), allowed, scale=0.3)
    no_worse(got, naive(query, key, allowed, 0.3), exact)
    mixed = attention.rows_attention.triton(query, key.float(), allowed, scale=0.3)
    close(mixed, exact)


def test_nothing_attends_to_nothing(device: torch.device) -> None:
    query, key = pair(device, 2, 2, 3, 8)
    allowed = torch.ones(2, 3, 3, dtype=torch.bool, device=device)
    assert attention.rows_attention.triton(query[:, :, :0], key, allowed[:, :0], scale=1.0).shape == (2, 2, 0, 3)
    assert attention.rows_attention.triton(query, key[:, :, :0], allowed[..., :0], scale=1.0).shape == (2, 2, 3, 0)
    assert attention.attention_from.triton(query[:0], key[:0], scale=1.0).shape == (0, 3)


def test_what_the_kernels_do_not_take_is_refused(device: torch.device) -> None:
    query, key = pair(device, 1, 1, 2, 257)
    long = torch.zeros(1, 1, 1, 16, device=device).as_strided((1, 1, 1, 16), (16, 16, 2**31, 1))
    allowed = torch.ones(1, 2, 2, dtype=torch.bool, device=device)
    for reason, q, k in (
        ("257 channels", query, key),
        ("float64", query[..., :8].double(), key[..., :8].double()),
        ("too many", long, long),
    ):
        with pytest.raises(BackendUnavailable, match=reason):
            attention.cls_attention.triton(q, k, scale=1.0)
        with pytest.raises(BackendUnavailable, match=reason):
            attention.attention_to.triton(q, k, allowed[:, :1], scale=1.0)
        with pytest.raises(BackendUnavailable, match=reason), backends.using("triton"):
            attention.rows_attention(q, k, allowed, scale=1.0)


@pytest.mark.parametrize("lengths", [(5, 5, 9, 1, 4), (6, 6, 6, 6)])
@pytest.mark.parametrize("rule", [Received(), ClsOrReceived(), PageRank(steps=2)], ids=lambda rule: rule.name)
def test_pictures_in_one_sequence_go_together(
    device: torch.device, rule: Received | PageRank, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call where the rule heeds spans; of equal ones there is a batch anyhow."""
    from vtprune.kernels import triton_attention

    query, key = pair(device, 1, 2, 24, 12)
    seen = BlockAttention(query=query, key=key, scale=0.3, has_cls=False)
    shapes = []
    original = triton_attention.attention_to

    def counted(query: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        shapes.append(tuple(query.shape[:3]))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(triton_attention, "attention_to", counted)
    with backends.using("triton") as use:
        got = by_segment(rule, seen, lengths)
    assert use.on_triton == {"attention_to"}
    if not rule.spanning and len(set(lengths)) > 1:
        assert shapes == [(2, 2, 5)] * 2 + [(1, 2, 9)] * 2 + [(1, 2, 1)] * 2 + [(1, 2, 4)] * 2
    elif not rule.spanning:
        assert shapes == [(4, 2, 6)] * 2
    else:
        assert shapes == [(1, 2, 24) if len(set(lengths)) > 1 else (4, 2, 6)]
    with backends.using("torch"):
        expected = by_segment(rule, seen, lengths)
    alone, start = [], 0
    for length in lengths:
        own = (heads[:, :, start : start + length] for heads in (query, key))
        alone.append(rule(replace(seen, **dict(zip(("query", "key"), own, strict=True)))))
        start += length
    close(got, expected)
    close(got, torch.cat(alone, dim=1))


def test_a_cls_token_in_every_picture_is_left_out(device: torch.device) -> None:
    query, key = pair(device, 1, 2, 9, 12)
    seen = BlockAttention(query=query, key=key, scale=0.3, has_cls=True)
    with backends.using("triton"):
        got = by_segment(Received(), seen, (4, 5))
    assert got.shape == (1, 7)
    with backends.using("torch"):
        close(got, by_segment(Received(), seen, (4, 5)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_map_is_stored(device: torch.device) -> None:
    N = 16384
    query, key = (heads.to(device, torch.bfloat16) for heads in (drawn(1, 2, N, 64), drawn(1, 2, N, 64, seed=1)))
    weights = torch.full((1, 1, N), 1 / N, device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    got = attention.attention_to.triton(query, key, weights, scale=0.125)
    assert got.sum().item() == pytest.approx(2, rel=1e-4)
    assert torch.cuda.max_memory_allocated(device) - before < 64 * N
