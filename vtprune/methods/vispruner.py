"""VisPruner: important tokens, and diverse ones of what is left."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.scorers import Importance
from vtprune.stages.selectors import TopK
from vtprune.stages.structured import ResidualDrop


def vispruner(*, important: float = 0.5) -> Pipeline:
    """Keep what the CLS token attends to, then thin out the rest until what remains is not alike.

    Title: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs
    Source: arXiv 2412.01818
    Deviations: residual lists of odd length work (the authors' code raises). The important share rounds half up (the
        authors: down). The budget is per picture over all its crops (the authors: per crop; `per="part"` gives that).
        Encoders without a CLS token: received attention of the layer the features come from (the authors: the last).

    Published:
        llava: keep=192 | 128 | 64 | 32
        llava_next: keep=128 | 64 | 32, per="part"

    Args:
        important: share of the budget for important tokens, in (0, 1].
    """
    check_share("important", important, above=0)
    first = Pick(name="important", scorer=Importance(), selector=TopK(), share=important)
    rest = Pick(name="diverse", scorer=Importance(), selector=ResidualDrop(vectors="encoder_features"))
    return Pipeline(name="vispruner", picks=(first, rest))
