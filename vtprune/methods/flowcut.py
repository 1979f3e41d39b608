"""FlowCut: patches drop out of the encoder as information flows past them."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.encoder import Flow, Survivors
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK


def flowcut(*, momentum: float = 0.5, pace: float = 0.2) -> Pipeline:
    """Drop patches at every second block by CLS attention, likeness of values to CLS and size of values, averaged.

    Title: FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models
    Source: arXiv 2505.19536
    Deviations: how many a block drops follows from shapes (`pace`), not from the entropy of attention, so that batches
        need not agree (the authors: the largest number over the batch). All is cut in the encoder (the authors cut
        pictures of several crops in the second layer of the language model as well).

    Published:
        llava: keep=192 | 128 | 64

    Args:
        momentum: weight of the past in the average over blocks, in [0, 1].
        pace: what the entropy term is in the authors' schedule, in [0, 1].
    """
    pick = Pick(name="flow", scorer=Read(rule=Survivors()), selector=TopK())
    return Pipeline(name="flowcut", picks=(pick,), encoder=Flow(momentum=momentum, pace=pace))
