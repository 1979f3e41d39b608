"""HiPrune: anchors of a middle layer with their neighbours, then what the last layers look at."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.rules import ClsOrReceived
from vtprune.stages.scorers import Importance, Read
from vtprune.stages.selectors import TopK
from vtprune.stages.structured import AnchorsAndNeighbours


def hiprune(*, anchors: float = 0.1, middle: float = 0.375) -> Pipeline:
    """Keep the tokens a middle layer attends to with the four around each, and fill up by attention of the last layer.

    Title: HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models
    Source: arXiv 2508.00553
    Deviations: neighbours never lie across a border of the picture (in the code known to us they do). Anchors and
        neighbours fill their share exactly (there: a rounded number of anchors, and all neighbours). The middle layer
        is a share of the depth (9 of 24). Encoders without a CLS token: received attention.

    Args:
        anchors: share of the budget for anchors and their neighbours, in (0, 1].
        middle: share of the depth of the encoder where the middle layer is, in [0, 1].
    """
    check_share("anchors", anchors, above=0)
    check_share("middle", middle)
    scorer = Read(rule=ClsOrReceived(), at=middle)
    first = Pick(name="anchors", scorer=scorer, selector=AnchorsAndNeighbours(), share=anchors)
    rest = Pick(name="deep", scorer=Importance(), selector=TopK())
    return Pipeline(name="hiprune", picks=(first, rest))
