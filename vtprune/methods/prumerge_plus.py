"""LLaVA-PruMerge+: attention outliers and evenly spaced tokens, each with its neighbours merged in."""

from __future__ import annotations

from vtprune._checks import check_share, check_switch
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.counters import Outliers
from vtprune.stages.mergers import NeighbourSum
from vtprune.stages.rules import ClsOrReceived
from vtprune.stages.scorers import Constant, Read
from vtprune.stages.selectors import Stride, TopK


def prumerge_plus(*, outliers: float = 0.25, adaptive: bool = False) -> Pipeline:
    """Keep what the CLS token of the last layer attends to and an even stride of the rest; add neighbours to each.

    Title: LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models
    Source: arXiv 2403.15388
    Deviations: attention is per head (the authors: one product without heads). Neighbours are added after the
        projector, weighted by attention that sums to 1 over a picture; keys are means over heads, of the layer the
        features come from (the authors: all heads of the last). Evenly spaced tokens fill the budget, out of those that
        are left (the authors: every few tokens of all, by the number of outliers). The token of what is dropped is left
        out. The budget is exact unless `adaptive`; then it is the most, and the number of attention outliers of a
        picture, over the share for them, decides (the authors: outliers of the whole batch). The order is that of the
        picture.

    Args:
        outliers: share of the budget for tokens with high attention, in (0, 1]; the rest is evenly spaced.
        adaptive: let the picture decide how many tokens stay, at most the budget.
    """
    check_share("outliers", outliers, above=0)
    check_switch("adaptive", adaptive)
    scorer = Read(rule=ClsOrReceived(), at=1.0)
    first = Pick(name="outliers", scorer=scorer, selector=TopK(), share=outliers)
    rest = Pick(name="stride", scorer=Constant(), selector=Stride())
    merger = NeighbourSum(weights=scorer, vectors="keys")
    counter = Outliers(scorer=scorer, factor=1 / outliers) if adaptive else None
    return Pipeline(name="prumerge_plus", picks=(first, rest), merger=merger, counter=counter)
