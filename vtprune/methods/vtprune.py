"""The house default: important tokens that do not repeat each other."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.debiasers import MinMax
from vtprune.stages.scorers import Importance
from vtprune.stages.selectors import MMR


def vtprune(*, lam: float = 0.5) -> Pipeline:
    """Maximal marginal relevance between encoder importance and similarity of the projected tokens.

    Title: House default: MMR of encoder importance and diversity
    Source: the selection rule is that of MMR (Carbonell and Goldstein, SIGIR 1998)
    Deviations: none; text-free, so that a choice survives the next turn of a chat.

    Args:
        lam: weight of importance against diversity, in [0, 1].
    """
    selector = MMR(lam=lam)
    return Pipeline(
        name="vtprune", picks=(Pick(name="mmr", scorer=Importance(), debiasers=(MinMax(),), selector=selector),)
    )
