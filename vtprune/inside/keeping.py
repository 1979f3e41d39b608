"""What of the pictures every layer stores in its KV cache, chosen in one prefill."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtprune.inside.stacks import Entry, by_count, visual_of
from vtprune.kernels import reference as kernels
from vtprune.picking import mixed
from vtprune.pipeline import CacheStage
from vtprune.types import Ordinal, Part, VisualTokens


@dataclass(frozen=True, kw_only=True)
class CachedStack:
    """Equal pictures: `at` (S, N) are the places of their tokens, counted through all B * K of the sequence.

    At most `count` of each stay in a cache. `numbers` are those of the pictures.
    """

    at: Tensor
    prompt_rows: tuple[int, ...]
    parts: tuple[Part, ...]
    ordinals: tuple[Ordinal, ...]
    numbers: tuple[int, ...]
    count: int

    def tokens(self, keys: Tensor, scores: Mapping[str, Tensor]) -> VisualTokens:
        """What stages see of keys (B, G, K, d) and scores (B, G, K): a picture for each head, (S * G, N)."""
        where = self.of_heads(keys.shape[1], keys.shape[2])
        return VisualTokens(
            features=keys.flatten(0, 2)[where],
            parts=self.parts,
            ordinals=tuple(ordinal for ordinal in self.ordinals for _ in range(keys.shape[1])),
            evidence={name: values.reshape(-1)[where] for name, values in scores.items()},
        )

    def of_heads(self, heads: int, K: int) -> Tensor:
        """Places (S * G, N) counted through all B * G * K."""
        row, column = self.at // K, self.at % K
        each = torch.arange(heads, device=self.at.device)[:, None]
        return ((row[:, None] * heads + each) * K + column[:, None]).flatten(0, 1)

    def part(self, rows: list[int], count: int) -> CachedStack:
        """Some of the pictures, with `count` tokens each."""
        chosen = torch.tensor(rows).to(self.at.device, non_blocking=True)
        return replace(
            self,
            at=self.at[chosen],
            prompt_rows=tuple(self.prompt_rows[row] for row in rows),
            ordinals=tuple(self.ordinals[row] for row in rows),
            numbers=tuple(self.numbers[row] for row in rows),
            count=count,
        )


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a layer keeps: `places` (B * G, K') of the sequence, in which `valid` (B, K') is no padding.

    `slots` (B * G, K) says where in them each token stands, or the last kept one before it; `kept` (B * G, K) which do.
    """

    places: Tensor
    valid: Tensor
    slots: Tensor
    kept: Tensor
    lengths: tuple[int, ...]


