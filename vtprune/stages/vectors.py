"""What stages read of tokens: evidence by name, and vectors to compare them by."""

from __future__ import annotations

from torch import Tensor

from vtprune.errors import MissingEvidence, UnsupportedCall
from vtprune.kernels import host
from vtprune.protocols import Scorer
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
    return tokens.features if name == FEATURES else evidence_of(tokens, name)


def scores_of(scorer: Scorer, tokens: VisualTokens, whose: str) -> Tensor:
    """What `scorer` says of the tokens, (S, N).

    Raises:
        UnsupportedCall: for NaN on the CPU; elsewhere NaN counts as 0, since nothing may wait.
    """
    scores = scorer(tokens)
    if not host.holds(scores):
        return scores.nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf"))
    if host.has_nan(scores):
        raise UnsupportedCall(f"the scorer of {whose} returned NaN: expected a number for every token")
    return scores


def evidence_of(tokens: VisualTokens, name: str) -> Tensor:
    """Evidence of that name.

    Raises:
        MissingEvidence: where nobody recorded it.
    """
    if name not in tokens.evidence:
        raise MissingEvidence(f"this method reads {name!r}, and none was recorded for these tokens")
    return tokens.evidence[name]
