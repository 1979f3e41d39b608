"""DivPrune: the most diverse tokens."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.diverse import Dispersion
from vtprune.stages.scorers import Constant


def divprune() -> Pipeline:
    """Maximise the smallest cosine distance between kept tokens, greedily, on the projected features.

    Title: DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models
    Source: arXiv 2503.02175
    Deviations: newline tokens are kept and not counted (the authors: candidates). Distances are fp32. A chosen token
        cannot be chosen again, also where duplicates leave no distance (the authors' code can).

    Published:
        llava: keep=0.098
        llava_next: keep=0.098
        llava_next_video: keep=0.1
    """
    selector = Dispersion(reduce="min", first="isolated")
    return Pipeline(name="divprune", picks=(Pick(name="k-center", scorer=Constant(), selector=selector),))
