"""VTC-CLS: what the CLS token looks at, over the later layers of the encoder."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.rules import ClsOrReceived
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK


def vtc_cls(*, since: float = 0.667) -> Pipeline:
    """Rank tokens by CLS attention summed over the layers from two thirds of the depth up to the one of the features.

    Title: [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs
    Source: arXiv 2412.05819
    Deviations: the first layer is a share of the depth (the authors: layer 16 of 24, set by hand for each task).
        Crops and batches work (the authors: one picture of 576 tokens). Encoders without a CLS token are ranked by
        received attention, over layers that see whole pictures.

    Published:
        llava: keep=256 | 128 | 64

    Args:
        since: share of the depth of the encoder where the layers begin, in [0, 1].
    """
    check_share("since", since)
    scorer = Read(rule=ClsOrReceived(), since=since)
    return Pipeline(name="vtc_cls", picks=(Pick(name="cls", scorer=scorer, selector=TopK()),))
