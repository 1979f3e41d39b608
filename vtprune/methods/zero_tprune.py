"""Zero-TPrune: page rank on the attention graph of the encoder."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.encoder import RankAndPrune, Survivors
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK


def zero_tprune(*, steps: int = 5) -> Pipeline:
    """At every second block, drop patches of the less important half that resemble others, then the least important.

    Title: Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers
    Source: arXiv 2305.17328
    Deviations: one number of steps for all blocks (the authors: 30 to 50 early, 1 at the end). All heads count (the
        authors leave out those of extreme variance, by bounds whose scale is not given). Importance is that of the
        whole graph, also after patches dropped for likeness are gone, and the ranking that splits patches for likeness
        is the same (the authors': one round before). All tokens start with one weight (the authors' CLS token with
        more). Half of a block's budget goes for likeness.

    Args:
        steps: rounds of page rank.
    """
    pick = Pick(name="ranked", scorer=Read(rule=Survivors()), selector=TopK())
    return Pipeline(name="zero_tprune", picks=(pick,), encoder=RankAndPrune(steps=steps))
