"""Average pooling: a coarser grid of the same picture, the simplest way to have fewer tokens."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.cells import CellCentres
from vtprune.stages.mergers import IntoCell
from vtprune.stages.scorers import Constant


def pool() -> Pipeline:
    """Cut the grid into as many cells as tokens are to be kept; the mean of each cell stands at its middle.

    Title: Average pooling
    Source: none
    Deviations: none
    """
    pick = Pick(name="cells", scorer=Constant(), selector=CellCentres())
    return Pipeline(name="pool", picks=(pick,), merger=IntoCell())
