"""LOOK-M: every head of a KV cache keeps what was looked at most, and folds the rest into it."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import CacheStage, Pipeline
from vtprune.stages.glances import MeanAttention
from vtprune.stages.mergers import IntoNearest
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK


def look_m(*, halfway: bool = True, merge: bool = True) -> Pipeline:
    """Let all tokens pass; behind each layer, every head stores the tokens that got most attention, others merged in.

    Title: LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference
    Source: arXiv 2406.18139
    Deviations: text always stays (the authors: before any picture, as far as the budget goes), so that the budget
        counts tokens of pictures alone, and the window of latest tokens is not counted. What leaves merges into what
        stays of its own picture (the authors: of the whole prompt). Heads that share keys choose together. Keys are
        merged as they lie in the cache, turned by different positions, as in the authors' code. Time to first token
        grows: the attention of all rows is read once more.

    Published:
        llava: keep=0.2

    Args:
        halfway: what stays moves half the way to the mean only (the authors' pivot merging); False: to the mean.
        merge: whether what leaves lives on at all.
    """
    pick = Pick(name="attended", scorer=Glanced(rule=MeanAttention(), rows="all"), selector=TopK())
    merger = IntoNearest(halfway=halfway) if merge else None
    return Pipeline(name="look_m", picks=(), cache=CacheStage(picks=(pick,), merger=merger, heads=True))
