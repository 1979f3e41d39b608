"""FastV: after two layers, only what the last token looks at goes on."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.glances import MeanAttention
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK


def fastv(*, layer: float | int = 0.0625) -> Pipeline:
    """Cut once, early in the language model, to the tokens that the last token of the prompt attends to.

    Title: An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large VLMs
    Source: arXiv 2403.06764
    Deviations: the number kept follows from the average over layers (the authors give the share kept behind the cut).
        Each picture of a batch has its own tokens (the authors: those of the first prompt).

    Published:
        llava: keep=0.53125, layer=0.0625

    Args:
        layer: in front of which to cut, its number or its share of the depth; the authors' 2 of 32.
    """
    scorer = Glanced(rule=MeanAttention(), rows="last")
    stage = LayerStage(at=layer, keep=0.5, picks=(Pick(name="attended", scorer=scorer, selector=TopK()),))
    return Pipeline(name="fastv", picks=(), inside=(stage,))
