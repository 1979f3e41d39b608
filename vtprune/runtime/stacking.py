"""Equal units of a prompt as tensors: what a pipeline gets to see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtprune.errors import UnsupportedCall
from vtprune.kernels import host
from vtprune.kernels import reference as kernels
from vtprune.report import NOT_FINITE
from vtprune.runtime.evidence import Forced
from vtprune.runtime.units import Unit
from vtprune.types import VisualTokens


def stacks_of(units: list[Unit], forced: list[Forced]) -> list[list[int]]:
    """Numbers of the units that can be stacked."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, (unit, force) in enumerate(zip(units, forced, strict=True)):
        groups[(*unit.shape, force.shape)].append(number)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Equal units as tensors: `at` (S, N) says where their tokens are, `k` of them stay."""

    tokens: VisualTokens
    at: Tensor
    k: int


@dataclass(frozen=True, kw_only=True)
class Stacker:
    """Builds stacks from the prompt and the evidence per segment. What is 0 in `survivors` is gone, and forbidden."""

    embeds: Tensor
    scores: Mapping[str, list[Tensor]]
    survivors: str | None = None

    def stack(self, units: list[Unit], forced: list[Forced]) -> Stack:
        """What a pipeline gets to see of equal units."""
        where = np.array([unit.at for unit in units])
        at = torch.from_numpy(where).to(self.embeds.device, non_blocking=True)
        evidence = {name: _of_units(units, per_segment) for name, per_segment in self.scores.items()}
        if forced[0].protect:
            evidence["protect"] = torch.tensor([force.protect for force in forced]).to(at.device, non_blocking=True)
        if forced[0].forbid:
            banned = torch.tensor([force.forbid for force in forced]).to(at.device, non_blocking=True)
            evidence["forbid"] = torch.zeros(at.shape, dtype=torch.bool, device=at.device).scatter_(1, banned, True)
        if self.survivors in evidence:
            evidence["forbid"] = evidence[self.survivors] == 0
        tokens = VisualTokens(
            features=_features(self.embeds, where, at),
            parts=units[0].parts,
            ordinals=tuple(unit.ordinal for unit in units),
            evidence=evidence,
        )
        return Stack(tokens=tokens, at=at, k=units[0].k)


def soundness(tokens: VisualTokens) -> tuple[Tensor, ...]:
    """Whether features and evidence are finite, to be looked at later; on the CPU what is not raises at once."""
    numbers = {"features": tokens.features, **tokens.evidence}
    flags = []
    for name, values in numbers.items():
        if not values.is_floating_point():
            continue
        finite = torch.stack(values.detach().aminmax()).isfinite().all()
        if not host.holds(values):
            flags.append(finite)
        elif not finite:
            raise UnsupportedCall(NOT_FINITE.format(name))
    return tuple(flags)


def _features(embeds: Tensor, where: np.ndarray, at: Tensor) -> Tensor:
    """Tokens (S, N, D); those that lie one after the other need no copy."""
    order = where.reshape(-1)
    if not (order[1:] - order[:-1] == 1).all():
        return kernels.take_rows(embeds, at)
    start, D = int(order[0]), embeds.shape[-1]
    return embeds.reshape(-1, D)[start : start + len(order)].view(*where.shape, D)


def _of_units(units: list[Unit], per_segment: list[Tensor]) -> Tensor:
    """Evidence (S, N) or (S, N, C) of stacked units, from that per segment."""
    pieces = [piece.of(per_segment[piece.segment]) for unit in units for piece in unit.pieces]
    return kernels.joined(pieces).unflatten(0, (len(units), -1))
