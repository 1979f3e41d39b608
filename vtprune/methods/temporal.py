"""Temporal redundancy pruning: drop what the frame before showed already."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.selectors import TopK
from vtprune.stages.temporal import Novelty


def temporal() -> Pipeline:
    """Keep the tokens that differ most from the same cell of the frame before, over all frames of a clip.

    Title: Temporal redundancy pruning
    Source: none
    Deviations: none
    """
    return Pipeline(name="temporal", picks=(Pick(name="new", scorer=Novelty(), selector=TopK()),))
