"""FasterVLM: the tokens the CLS token of the vision encoder looks at."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.scorers import Importance
from vtprune.stages.selectors import TopK


def fastervlm() -> Pipeline:
    """Rank tokens by the head-averaged CLS attention of the layer the features come from; keep the best.

    Title: [CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster
    Source: arXiv 2412.01818
    Deviations: the budget is per picture over all its crops (the authors: per crop; `per="part"` gives that). Newline
        tokens are kept and not counted (the authors drop them). Encoders without a CLS token are ranked by received
        attention (the authors do not support them). Only the CLS row is computed, never the whole map.

    Published:
        llava: keep=144 | 58 | 29
        llava_next: keep=144 | 58 | 29, per="part"
        video_llava: keep=192 | 128 | 64 | 26 | 13, per="part"
    """
    return Pipeline(name="fastervlm", picks=(Pick(name="cls", scorer=Importance(), selector=TopK()),))
