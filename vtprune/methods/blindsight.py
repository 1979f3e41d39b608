"""BlindSight: pictures masked from each other in heads that do not look at others, and every token stays."""

from __future__ import annotations

from vtprune.pipeline import Pipeline
from vtprune.stages.heads import HeadMasks


def blindsight(*, classes: tuple[tuple[str, ...], ...] | None = None) -> Pipeline:
    """Keep everything, and hide other pictures from tokens of pictures, in heads that do not look at them.

    Title: BlindSight: Harnessing Sparsity for Efficient Vision-Language Models
    Source: arXiv 2507.09071
    Deviations: masks are given to the attention of PyTorch, which saves no time (the authors have a kernel). Sinks are
        the first token and those around pictures; text is seen in all classes. Pictures of earlier turns are not
        hidden. The thresholds for classes are ours, those of the authors are not public. `wrap` refuses any other
        `keep` than 1.0 with it.

    Args:
        classes: for every layer, of every head "sink", "intra", "intra+sink" or "dense";
            `vtprune.eval.head_classes.measure` finds them.
    """
    return Pipeline(name="blindsight", picks=(), attention=HeadMasks(classes=classes))
