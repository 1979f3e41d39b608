"""ATP, without training: what the text looks at, and a grid of the rest that keeps the picture together."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.glances import MeanAttention
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK
from vtprune.stages.spread import SpatialSpread

_STAGES = ((4 / 32, 0.5), (14 / 32, 0.25), (24 / 32, 0.125))


def atp(*, spread: float = 0.25) -> Pipeline:
    """Cut three times by attention of the text; a quarter of every cut goes to tokens spread over the picture.

    Title: ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models
    Source: arXiv 2412.00447
    Deviations: nothing is trained. The authors learn thresholds, so that the number kept depends on the picture; here
        the average over layers is the budget and shares halve from cut to cut. Attention among patches takes no part.
        The grid is laid over the tokens that are left, by farthest places.

    Published:
        llava: keep=0.25

    Args:
        spread: share of every cut for tokens spread over the picture, in (0, 1).
    """
    check_share("spread", spread, above=0, below=1)
    scorer = Glanced(rule=MeanAttention())
    attended = Pick(name="attended", scorer=scorer, selector=TopK(), share=1 - spread)
    even = Pick(name="spread", scorer=scorer, selector=SpatialSpread())
    inside = tuple(LayerStage(at=at, keep=keep, picks=(attended, even)) for at, keep in _STAGES)
    return Pipeline(name="atp", picks=(), inside=inside)
