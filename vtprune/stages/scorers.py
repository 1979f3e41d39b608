"""Scorers: how much each token is worth, (S, N) in fp32, higher is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune._checks import check_positive, check_share
from vtprune.errors import InvalidOption
from vtprune.glances import ChangeRule, Glance, Need, RowRule, Rows, StateGlance, StateRule, Transition
from vtprune.protocols import Debiaser, Scorer
from vtprune.readings import Reading, Rule
from vtprune.stages.debiasers import MinMax
from vtprune.stages.rules import ClsOrReceived
from vtprune.stages.vectors import FEATURES, evidence_of, needed_for, vectors_of
from vtprune.types import VisualTokens

_TINY = 1e-8


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
class Glanced:
    """What a rule makes of the attention of a few rows of the language model at a drop point: see `Glance`."""

    rule: RowRule
    rows: Rows = "text"
    at: Literal["before", "behind"] = "before"

    @property
    def glance(self) -> Glance:
        return Glance(rule=self.rule, rows=self.rows, at=self.at)

    @property
    def needs(self) -> frozenset[str | Glance]:
        return frozenset({self.glance})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return evidence_of(tokens, self.glance.name)


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What a rule makes of hidden states of a few rows at a drop point, the same for all tokens: see `StateGlance`."""

    rule: StateRule
    rows: Literal["last", "text"] = "last"

    @property
    def glance(self) -> StateGlance:
        return StateGlance(rule=self.rule, rows=self.rows)

    @property
    def needs(self) -> frozenset[str | StateGlance]:
        return frozenset({self.glance})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return evidence_of(tokens, self.glance.name)


@dataclass(frozen=True, kw_only=True)
class Changed:
    """What decoder layers made of tokens on the way to a drop point, summed from `since` on: see `Transition`."""

    rule: ChangeRule
    since: float = 0.0

    @property
    def transition(self) -> Transition:
        return Transition(rule=self.rule, since=self.since)

    @property
    def needs(self) -> frozenset[str | Transition]:
        return frozenset({self.transition})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return evidence_of(tokens, self.transition.name)


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


@dataclass(frozen=True, kw_only=True)
class Debiased:
    """A scorer whose scores go through a debiaser: for parts of scorers that are made of others."""

    scorer: Scorer
    debiaser: Debiaser

    @property
    def needs(self) -> frozenset[Need]:
        return self.scorer.needs | getattr(self.debiaser, "needs", frozenset())

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return self.debiaser(tokens, self.scorer(tokens).float())


@dataclass(frozen=True)
class Importance:
    """Attention of the vision encoder: the CLS row, or received attention on encoders without a CLS token."""

    @property
    def needs(self) -> frozenset[str | Reading]:
        return frozenset({ClsOrReceived().name})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return evidence_of(tokens, ClsOrReceived().name).float()


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Two scorers on one scale over a picture, with `weight` on the first and the rest on the second.

    The scale is the `"range"`, stretched to [0, 1], or the `"sum"` of the scores, which becomes 1.
    """

    first: Scorer
    second: Scorer
    weight: float = 0.5
    scale: Literal["range", "sum"] = "range"

    def __post_init__(self) -> None:
        check_share("weight", self.weight)
        if self.scale not in ("range", "sum"):
            raise InvalidOption(f"scale={self.scale!r}: expected 'range' or 'sum'")

    @property
    def needs(self) -> frozenset[Need]:
        return self.first.needs | self.second.needs

    def __call__(self, tokens: VisualTokens) -> Tensor:
        scaled = _stretched if self.scale == "range" else _shared
        first, second, out = scaled(tokens, self.first, self.second)
        return (self.weight * first + (1 - self.weight) * second).masked_fill(out, float("-inf"))


@dataclass(frozen=True, kw_only=True)
class Product:
    """Two scorers, each stretched to [0, 1] over a picture and raised to its power, multiplied."""

    first: Scorer
    second: Scorer
    powers: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not isinstance(self.powers, tuple) or len(self.powers) != 2:
            raise InvalidOption(f"powers={self.powers!r}: expected a tuple of two numbers")
        for power in self.powers:
            check_positive("powers", power)

    @property
    def needs(self) -> frozenset[Need]:
        return self.first.needs | self.second.needs

    def __call__(self, tokens: VisualTokens) -> Tensor:
        first, second, out = _stretched(tokens, self.first, self.second)
        return (first ** self.powers[0] * second ** self.powers[1]).masked_fill(out, float("-inf"))


def _stretched(tokens: VisualTokens, first: Scorer, second: Scorer) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of both in [0, 1], 0 where either rules a token out, and where that is."""
    scores = [MinMax()(tokens, scorer(tokens).float()) for scorer in (first, second)]
    out = (scores[0] == float("-inf")) | (scores[1] == float("-inf"))
    return scores[0].masked_fill(out, 0), scores[1].masked_fill(out, 0), out


def _shared(tokens: VisualTokens, first: Scorer, second: Scorer) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of both as shares of their sum, 0 where either rules a token out, and where that is."""
    scores = [scorer(tokens).float() for scorer in (first, second)]
    out = (scores[0] == float("-inf")) | (scores[1] == float("-inf"))
    one, other = (own.masked_fill(out, 0) for own in scores)
    return one / (one.sum(dim=1, keepdim=True) + _TINY), other / (other.sum(dim=1, keepdim=True) + _TINY), out


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
