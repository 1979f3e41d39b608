"""TransPrune: tokens that layers change most, and that the question looks at."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.glances import MeanAttention
from vtprune.stages.scorers import Changed, Glanced, Mixed
from vtprune.stages.selectors import TopK
from vtprune.stages.states import TokenTransition

_SINCE = 6 / 32
_STAGES = ((7 / 32, 0.875), (9 / 32, 0.625), (12 / 32, 0.125))


def transprune(*, alpha: float = 0.5) -> Pipeline:
    """Cut three times by how layers lengthen and turn each token, summed up on the way, and by attention of the text.

    Title: TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model
    Source: arXiv 2507.20630
    Deviations: tokens keep their position ids (the authors number the rest anew). The softmax over directions is that
        of the pictures of one prompt (the authors: of all tokens of a batch, text included). Of long texts the last 256
        tokens look. The published shares are those of "High"; other averages raise them to one power. Budgets and
        scores are those of each picture. Batches work.

    Published:
        llava: keep=0.4102
        llava_next: keep=0.4102

    Args:
        alpha: weight of the changes, the rest is that of attention.
    """
    check_share("alpha", alpha)
    changes = Changed(rule=TokenTransition(), since=_SINCE)
    asked = Glanced(rule=MeanAttention(), at="behind")
    scorer = Mixed(first=changes, second=asked, weight=alpha, scale="sum")
    pick = Pick(name="changed", scorer=scorer, selector=TopK())
    inside = tuple(LayerStage(at=at, keep=keep, picks=(pick,)) for at, keep in _STAGES)
    return Pipeline(name="transprune", picks=(), inside=inside)