@dataclass
class Keeping:
    """One prefill: `entry` is the sequence, `rows` (B, R) those that are looked from, `kept` what each layer keeps.

    `known` tells for each layer which of the tokens cached before are real, None where none are.
    """

    stage: CacheStage
    entry: Entry
    stacks: list[CachedStack]
    known: tuple[Tensor, ...] | None
    kept: list[Kept] = field(default_factory=list)
    tally: dict[int, Tensor] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor:
        """(B, K), which tokens of the sequence are real."""
        return self.entry.valid

    @functools.cached_property
    def visual(self) -> Tensor:
        """(B, K), True at the tokens of pictures."""
        return visual_of(self.valid, (stack.at for stack in self.stacks))

    @property
    def cached(self) -> dict[int, Tensor]:
        """Of every picture, by its number, in how many layers each of its tokens is stored, (N,)."""
        return self.tally

    @property
    def average_stored(self) -> float:
        """Length of what layers store, averaged over them."""
        return sum(one.valid.shape[1] for one in self.kept) / max(len(self.kept), 1)

    def restore(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, K, D) as they are: all tokens passed."""
        return hidden

    def past_valid(self, layer: int) -> Tensor | None:
        """(B, past), which cached tokens of a layer are real; None where nothing is cached."""
        return None if self.known is None else self.known[layer]

    def blocks(self, rows: str, size: int) -> list[tuple[Tensor, Tensor]]:
        """Rows (B, R) that are looked from and which of them are real, at most `size` at once."""
        if rows == "all":
            real = self.valid
            places = torch.arange(real.shape[1], device=real.device).expand(real.shape)
        else:
            real = self.entry.real_of(rows)
            places = self.entry.rows[:, -real.shape[1] :]
        return list(zip(places.split(size, dim=1), real.split(size, dim=1), strict=True))


def choose(keeping: Keeping, states: list[Tensor], scores: Mapping[str, Tensor]) -> Kept:
    """What of the pictures a layer keeps; `states` (B, G, K, d), keys first, get merged rows in place of kept ones."""
    keys = states[0]
    heads = keys.shape[1] if keeping.stage.heads else 1
    seen = keys if heads > 1 or keys.shape[1] == 1 else keys.transpose(1, 2).flatten(2)[:, None]
    stacks = keeping.stacks
    if keeping.stage.counter is not None:
        stacks = [part for stack in stacks for part in _counted(keeping, stack, seen, scores)]
    B, K = keeping.valid.shape
    kept = keeping.valid[:, None].expand(B, heads, K).clone()
    lengths = list(keeping.entry.lengths)
    for stack in stacks:
        n = stack.at.shape[1]
        k = min(stack.count, n)
        for row in stack.prompt_rows:
            lengths[row] -= n - k
        where = stack.of_heads(heads, K)
        kept.view(-1)[where] = False
        stays = _stays(keeping, stack, k, seen, scores, states)
        kept.view(-1)[where.gather(1, stays)] = True
        _count_in(keeping, stack, stays, heads)
    width = max(lengths)
    places, valid, slots = kernels.kept_indices(kept.flatten(0, 1), width, left_padded=keeping.entry.left_padded)
    return Kept(
        places=places,
        valid=valid.view(B, heads, width)[:, 0],
        slots=slots,
        kept=kept.flatten(0, 1),
        lengths=tuple(lengths),
    )


def _stays(
    keeping: Keeping, stack: CachedStack, k: int, seen: Tensor, scores: Mapping[str, Tensor], states: list[Tensor]
) -> Tensor:
    """Ascending indices (S * G, k) of the tokens of a stack that stay; merged rows are written to `states`."""
    where = stack.of_heads(seen.shape[1], seen.shape[2])
    if k == where.shape[1]:
        return torch.arange(k, device=where.device).expand(where.shape)
    stage = keeping.stage
    with kernels.exact(seen.device):
        tokens = stack.tokens(seen, scores)
        selection = stage.choice.run(tokens, k)
        if stage.merger is not None and k:
            mixture = stage.merger(tokens, selection)
            at = where.gather(1, selection.keep)
            for number, tensor in enumerate(states):
                flat = tensor.flatten(0, 2)
                rows = mixed(mixture, flat[where], selection).rows.to(flat.dtype)
                states[number] = flat.index_copy(0, at.flatten(), rows.flatten(0, 1)).view(tensor.shape)
    return selection.keep


def _counted(keeping: Keeping, stack: CachedStack, seen: Tensor, scores: Mapping[str, Tensor]) -> list[CachedStack]:
    """The pictures of a stack by how many of their tokens an adaptive stage lets stay: it waits for the device."""
    counter = keeping.stage.counter
    assert counter is not None
    with kernels.exact(seen.device):
        wanted = counter(stack.tokens(seen, scores), stack.count).clamp(0, stack.count)
    return [stack.part(rows, count) for count, rows in by_count(wanted).items()]


def _count_in(keeping: Keeping, stack: CachedStack, stays: Tensor, heads: int) -> None:
    """Add to the tally of every picture (N,) the share of the heads that keep each token."""
    S, N = stack.at.shape
    ones = torch.zeros(S * heads, N, device=stays.device).scatter_(1, stays, 1.0)
    shares = ones.view(S, heads, N).mean(dim=1)
    for number, own in zip(stack.numbers, shares.unbind(), strict=True):
        keeping.tally[number] = keeping.tally[number] + own if number in keeping.tally else own
