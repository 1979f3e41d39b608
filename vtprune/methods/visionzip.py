"""VisionZip: dominant tokens, and a few contextual ones that take in the rest."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.mergers import IntoNearest
from vtprune.stages.scorers import Constant, Importance
from vtprune.stages.selectors import Stride, TopK


def visionzip(*, contextual: float = 0.15625) -> Pipeline:
    """Keep what the CLS token attends to; merge the rest, by keys, into evenly spaced tokens of what is left.

    Title: VisionZip: Longer is Better but Not Necessary in Vision Language Models
    Source: arXiv 2412.04467
    Deviations: tokens are merged after the projector, as a mean with their target in it (the authors: before it, as
        the target plus the mean of the others, which doubles the norm). The order is that of the picture and each
        contextual token stays at its target (the authors: behind the dominant ones). The CLS token does not go to the
        language model (the authors count it as a dominant token). Targets are spaced over all that is left (the
        authors round the step down, so that the end has none). The budget is per picture over all its crops (the
        authors: per crop; `per="part"` gives that). Encoders without a CLS token: received attention.

    Published:
        llava: keep=192 | 128 | 64
        llava_next: keep=128 | 64 | 32, per="part"

    Args:
        contextual: share of the budget that takes in the rest, in [0, 1); the authors' 10 of 64.
    """
    check_share("contextual", contextual, below=1)
    dominant = Pick(name="dominant", scorer=Importance(), selector=TopK(), share=1 - contextual)
    targets = Pick(name="contextual", scorer=Constant(), selector=Stride())
    return Pipeline(name="visionzip", picks=(dominant, targets), merger=IntoNearest(vectors="keys", pick=1))
