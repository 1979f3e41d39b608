"""ZipVL: every layer attends to as many tokens as hold the mass of its attention, and stores no others."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.picking import Pick
from vtprune.pipeline import CacheStage, Pipeline
from vtprune.stages.counters import Negligible
from vtprune.stages.glances import AttentionWhereSeen, MeanAttention
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK


def zipvl(*, mass: float = 0.975) -> Pipeline:
    """Let all tokens pass; each layer attends to and stores those that a sample of rows looks at, as many as it takes.

    Title: ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification
    Source: arXiv 2410.08584
    Deviations: text always takes part (the authors rank it, too), and every picture loses as many tokens as hold
        1 - `mass` of all attention where the least attended ones go; which ones go, another score decides, as with the
        authors. What is left out is not stored (as in their second version; the first one stores it in fewer
        bits). The rows are the last 64 and 64 evenly apart (the authors: at random). The budget is the most that a
        layer stores. Queries and keys are computed once more to choose by. Nothing is chosen again while decoding.

    Published:
        llava: keep=0.99, mass=0.975 | 0.96
        llava_next: keep=0.99, mass=0.975 | 0.96

    Args:
        mass: share of the attention of a layer that stays, in (0, 1).
    """
    check_share("mass", mass, above=0, below=1)
    scorer = Glanced(rule=AttentionWhereSeen(), rows="sampled")
    counter = Negligible(scorer=Glanced(rule=MeanAttention(), rows="sampled"), share=1 - mass)
    pick = Pick(name="attended", scorer=scorer, selector=TopK())
    return Pipeline(name="zipvl", picks=(), cache=CacheStage(picks=(pick,), counter=counter, sparse=True))
