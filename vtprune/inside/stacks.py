"""The sequence that enters the language model, and the equal pictures in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtprune.kernels import host
from vtprune.kernels import reference as kernels
from vtprune.types import Merged, Ordinal, Part, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The sequence that enters the language model: B rows of K tokens.

    `lengths` are its real tokens per row. `rows` (B, R) are the places of the text behind the last picture, the last
    token last, `real` (B, R) is False where there is less. `raters` (B, R) are those of them that rate the pictures,
    None where the method does not ask.
    """

    valid: Tensor
    lengths: tuple[int, ...]
    left_padded: bool
    rows: Tensor
    real: Tensor
    raters: Tensor | None = None

    def real_of(self, rows: str) -> Tensor:
        """(B, r), which of the last r rows glances of a kind look from."""
        if rows == "last":
            return self.real[:, -1:]
        if rows == "raters":
            assert self.raters is not None
            return self.raters
        return self.real


@dataclass(frozen=True, kw_only=True)
class LayerStack:
    """Equal pictures: `at` (S, n) are the places of their tokens, counted through all B * K of the sequence.

    `origin` (S, n) says which of the N tokens at first they are, ascending, `counts` how many stay behind each drop
    point, `protect` (S, m) which of the N stay behind all.
    `depths` (S, N) is how many layers each token has gone through, as far as that is decided, and `taken` (S, N) which
    pick of the pipeline took it at the last cut it passed, -1 where it is protected; `numbers` are those of the
    pictures, `wishes` (S,) each what counters said last. `into` (S, N), where the method merges, says which of the N
    holds each of them by now, -1 where it is lost.
    """

    at: Tensor
    origin: Tensor
    prompt_rows: tuple[int, ...]
    parts: tuple[Part, ...]
    ordinals: tuple[Ordinal, ...]
    evidence: Mapping[str, Tensor]
    counts: tuple[int, ...]
    depths: Tensor
    taken: Tensor
    numbers: tuple[int, ...]
    into: Tensor | None = None
    wishes: tuple[Tensor, ...] = ()
    protect: Tensor | None = None

    @property
    def least(self) -> int:
        """How many tokens stay at every drop point, whatever is decided there."""
        return 0 if self.protect is None else self.protect.shape[1]

    def stays(self, number: int) -> int:
        """How many tokens stay behind a drop point."""
        return min(self.at.shape[1], self.counts[number])

    def tokens(self, hidden: Tensor, glances: Mapping[str, Tensor]) -> VisualTokens:
        """What stages see of hidden states (B, K, D), with evidence (B, K) of the drop point and that of before."""
        seen = {name: values.reshape(-1)[self.at] for name, values in glances.items()}
        early = {name: _at_origin(values, self.origin) for name, values in self.evidence.items()}
        if self.protect is not None:
            early["protect"] = torch.searchsorted(self.origin.contiguous(), self.protect)
        return VisualTokens(
            features=kernels.take_rows(hidden, self.at),
            parts=self.parts,
            ordinals=self.ordinals,
            evidence={**early, **seen, "origin": self.origin},
        )

    def part(self, rows: list[int], number: int, count: int) -> LayerStack:
        """Some of the pictures, with `count` tokens each behind a drop point and no more behind later ones."""
        counts = (*self.counts[:number], count, *self.counts[number + 1 :])
        if len(rows) == len(self.at):
            return replace(self, counts=counts)
        chosen = torch.tensor(rows).to(self.at.device, non_blocking=True)
        return replace(
            self,
            at=self.at[chosen],
            origin=self.origin[chosen],
            prompt_rows=tuple(self.prompt_rows[row] for row in rows),
            ordinals=tuple(self.ordinals[row] for row in rows),
            evidence={name: values[chosen] for name, values in self.evidence.items()},
            protect=None if self.protect is None else self.protect[chosen],
            counts=counts,
            depths=self.depths[chosen],
            taken=self.taken[chosen],
            numbers=tuple(self.numbers[row] for row in rows),
            into=None if self.into is None else self.into[chosen],
            wishes=tuple(wish[chosen] for wish in self.wishes),
        )

    def followed(self, keep: Tensor, merged: Merged | None) -> Tensor | None:
        """`into` behind a cut that keeps `keep` (S, k): a holder that leaves hands over what it holds, or loses it."""
        if self.into is None:
            return None
        stays = self.origin.gather(1, keep)
        holder = torch.full_like(self.into, -1).scatter(1, stays, stays)
        if merged is not None:
            taken = stays.gather(1, merged.into.clamp(min=0)).masked_fill(merged.into < 0, -1)
            holder = holder.scatter(1, self.origin, taken)
        return holder.gather(1, self.into.clamp(min=0)).masked_fill(self.into < 0, -1)


def visual_of(valid: Tensor, places: Iterable[Tensor]) -> Tensor:
    """(B, K), True at the places of pictures, counted through all of `valid` (B, K)."""
    found = torch.zeros_like(valid)
    for at in places:
        found.view(-1)[at] = True
    return found


def by_count(wanted: Tensor) -> dict[int, list[int]]:
    """The numbers of equal pictures by how many of their tokens stay, (S,): it waits for the device."""
    rows: dict[int, list[int]] = {}
    for row, count in enumerate(host.read_counts(wanted)):
        rows.setdefault(count, []).append(row)
    return rows


def _at_origin(values: Tensor, origin: Tensor) -> Tensor:
    rows = origin if values.ndim == 2 else origin[..., None].expand(-1, -1, values.shape[2])
    return values.gather(1, rows)
