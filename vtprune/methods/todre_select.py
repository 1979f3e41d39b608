"""ToDRE, first stage: diverse tokens, starting from the one the encoder looks at most."""

from __future__ import annotations

from typing import Literal

from vtprune.errors import InvalidOption
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.diverse import Dispersion
from vtprune.stages.scorers import Importance


def todre_select(*, spread: Literal["sum", "min"] = "sum") -> Pipeline:
    """From the token with the highest CLS attention on, add the one least similar to all that are chosen.

    Title: ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance
    Source: arXiv 2505.18757
    Deviations: written from the paper, there is no code of the authors. The pivot is that of the whole picture, crops
        included (the paper: of the thumbnail), by attention of the layer the features come from (the paper: the last).
        Encoders without a CLS token: received attention (the paper: any token). The stage inside the language model is
        not part of it.

    Published:
        llava_next: keep=720 | 288
        qwen2_5_vl: keep=0.25 | 0.1
        internvl: keep=0.25 | 0.1

    Args:
        spread: "sum" of the distances to all chosen tokens (the second version of the paper), or "min", the distance
            to the nearest (greedy k-center, the first version).
    """
    if spread not in ("sum", "min"):
        raise InvalidOption(f"spread={spread!r}: expected 'sum' or 'min'")
    selector = Dispersion(reduce=spread, first="score")
    return Pipeline(name="todre_select", picks=(Pick(name="diverse", scorer=Importance(), selector=selector),))
