"""VFlowOpt: an importance map of the encoder decides before the language model and at two depths inside."""

from __future__ import annotations

from vtprune.methods.vflowopt_select import vflowopt_select
from vtprune.pipeline import LayerStage, Pick, Pipeline
from vtprune.stages.rules import SinkRows
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK

_BEFORE, _FIRST, _SECOND = 0.2651, 0.9833, 0.8773


def vflowopt(*, threshold: float = 34.76, recycled: float = 0.016) -> Pipeline:
    """Rank by what the sinks of the encoder attend to, recycle cells, and cut the same ranking twice in the layers.

    Title: VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization
    Source: arXiv 2508.05211
    Deviations: those of `vflowopt_select`. Shares are those that the authors found for a quarter kept of
        LLaVA-OneVision-7B; other averages raise them to one power, where the authors search again.

    Published:
        llava_onevision: keep=0.2507

    Args:
        threshold: a sink gets more than so many times the mean attention.
        recycled: share of the budget for recycled tokens, in [0, 1).
    """
    first = vflowopt_select(threshold=threshold, recycled=recycled)
    pick = Pick(name="deep", scorer=Read(rule=SinkRows(threshold=threshold)), selector=TopK())
    inside = (
        LayerStage(at=9 / 28, keep=_BEFORE * _FIRST, picks=(pick,)),
        LayerStage(at=18 / 28, keep=_BEFORE * _FIRST * _SECOND, picks=(pick,)),
    )
    return Pipeline(name="vflowopt", picks=first.picks, merger=first.merger, before=_BEFORE, inside=inside)
