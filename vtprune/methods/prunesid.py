"""PruneSID: groups by principal components, and the best of each that do not repeat each other."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.scorers import Importance
from vtprune.stages.structured import GroupSuppress


def prunesid() -> Pipeline:
    """Group tokens by the principal component they weigh most in, then suppress those that resemble better ones.

    Title: PruneSID: Synergistic Importance-Diversity Approach to Efficient Vision Token Compression
    Source: arXiv 2603.09480
    Deviations: components are exact (the authors' are randomised, so that runs differ). What rounding leaves of the
        budgets goes by largest remainder; a bound that is too low gives way at once (the authors': one by one). The
        order is that of the picture (the authors: group after group). The CLS token does not go to the language model.
        The threshold grows with the share kept, not with the number. The budget is per picture over all its crops (the
        authors: per crop; `per="part"` gives that). Encoders without a CLS token: received attention (the
        authors: the weight in the component).

    Published:
        llava: keep=64
        llava_next: keep=32, per="part"
    """
    selector = GroupSuppress(vectors="encoder_features")
    return Pipeline(name="prunesid", picks=(Pick(name="groups", scorer=Importance(), selector=selector),))
