"""DART: tokens unlike a few pivots."""

from __future__ import annotations

from vtprune._checks import check_whole
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.scorers import Norm
from vtprune.stages.structured import Pivots


def dart(*, pivots: int = 8) -> Pipeline:
    """Keep the tokens with the largest keys as pivots, and for each pivot those least similar to it.

    Title: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More
    Source: arXiv 2502.11494
    Deviations: before the language model (the authors: after its second layer), so that pivots are visual only and
        their keys those of the vision encoder, averaged over heads.

    Args:
        pivots: how many.
    """
    check_whole("pivots", pivots, least=1)
    pick = Pick(name="pivots", scorer=Norm(p=1, vectors="keys"), selector=Pivots(count=pivots))
    return Pipeline(name="dart", picks=(pick,))
