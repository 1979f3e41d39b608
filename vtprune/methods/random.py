"""Random tokens: the arm every method has to beat."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import Random


def random(*, seed: int = 0) -> Pipeline:
    """Keep uniformly random tokens, the same ones for beams, turns and any batch.

    Title: Random tokens
    Source: none
    Deviations: none

    Args:
        seed: another seed, another draw.
    """
    return Pipeline(name="random", picks=(Pick(name="random", scorer=Constant(), selector=Random(seed=seed)),))
