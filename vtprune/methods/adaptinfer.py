"""AdaptInfer: words weighted by the attention among them rate the picture."""

from __future__ import annotations

from vtprune.errors import InvalidOption
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.glances import SymmetricText
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK

_SHARES = (290 / 576, 72 / 576, 18 / 576)


def adaptinfer(*, points: tuple[float, float, float] = (0.0625, 0.34375, 0.65625)) -> Pipeline:
    """Cut three times, where attention shifts, by attention of the text weighted with attention inside the text.

    Title: AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text Guidance
    Source: arXiv 2508.06084
    Deviations: tokens keep their position ids (the authors number the rest anew). Of long texts the last 256 tokens
        count. The published counts are those of the budget 128; other averages raise their shares to one power.
        Budgets are averages over layers (the authors book a cut to the layer before it). Batches work.

    Published:
        llava: keep=0.2540
        llava_next: keep=0.2540

    Args:
        points: shares of the depth where attention shifts, ascending; the authors' 2, 11 and 21 of 32 layers. A
            calibration brings those of a model.
    """
    if len(points) != len(_SHARES):
        raise InvalidOption(f"points={points!r}: expected three shares of the depth")
    pick = Pick(name="weighted", scorer=Glanced(rule=SymmetricText()), selector=TopK())
    inside = tuple(LayerStage(at=at, keep=keep, picks=(pick,)) for at, keep in zip(points, _SHARES, strict=True))
    return Pipeline(name="adaptinfer", picks=(), inside=inside)
