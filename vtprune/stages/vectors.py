"""Which vectors a selector compares: the projected tokens, or others that were recorded for them."""

from __future__ import annotations

from torch import Tensor

from vtprune.errors import MissingEvidence
from vtprune.types import VisualTokens

FEATURES = "features"


def needed_for(name: str) -> frozenset[str]:
    """The evidence that `vectors_of` reads: none for `"features"`."""
    return frozenset() if name == FEATURES else frozenset({name})


def vectors_of(tokens: VisualTokens, name: str) -> Tensor:
    """Vectors (S, N, C) to compare tokens by: `tokens.features` for `"features"`, evidence of that name otherwise.

    Raises:
        MissingEvidence: where nobody recorded it.
    """
    if name == FEATURES:
        return tokens.features
    if name not in tokens.evidence:
        raise MissingEvidence(f"this method compares tokens by {name!r}, and none was recorded for these tokens")
    return tokens.evidence[name]
