"""CDPruner: the likeliest set of a determinantal point process, conditioned on the question."""

from __future__ import annotations

from typing import Literal

from vtprune.errors import InvalidOption
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.protocols import Scorer
from vtprune.stages.debiasers import MinMax
from vtprune.stages.diverse import DPP
from vtprune.stages.scorers import Constant, Given, Importance


def cdpruner(
    *, evidence: Literal["relevance", "importance", "none"] = "relevance", sign: Literal[-1, 1] = -1
) -> Pipeline:
    """Greedy MAP of a k-DPP over similarity of the projected tokens and relevance to the question.

    Title: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs
    Source: arXiv 2506.10967
    Deviations: relevance is handed in, `using(relevance=...)` with the cosine of patches and question in the space of
        CLIP, whose sign is turned as the authors do; it is scaled for each picture (the authors: over the batch). One
        set a picture over all its crops; `per="part"` gives the authors' one for each crop. Where the
        budget exceeds the rank of the features, the most relevant tokens follow (the authors' code takes roots of
        negative numbers).

    Published:
        llava: keep=192 | 128 | 64 | 32
        llava_next: keep=128 | 64 | 32, per="part"
        qwen2_5_vl: keep=512 | 256 | 128

    Args:
        evidence: "relevance" to the question; without text "importance" by the encoder; "none" for diversity alone.
        sign: -1 where relevant patches lie far from the question, as in CLIP; 1 where they lie near, as in a text tower
            that was aligned patch by patch.
    """
    known: dict[str, Scorer] = {
        "relevance": Given(name="relevance", sign=sign),
        "importance": Importance(),
        "none": Constant(),
    }
    if evidence not in known:
        raise InvalidOption(f"evidence={evidence!r}: expected one of {', '.join(known)}")
    if sign not in (-1, 1):
        raise InvalidOption(f"sign={sign!r}: expected -1 or 1")
    pick = Pick(name="dpp", scorer=known[evidence], debiasers=(MinMax(),), selector=DPP())
    return Pipeline(name="cdpruner", picks=(pick,))
