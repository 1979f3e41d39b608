"""SparseVLM: words of the question rate the picture, and the best of what they drop lives on in a few tokens."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.glances import MeanAttention
from vtprune.stages.peaks import DensityPeaks, IntoPeaks
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK

_STAGES = ((3 / 32, 303, 9), (7 / 32, 110, 7), (16 / 32, 36, 3))
"""Where cuts are, and how many of 576 tokens are rated and recycled there."""


def sparsevlm(*, recycled: float | None = None) -> Pipeline:
    """Cut three times by attention of the words near to the picture; recycle the best of the rest as means of clusters.

    Title: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference
    Source: arXiv 2410.04417
    Deviations: counts are those of the authors' code (version 1.5) for the budget 128 and 576 tokens, recycled ones
        counted in, where the paper lets the rank of the attention decide; other averages raise their shares to one
        power and recycle the same part of every count (the authors: one token for every ten of the best 30 % of what
        leaves). Recycled tokens stay at the place of the centre of their cluster (the authors append them behind the
        others), and all tokens keep their position ids (the authors number the rest anew). Densities get no noise: ties
        go to the first token. Of long texts the last 256 tokens count. Budgets are averages over layers (the authors
        book a cut to the layer before it). Batches work.

    Published:
        llava: keep=0.2524

    Args:
        recycled: share of every count for recycled tokens, in [0, 1); None: that of the authors at each cut.
    """
    if recycled is not None:
        check_share("recycled", recycled, below=1)
    scorer = Glanced(rule=MeanAttention(), rows="raters")
    inside = []
    for at, rated, clusters in _STAGES:
        count = rated + clusters
        share = rated / count if recycled is None else 1 - recycled
        best = Pick(name="rated", scorer=scorer, selector=TopK(), share=share)
        centres = Pick(name="recycled", scorer=scorer, selector=DensityPeaks())
        inside.append(LayerStage(at=at, keep=count / 576, picks=(best, centres), merger=IntoPeaks(pick=1)))
    return Pipeline(name="sparsevlm", picks=(), inside=tuple(inside))
