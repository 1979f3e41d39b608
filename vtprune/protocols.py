"""The kinds of stages: callables of these forms, frozen values if they are to be printed, compared and stored."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vtprune.readings import Reading
from vtprune.types import Selection, VisualTokens


class Scorer(Protocol):
    """Scores (S, N) of tokens, higher is better. `needs` names the evidence it reads, or says how to take it."""

    @property
    def needs(self) -> frozenset[str | Reading]: ...

    def __call__(self, tokens: VisualTokens) -> Tensor: ...


class Debiaser(Protocol):
    """Scores (S, N) with a known bias removed."""

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor: ...


class Selector(Protocol):
    """Indices (S, k), distinct, none of them in `taken` (S, m). Scores of -inf must not be picked.

    That they are distinct is not checked: it would wait for the device.
    """

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor: ...


class Merger(Protocol):
    """How dropped tokens live on in kept ones: weights (S, K, N), each row a mixture of all tokens.

    A row is what the kept token of that number becomes; one that takes nothing over has a single 1, at itself. What a
    merger needs besides the features it names in `needs`, as a scorer does.
    """

    def __call__(self, tokens: VisualTokens, selection: Selection) -> Tensor: ...


class Counter(Protocol):
    """How many tokens (S,) a row is worth, from what they hold: at most `k`, the budget."""

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor: ...
