"""ToDRE: diverse tokens first, and none any more once the text has seen them."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.methods.todre_select import todre_select
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.counters import AllOrNone
from vtprune.stages.glances import MeanAttention
from vtprune.stages.scorers import Constant, Glanced
from vtprune.stages.selectors import TopK


def todre(*, below: float = 0.1, check: float = 0.875) -> Pipeline:
    """Choose diverse tokens before the language model; let a picture leave late where the text hardly looks at it.

    Title: ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance
    Source: arXiv 2505.18757
    Deviations: only the attention that text pays to the picture is checked (the authors: also that of the picture to
        text, which with the picture in front of the question is the system prompt alone). Every picture leaves by
        itself (the authors: all together). The budget is the most: it holds where nothing leaves.

    Published:
        llava_next: keep=720 | 288
        qwen2_5_vl: keep=0.25 | 0.1
        internvl: keep=0.25 | 0.1

    Args:
        below: share of attention under which a picture leaves.
        check: share of the depth where that is looked at, in (0, 1).
    """
    check_share("below", below)
    check_share("check", check, above=0, below=1)
    exit_rule = AllOrNone(scorer=Glanced(rule=MeanAttention()), below=below)
    pick = Pick(name="exit", scorer=Constant(), selector=TopK())
    stage = LayerStage(at=check, keep=0.5, picks=(pick,), counter=exit_rule)
    return Pipeline(name="todre", picks=todre_select().picks, before=0.5, inside=(stage,))
