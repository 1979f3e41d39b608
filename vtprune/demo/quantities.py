"""What scores are of, and why there are none, in words of the field."""

from __future__ import annotations

from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.protocols import Scorer
from vtprune.stages.diverse import Dispersion
from vtprune.stages.encoder import Survivors
from vtprune.stages.rules import ClsOrReceived, MoreVaried, SinkRows
from vtprune.stages.scorers import Constant, Given, Importance, Norm, Read
from vtprune.stages.selectors import Random, Stride
from vtprune.stages.sensitivity import JacobianSensitivity, ProbedSensitivity
from vtprune.stages.temporal import Novelty

_OF_RULES: tuple[tuple[type, str], ...] = (
    (MoreVaried, "attention among patches in the encoder"),
    (SinkRows, "attention of sink patches in the encoder"),
    (Survivors, "score of the patches that stay inside the encoder"),
    (ProbedSensitivity, "sensitivity of the projector to the patch"),
    (JacobianSensitivity, "sensitivity of the projector to the patch"),
)
_IMPORTANCE = {
    "cls_attention": "importance by the encoder: attention of its CLS token",
    "received_attention": "importance by the encoder: attention that a patch receives",
}
_ORDERS = {1: "L1", 2: "L2"}


def quantity(scorer: Scorer, importance: str | None) -> str:
    """What a scorer measures; `importance` is that of the report."""
    if isinstance(scorer, Importance) or (isinstance(scorer, Read) and isinstance(scorer.rule, ClsOrReceived)):
        source = next((told for name, told in _IMPORTANCE.items() if name in (importance or "")), "")
        told = source or "importance by the encoder"
        deep = isinstance(scorer, Read) and (scorer.at, scorer.since) != (None, None)
        return f"{told}, of other layers than the last" if deep else told
    if isinstance(scorer, Read):
        return next((told for kind, told in _OF_RULES if isinstance(scorer.rule, kind)), scorer.reading.name)
    if isinstance(scorer, Given):
        return f"{scorer.name} to the question" if scorer.name == "relevance" else scorer.name
    if isinstance(scorer, Norm):
        return f"{_ORDERS.get(int(scorer.p), f'L{scorer.p:g}')} norm of the {scorer.vectors} of the token"
    if isinstance(scorer, Novelty):
        return "novelty against the frame before"
    return "score of the token"


def no_scores(method: Pipeline) -> str:
    """Why a method without picks before the language model has no scores to draw; empty of those that have picks."""
    if method.picks:
        return ""
    if not method.drops:
        return f"{method.name} keeps every token and scores none"
    if method.cache is not None:
        return f"{method.name} chooses anew in every layer what its cache stores; maps are of scores before the layers"
    return f"{method.name} scores tokens between decoder layers; maps are of scores before these layers"


def alike(method: str, pick: Pick) -> str:
    """Why all scores of a pick are the same."""
    if not isinstance(pick.scorer, Constant):
        return f"{method} finds all tokens worth the same here"
    if isinstance(pick.selector, Dispersion):
        return f"{method} goes by distances between tokens and gives none a score"
    if isinstance(pick.selector, Random):
        return f"{method} draws tokens by chance and gives none a score"
    if isinstance(pick.selector, Stride):
        return f"{method} takes tokens at even steps and gives none a score"
    return f"{method} goes by where tokens lie and gives none a score"


def not_debiased(method: Pipeline, debiaser: str) -> str:
    """Why a debiaser changes no score of a method."""
    if method.encoder is not None:
        return f"{method.name} chooses inside the encoder, and {debiaser} is taken off behind it"
    if method.inside:
        return f"{method.name} goes by no attention before the language model; between layers {debiaser} is not drawn"
    return f"{method.name} goes by no attention, so that there is no {debiaser} to take off"
