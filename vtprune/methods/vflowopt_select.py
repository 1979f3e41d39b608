"""VFlowOpt, before the language model: an importance map, and cells that recycle what is dropped."""

from __future__ import annotations

from vtprune._checks import check_positive, check_share
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.cells import CellBest
from vtprune.stages.mergers import IntoCell
from vtprune.stages.rules import SinkRows
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK


def vflowopt_select(*, threshold: float = 34.76, recycled: float = 0.016) -> Pipeline:
    """Rank tokens by what the sinks of the encoder attend to; merge the rest into one token for each large cell.

    Title: VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization
    Source: arXiv 2508.05211
    Deviations: the count is exact: where nothing is left of a cell, another keeps two tokens, and the first of them
        stands for the rest. Cells are as many as the share of the budget says (the authors give their edge in tokens)
        and lie on the grid of each part. Clips and several pictures are recycled too (the authors: drop). Entropy of
        patches is left out: all published settings give it the weight 0. Newline tokens are kept and not counted. The
        stages inside the language model are not part of it.

    Published:
        llava_onevision: keep=0.2651

    Args:
        threshold: a sink gets more than so many times the mean attention; the default is that for a quarter kept.
        recycled: share of the budget for recycled tokens, in [0, 1).
    """
    check_positive("threshold", threshold)
    check_share("recycled", recycled, below=1)
    scorer = Read(rule=SinkRows(threshold=threshold))
    best = Pick(name="best", scorer=scorer, selector=TopK(), share=1 - recycled)
    heads = Pick(name="recycled", scorer=scorer, selector=CellBest())
    return Pipeline(name="vflowopt_select", picks=(best, heads), merger=IntoCell(pick=1, weights=scorer))
