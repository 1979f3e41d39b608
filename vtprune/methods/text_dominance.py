"""Text dominance: the compression of the paper that measured it."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.scorers import Importance
from vtprune.stages.selectors import TopK


def text_dominance() -> Pipeline:
    """Keep the tokens whose CLS attention reaches the threshold that leaves as many as the budget says.

    Title: When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models
    Source: arXiv 2508.10552
    Deviations: ties at the threshold go to the tokens that come first, so that the count is exact. The choice is that
        of fastervlm; what is new in the paper are measures of attention, not a rule of selection.

    Published:
        llava: keep=0.25 | 0.1 | 0.05
    """
    return Pipeline(name="text_dominance", picks=(Pick(name="threshold", scorer=Importance(), selector=TopK()),))
