"""HoloV: every stretch of the picture gets its share."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.scorers import Importance
from vtprune.stages.structured import ChunkQuota


def holov(*, chunks: int = 16, diversity: float = 0.09) -> Pipeline:
    """Share the budget among stretches of the raster order by attention and local variety; keep the best of each.

    Title: Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention
    Source: arXiv 2510.02912
    Deviations: budgets of more tokens than a stretch holds go to the others (the authors' code fills up with zeros).
        What rounding leaves of the budgets goes by largest remainder (the authors: to the largest shares). There are 16
        stretches on every model (the authors: by the budget on Qwen). Variety is scaled over the picture (the authors:
        within a stretch, where it has no effect). The order is that of the picture (the authors: by attention inside a
        stretch).

    Published:
        llava: keep=64

    Args:
        chunks: how many stretches.
        diversity: weight of local variety against attention.
    """
    selector = ChunkQuota(chunks=chunks, diversity=diversity)
    return Pipeline(name="holov", picks=(Pick(name="chunks", scorer=Importance(), selector=selector),))
