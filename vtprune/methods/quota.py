"""QuoTA: frames get tokens by what they have to do with the question."""

from __future__ import annotations

from typing import Literal

from vtprune.errors import InvalidOption
from vtprune.methods.vtprune import vtprune
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.stages.budgets import Proportional
from vtprune.stages.cells import CellCentres
from vtprune.stages.mergers import IntoCell
from vtprune.stages.scorers import Constant, Given


def quota(
    *, power: float = 2.0, floor: int = 0, cap: float = 1.0, within: Literal["pool", "prune"] = "pool"
) -> Pipeline:
    """Share the tokens of a clip among its frames by scores of frames, and pool or prune each to its count.

    Title: QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension
    Source: arXiv 2503.08689
    Deviations: counts sum up to the budget exactly, by largest remainder (the authors round down twice), and no frame
        gets more tokens than it has (their first version scales frames up). A frame is pooled to as many cells as it
        has tokens left (theirs: to the largest nearly square grid that fits, by interpolation). Scores are handed in
        for each call, `using(frames=...)`; `vtprune.video.score_frames` makes them.

    Args:
        power: of the scores, above 0.
        floor: tokens every frame gets at least, as far as the budget goes.
        cap: largest share of its tokens that a frame keeps while others have room, in (0, 1].
        within: `"pool"` averages cells of a frame, `"prune"` picks tokens as the house default does.
    """
    if within not in ("pool", "prune"):
        raise InvalidOption(f"within={within!r}: expected 'pool' or 'prune'")
    frames = Proportional(scorer=Given(name="frames"), power=power, floor=floor, cap=cap)
    if within == "prune":
        return Pipeline(name="quota", picks=vtprune().picks, frames=frames)
    pick = Pick(name="cells", scorer=Constant(), selector=CellCentres())
    return Pipeline(name="quota", picks=(pick,), frames=frames, merger=IntoCell())
