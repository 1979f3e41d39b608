"""What the kernels that choose step by step share: cosines from products, and how a picture fits into one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.errors import BackendUnavailable
from vtprune.kernels.greedy import MOST_HELD, none_chosen

MOST_TOKENS = 16384
"""That many numbers are held in the registers of one program."""
NEGATIVE = tl.constexpr(float("-inf"))


@triton.jit
def similar_of(row: tl.tensor, inverse: tl.tensor, own: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Cosines from a `row` of products and inverse lengths, those of all being `own`.

    What has no direction has an inverse length of 0 and products that may be no numbers: it is similar to nothing.
    """
    similar = row.to(tl.float32) * own * tl.load(inverse + index)
    return tl.where(similar == similar, similar, 0.0)


def in_groups(select: Callable[..., Tensor], k: int, features: Tensor, *more: Tensor | None) -> Tensor:
    """What `select` chooses, of so many pictures at once as may hold their similarities together; at least one."""
    if (none := none_chosen(features, k)) is not None:
        return none
    S, N, _ = features.shape
    size = max(1, MOST_HELD // (4 * N * N))
    parts = (slice(begin, begin + size) for begin in range(0, S, size))
    return torch.cat(
        [select(*(None if every is None else every[own] for every in (features, *more)), k=k) for own in parts]
    )


def block_of(N: int) -> int:
    """The size of a block that holds N numbers; raises `BackendUnavailable` where there is none."""
    if N > MOST_TOKENS:
        raise BackendUnavailable(f"{N} tokens in one part with their similarities held: expected at most {MOST_TOKENS}")
    return max(16, triton.next_power_of_2(N))


def warps_of(block: int) -> int:
    """Few enough that a thread has work, many enough that it has registers; 1024 threads are the most there can be."""
    return min(1024 // (64 if torch.version.hip else 32), max(1, block // 256))


def numbers(values: Tensor) -> Tensor:
    """The same in fp32, contiguous."""
    return values.float().contiguous()


def barred(first: Tensor, available: Tensor | None) -> Tensor:
    """Worths (S, N) in fp32, contiguous, -inf at what is not available."""
    return numbers(first if available is None else first.masked_fill(~available, float("-inf")))


def nothing_seen(first: Tensor, available: Tensor | None, reduce: Literal["min", "sum"]) -> Tensor:
    """What all tokens are worth before any is looked from."""
    worth = torch.full_like(first, float("inf") if reduce == "min" else 0.0)
    return worth if available is None else worth.masked_fill_(~available, float("-inf"))


def begun(first: Tensor, k: int, taken: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for what is chosen (S, k), and what all steps start from (S, m): `taken`, or the first choice, entered."""
    chosen = torch.empty(first.shape[0], k, dtype=torch.long, device=first.device)
    if taken is not None:
        return chosen, taken.contiguous()
    chosen[:, 0] = first.argmax(dim=1)
    return chosen, chosen[:, :1].contiguous()
