"""IDPruner: importance against redundancy, one token after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vtprune.errors import InvalidOption
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.protocols import Scorer
from vtprune.stages.debiasers import MinMax
from vtprune.stages.networks import TrainedScorer
from vtprune.stages.scorers import Given, Importance, Norm, Read
from vtprune.stages.selectors import MMR
from vtprune.stages.sensitivity import ProbedSensitivity

_IMPORTANCE: dict[str, Scorer] = {
    "importance": Importance(),
    "norm": Norm(),
    "sensitivity": Read(rule=ProbedSensitivity()),
    "given": Given(name="scores"),
}


def idpruner(
    *,
    lam: float = 0.5,
    importance: Literal["importance", "norm", "sensitivity", "given"] = "importance",
    scorer: str | Path | None = None,
) -> Pipeline:
    """Maximal marginal relevance between importance and cosine similarity of the projected tokens.

    Title: IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs
    Source: arXiv 2602.13315
    Deviations: by default importance is attention of the encoder, so that nothing need be trained (the authors: a
        network for each model, shipped with a Python file that they run; here only weights are read, from safetensors).
        Importance is scaled for each picture (the authors: over all pictures of a prompt). Tokens are taken one by one
        (the authors can take several in a step).

    Published:
        qwen2_5_vl: keep=0.25 | 0.1

    Args:
        lam: weight of importance against similarity, in [0, 1].
        importance: attention of the encoder, norm of the tokens, sensitivity of the projector, or "given" for scores
            handed in with `using(scores=...)`.
        scorer: a safetensors file with the layers of a trained scorer, see `TrainedScorer`; it takes the place of
            `importance`.
    """
    if importance not in _IMPORTANCE:
        raise InvalidOption(f"importance={importance!r}: expected one of {', '.join(_IMPORTANCE)}")
    chosen = _IMPORTANCE[importance] if scorer is None else TrainedScorer(path=str(scorer))
    pick = Pick(name="mmr", scorer=chosen, debiasers=(MinMax(),), selector=MMR(lam=lam))
    return Pipeline(name="idpruner", picks=(pick,))
