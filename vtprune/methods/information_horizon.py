"""Information horizon: diversity first, chance deep inside, nothing behind the horizon."""

from __future__ import annotations

from vtprune._checks import check_share, check_whole
from vtprune.errors import InvalidOption
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.diverse import Dispersion
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import Random


def information_horizon(*, deep: float = 0.5, horizon: float | None = None, seed: int = 0) -> Pipeline:
    """Choose diverse tokens before the language model, random ones of them deep inside, and let all leave at a horizon.

    Title: All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs
    Source: arXiv 2512.07580
    Deviations: the shares of the stages are ours, a half before the language model and a half of that deep inside (the
        authors' are not public). Without a calibrated horizon tokens stay to the end. Random tokens are drawn from the
        number of the picture in the conversation.

    Args:
        deep: share of the depth where chance decides, in (0, 1).
        horizon: share of the depth where all tokens leave, above `deep`; None: nowhere.
        seed: of the random tokens.
    """
    check_share("deep", deep, above=0, below=1)
    check_whole("seed", seed)
    chance = Pick(name="random", scorer=Constant(), selector=Random(seed=seed))
    inside = [LayerStage(at=deep, keep=0.25, picks=(chance,))]
    if horizon is not None:
        if not deep < horizon < 1:
            raise InvalidOption(f"horizon={horizon!r}: expected a share of the depth above deep={deep!r}, below 1")
        inside.append(LayerStage(at=horizon, keep=0.0, picks=(chance,)))
    diverse = Pick(name="diverse", scorer=Constant(), selector=Dispersion(reduce="min", first="isolated"))
    return Pipeline(name="information_horizon", picks=(diverse,), before=0.5, inside=tuple(inside))
