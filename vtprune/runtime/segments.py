"""From units, which have a budget of their own, back to segments, which are pictures and clips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vtprune.kernels import reference as kernels
from vtprune.runtime.units import Unit

Holders = Sequence[tuple[Sequence[int], Tensor]]
"""Numbers of equal units, with the token (S, N) of its unit that holds each of theirs, -1 where it is lost."""


def per_segment(units: Sequence[Unit], decided: Mapping[int, Tensor], count: int) -> tuple[Tensor, ...]:
    """Of one (N,) for each unit, one (n,) per segment, tokens in their order."""
    values: dict[int, list[Tensor]] = defaultdict(list)
    places: dict[int, list[np.ndarray]] = defaultdict(list)
    for number, unit in enumerate(units):
        start = 0
        for piece in unit.pieces:
            stop = start + len(piece.at)
            values[piece.segment].append(decided[number][start:stop])
            places[piece.segment].append(piece.at)
            start = stop
    return tuple(_ordered(kernels.joined(values[one]), np.concatenate(places[one])) for one in range(count))


def holders_per_segment(
    units: Sequence[Unit], holders: Holders, count: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`into` (n,) and `held` (n,) per segment; both empty where nothing merges."""
    into: dict[int, Tensor] = {}
    held: dict[int, Tensor] = {}
    for chosen, own in holders:
        numbers = torch.from_numpy(np.array([units[number].numbers for number in chosen]))
        named = numbers.to(own.device, non_blocking=True).gather(1, own.clamp(min=0)).masked_fill(own < 0, -1)
        into.update(zip(chosen, named.unbind(), strict=True))
        held.update(zip(chosen, _tally(own).unbind(), strict=True))
    if not into:
        return (), ()
    return per_segment(units, into, count), per_segment(units, held, count)


def _ordered(values: Tensor, numbers: np.ndarray) -> Tensor:
    """Values (n,) of the tokens of these numbers, by number."""
    if (numbers[1:] > numbers[:-1]).all():
        return values
    return values[torch.from_numpy(np.argsort(numbers)).to(values.device, non_blocking=True)]


def _tally(into: Tensor) -> Tensor:
    """How often (S, N) each token is named in `into` (S, N), -1 naming none."""
    return torch.zeros_like(into).scatter_add_(1, into.clamp(min=0), (into >= 0).long())
