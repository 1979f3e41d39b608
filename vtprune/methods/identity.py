"""Keeps every token: the neutral method, for tests and as the unpruned arm of comparisons."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import TopK


def identity() -> Pipeline:
    """Keep everything.

    Title: No pruning
    Source: none
    Deviations: none. `wrap` refuses any other `keep` than 1.0 with it.
    """
    return Pipeline(name="identity", picks=(Pick(name="all", scorer=Constant(), selector=TopK()),))
