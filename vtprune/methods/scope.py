"""SCOPE: salient tokens that stand for many others."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.diverse import Facility
from vtprune.stages.scorers import Importance


def scope(*, alpha: float = 1.0) -> Pipeline:
    """Greedy facility location on the projected tokens; each gain in coverage counts by the token's importance.

    Title: SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs
    Source: arXiv 2510.24214
    Deviations: written from the formulas; gains are sums over all tokens of a picture, crops included. Encoders without
        a CLS token: received attention.

    Args:
        alpha: exponent of importance; 0 selects by coverage alone.
    """
    return Pipeline(name="scope", picks=(Pick(name="cover", scorer=Importance(), selector=Facility(alpha=alpha)),))
