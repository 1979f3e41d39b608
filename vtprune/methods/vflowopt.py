"""VFlowOpt: an importance map of the encoder decides before the language model and at two depths inside."""

from __future__ import annotations

from vtprune._checks import check_descending
from vtprune.methods.vflowopt_select import vflowopt_select
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.rules import SinkRows
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK

_POINTS = (9 / 28, 18 / 28)


def vflowopt(
    *, shares: tuple[float, float, float] = (0.2651, 0.2607, 0.2287), threshold: float = 34.76, recycled: float = 0.016
) -> Pipeline:
    """Rank by what the sinks of the encoder attend to, recycle cells, and cut the same ranking twice in the layers.

    Title: VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization
    Source: arXiv 2508.05211
    Deviations: those of `vflowopt_select`. Shares are of the tokens at first (the authors give those inside the layers
        of what is left there), by default what they found for a quarter kept of LLaVA-OneVision-7B. Other averages
        raise them to one power; the authors search again, as `vtprune calibrate` does for a model (they by a Gaussian
        process, it by spread points and steps from the best).

    Published:
        llava_onevision: keep=0.2507

    Args:
        shares: of the tokens at first that enter the language model and stay behind its first and second cut. A
            calibration brings those of a model, with the other two.
        threshold: a sink gets more than so many times the mean attention.
        recycled: share of the budget for recycled tokens, in [0, 1).
    """
    check_descending("shares", shares, 3)
    before, *deep = shares
    first = vflowopt_select(threshold=threshold, recycled=recycled)
    pick = Pick(name="deep", scorer=Read(rule=SinkRows(threshold=threshold)), selector=TopK())
    inside = tuple(LayerStage(at=at, keep=share, picks=(pick,)) for at, share in zip(_POINTS, deep, strict=True))
    return Pipeline(name="vflowopt", picks=first.picks, merger=first.merger, before=before, inside=inside)
