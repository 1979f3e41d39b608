"""MustDrop, vision stage: windows that look alike become one patch."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.encoder import MergeWindows, Survivors
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK


def mustdrop_vision(*, side: int = 3) -> Pipeline:
    """Merge the windows of most alike patches after the first block; keep what the last one attends to.

    Title: Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model
    Source: arXiv 2411.10803
    Deviations: as many windows merge as the budget needs (the authors: all above a threshold, the fewest of the batch).
        Where windows are too few, attention of the block that makes the features decides; there is no set of tokens
        that stays whatever happens (the authors protect 8 % by attention of the last block, and go on inside the
        language model). The order is that of the picture. Grids that the windows do not divide keep their last rows and
        columns.

    Args:
        side: of a window.
    """
    pick = Pick(name="windows and attention", scorer=Read(rule=Survivors()), selector=TopK())
    return Pipeline(name="mustdrop_vision", picks=(pick,), encoder=MergeWindows(side=side))
