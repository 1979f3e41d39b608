"""PyramidDrop: at three depths, what the last token does not look at leaves."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.glances import MeanAttention
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK

_STAGES = ((0.25, 0.5), (0.5, 0.25), (0.75, 0.125))


def pyramiddrop() -> Pipeline:
    """Halve the tokens after each quarter of the decoder layers, by attention of the last token in the layer to come.

    Title: PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction
    Source: arXiv 2410.17247
    Deviations: tokens keep their position ids (the authors number the rest anew at every stage). Other averages than
        that of the authors raise their shares to one power. Every picture of a prompt is pruned (the authors: the
        first).

    Published:
        llava: keep=0.46875
        llava_next: keep=0.46875
    """
    scorer = Glanced(rule=MeanAttention(), rows="last", at="behind")
    pick = Pick(name="attended", scorer=scorer, selector=TopK())
    return Pipeline(
        name="pyramiddrop", picks=(), inside=tuple(LayerStage(at=at, keep=keep, picks=(pick,)) for at, keep in _STAGES)
    )
