"""SparseVLM+: words of the question that rate the picture, read from the heads that look at it."""

from __future__ import annotations

from vtprune._checks import check_switch, check_whole
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.glances import MassiveHeads, Undecayed
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK

_STAGES = ((3 / 32, 238 / 576), (7 / 32, 108 / 576), (16 / 32, 60 / 576))


def sparsevlm_plus(*, heads: int = 14, divide: bool = True) -> Pipeline:
    """Cut three times by attention of the words near to the picture, in the heads that pay most to it.

    Title: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference
    Source: arXiv 2410.04417
    Deviations: the decay that attention is divided by counts as 0.05 where it is less (the authors' may be 0 or below),
        and keys cached in earlier turns are divided by 1. The published counts are those of the budget 128; other
        averages raise their shares to one power. Of long texts the last 256 tokens count. Budgets are averages over
        layers (the authors book a cut to the layer before it). Batches work.

    Published:
        llava: keep=0.2502

    Args:
        heads: how many are averaged; all where there are fewer.
        divide: whether attention is divided by the decay of the rotary embedding.
    """
    check_whole("heads", heads, least=1)
    check_switch("divide", divide)
    rule = MassiveHeads(heads=heads)
    scorer = Glanced(rule=Undecayed(rule=rule) if divide else rule, rows="raters")
    pick = Pick(name="rated", scorer=scorer, selector=TopK())
    inside = tuple(LayerStage(at=at, keep=keep, picks=(pick,)) for at, keep in _STAGES)
    return Pipeline(name="sparsevlm_plus", picks=(), inside=inside)
