"""The trend of attention towards late tokens, and how to take it off scores."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from vtprune.errors import InvalidOption
from vtprune.types import VisualTokens

Form = Literal["exponential", "cubic"]
_ROUNDS = 10
_TINY = 1e-11
_LOWEST = 0.05
_RIDGE = 1e-6
_EXACT = 1e-3
_BISQUARE = 4.685


@dataclass(frozen=True, kw_only=True)
class WithoutRecency:
    """Divide every score by a trend over the place u of its token in the picture, 0 the first, 1 the last.

    The trend is exp(k u), or 1 + a u + b u^2 + c u^3. With `constants`, (k,) or (a, b, c), it is that of a model, a
    layer and its rows, fitted on many pictures. Without, each picture gives its own, by robust regression of the
    logarithm (a cubic one there too): tokens far off the trend, those the question is about, count little. Of an
    exponential trend k is 0 or more: nothing favours early tokens. Scores are to be 0 or more.
    Source: arXiv 2508.17807.
    """

    form: Form = "exponential"
    constants: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.form not in ("exponential", "cubic"):
            raise InvalidOption(f"form={self.form!r}: expected 'exponential' or 'cubic'")
        known, count = self.constants, 1 if self.form == "exponential" else 3
        if known is None:
            return
        numbers = isinstance(known, tuple) and all(isinstance(one, (int, float)) and isfinite(one) for one in known)
        if not numbers or len(known) != count:
            raise InvalidOption(f"constants={known!r}: expected a tuple of {count} for a trend that is {self.form}")

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        places = places_of(tokens)
        return scores / self.trend(places, scores).clamp_min(_LOWEST)

    def trend(self, places: Tensor, scores: Tensor) -> Tensor:
        """(S, n), 1 at the first token."""
        if self.constants is not None:
            return trend_of(self.form, self.constants, places)
        degree = 1 if self.form == "exponential" else 3
        powers = torch.stack([places**power for power in range(degree + 1)], dim=2)
        found = fitted(powers, scores.clamp_min(_TINY).log(), trusted=scores > _TINY)[:, 1:]
        if degree == 1:
            found = found.clamp_min(0)
        return (powers[..., 1:] @ found[..., None])[..., 0].exp()


def trend_of(form: Form, constants: tuple[float, ...], places: Tensor) -> Tensor:
    """The trend with these constants at places in [0, 1]."""
    if form == "exponential":
        return (constants[0] * places).exp()
    return 1 + constants[0] * places + constants[1] * places**2 + constants[2] * places**3


def places_of(tokens: VisualTokens) -> Tensor:
    """Where (S, n) each token is among those at first, 0 the first, 1 the last."""
    S, n, _ = tokens.features.shape
    total = sum(part.tokens for part in tokens.parts)
    origin = tokens.evidence.get("origin")
    if origin is None:
        origin = torch.arange(n, device=tokens.features.device).expand(S, n)
    return origin.float() / max(total - 1, 1)


def fitted(powers: Tensor, values: Tensor, *, trusted: Tensor) -> Tensor:
    """Coefficients (S, P) of a robust regression of values (S, n) on (S, n, P): Tukey's bisquare, reweighted ten times.

    Values that are not `trusted` (S, n) take no part. Fewer tokens than coefficients, or all at one place, give the
    flattest trend there is.
    """
    P = powers.shape[2]
    counts = trusted.sum(dim=1, keepdim=True).clamp_min(1)
    values = values - (values * trusted).sum(dim=1, keepdim=True) / counts
    trust = trusted.to(values.dtype)
    ridge = _RIDGE * counts[..., None] * torch.eye(P, device=powers.device)
    found = values.new_zeros(len(values), P)
    for _ in range(_ROUNDS):
        weighted = powers * trust[..., None]
        left = weighted.transpose(1, 2) @ powers + ridge
        found = torch.linalg.solve_ex(left, weighted.transpose(1, 2) @ values[..., None]).result[..., 0]
        off = values - (powers @ found[..., None])[..., 0]
        spread = 1.4826 * off.abs().median(dim=1, keepdim=True).values
        trust = trusted * (1 - (off / (_BISQUARE * spread.clamp_min(_EXACT))).clamp(-1, 1).square()).square()
    return found
