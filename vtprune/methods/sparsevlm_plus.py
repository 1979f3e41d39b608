"""SparseVLM+: words of the question that rate the picture, read from the heads that look at it."""

from __future__ import annotations

from vtprune._checks import check_whole
from vtprune.pipeline import LayerStage, Pick, Pipeline
from vtprune.stages.glances import MassiveHeads
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK

_STAGES = ((3 / 32, 238 / 576), (7 / 32, 108 / 576), (16 / 32, 60 / 576))


def sparsevlm_plus(*, heads: int = 14) -> Pipeline:
    """Cut three times by attention of the words near to the picture, in the heads that pay most to it.

    Title: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference
    Source: arXiv 2410.04417
    Deviations: attention is not divided by the decay of the rotary embedding unless a debiaser is asked for. The
        published counts are those of the budget 128; other averages raise their shares to one power. Budgets are
        averages over layers (the authors book a cut to the layer before it). Batches work.

    Published:
        llava: keep=0.2502

    Args:
        heads: how many are averaged; all where there are fewer.
    """
    check_whole("heads", heads, least=1)
    scorer = Glanced(rule=MassiveHeads(heads=heads), rows="raters")
    pick = Pick(name="rated", scorer=scorer, selector=TopK())
    inside = tuple(LayerStage(at=at, keep=keep, picks=(pick,)) for at, keep in _STAGES)
    return Pipeline(name="sparsevlm_plus", picks=(), inside=inside)
