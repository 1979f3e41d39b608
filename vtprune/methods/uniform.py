"""Evenly spaced tokens in raster order: the other content-free arm."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import Stride


def uniform() -> Pipeline:
    """Keep tokens at an even stride in raster order.

    Title: Evenly spaced tokens
    Source: none
    Deviations: none
    """
    return Pipeline(name="uniform", picks=(Pick(name="stride", scorer=Constant(), selector=Stride()),))
