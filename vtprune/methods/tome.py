"""ToMe: similar patches merge, block by block."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.encoder import MatchAndMerge, Survivors
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK


def tome() -> Pipeline:
    """Merge the best bipartite matches of keys at every block of the vision encoder, as means weighted by size.

    Title: Token Merging: Your ViT But Faster
    Source: arXiv 2210.09461
    Deviations: cut at the output of a block (the authors: between attention and MLP), without proportional attention.
        The CLS token takes no part in the partition. Patches keep their order (the authors: matched ones first).
    """
    pick = Pick(name="merged", scorer=Read(rule=Survivors()), selector=TopK())
    return Pipeline(name="tome", picks=(pick,), encoder=MatchAndMerge())
