"""Scorers: how much each token is worth, (S, N) in fp32, higher is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune._checks import check_positive
from vtprune.readings import Reading, Rule
from vtprune.stages.rules import ClsOrReceived
from vtprune.stages.vectors import FEATURES, evidence_of, needed_for, vectors_of
from vtprune.types import VisualTokens


@dataclass(frozen=True)
class Constant:
    """No preference."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, tokens: VisualTokens) -> Tensor:
        S, N, _ = tokens.features.shape
        return torch.zeros(S, N, device=tokens.features.device)


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a rule makes of the vision encoder, of the block that makes the features or of others: see `Reading`."""

    rule: Rule
    at: float | None = None
    since: float | None = None

    @property
    def reading(self) -> Reading:
        """What is read where."""
        return Reading(rule=self.rule, at=self.at, since=self.since)

    @property
    def needs(self) -> frozenset[str | Reading]:
        return frozenset({self.reading})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return evidence_of(tokens, self.reading.name).float()


@dataclass(frozen=True)
class Importance:
    """Attention of the vision encoder: the CLS row, or received attention on encoders without a CLS token."""

    @property
    def needs(self) -> frozenset[str | Reading]:
        return frozenset({ClsOrReceived().name})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return evidence_of(tokens, ClsOrReceived().name).float()


@dataclass(frozen=True, kw_only=True)
class Given:
    """Scores that the caller hands in for each call, with `using(...)`: their name, and whether low ones are good."""

    name: str
    sign: Literal[1, -1] = 1

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.name})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return self.sign * evidence_of(tokens, self.name).float()


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Length of the vectors of a token, in the norm of order `p`."""

    p: float = 2.0
    vectors: str = FEATURES

    def __post_init__(self) -> None:
        check_positive("p", self.p)

    @property
    def needs(self) -> frozenset[str]:
        return needed_for(self.vectors)

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return vectors_of(tokens, self.vectors).float().norm(p=self.p, dim=2)
