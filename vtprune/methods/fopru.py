"""FoPru: attention among patches, token by token or row by row."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.rules import MoreVaried
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK
from vtprune.stages.structured import WholeRows


def fopru_rank() -> Pipeline:
    """Rank tokens by the attention they get from patches or pay to them, whichever varies more; keep the best.

    Title: FoPru: Focal Pruning for Efficient Large Vision-Language Models
    Source: arXiv 2411.14164
    Deviations: written from the paper, there is no code of the authors. The budget rounds half up (the paper: down).
        Which of the two varies more is asked crop by crop. Without a CLS token it is the attention tokens get: all pay
        the same.
    """
    pick = Pick(name="rank", scorer=Read(rule=MoreVaried()), selector=TopK())
    return Pipeline(name="fopru_rank", picks=(pick,))


def fopru_row() -> Pipeline:
    """The same significance, summed over the rows of the grid: keep the best whole rows.

    Title: FoPru: Focal Pruning for Efficient Large Vision-Language Models
    Source: arXiv 2411.14164
    Deviations: written from the paper, there is no code of the authors. The count is exact: where it is no multiple of
        the width, the next best row gives its best tokens (the paper: whole rows only, so fewer tokens). Rows of
        several crops compete by their mean. The rest as for fopru_rank.
    """
    pick = Pick(name="rows", scorer=Read(rule=MoreVaried()), selector=WholeRows())
    return Pipeline(name="fopru_row", picks=(pick,))
