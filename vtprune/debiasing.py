"""A debiaser put in front of every choice by attention that a method makes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from vtprune.errors import InvalidOption
from vtprune.glances import Glance, Need, SinkReading
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.protocols import Debiaser
from vtprune.readings import Reading
from vtprune.stages.debiasers import WithoutPadding, WithoutSinks, WithoutTrend
from vtprune.stages.glances import Undecayed
from vtprune.stages.recency import WithoutRecency
from vtprune.stages.rules import NAMED_RULES, Keys
from vtprune.stages.scorers import Glanced
from vtprune.stages.sinks import WithoutMassive

DEBIASERS: dict[str, Debiaser] = {
    "recency": WithoutRecency(),
    "cubic": WithoutRecency(form="cubic"),
    "sinks": WithoutSinks(),
    "padding": WithoutPadding(),
    "trend": WithoutTrend(),
    "massive": WithoutMassive(),
}
"""What `wrap(..., debias=...)` takes by name; True is the first."""
ROPE = "rope"
"""Another name: it divides the attention of decoder layers itself, before anything is made of it."""
_NAMES = ", ".join((*DEBIASERS, ROPE))
_OF_GRIDS = (WithoutPadding, WithoutTrend)


def debiased(pipeline: Pipeline, debias: bool | str | Debiaser | None) -> Pipeline:
    """The pipeline with a debiaser in front of every pick that scores by attention, of the encoder or of the layers.

    With `"rope"` picks between layers score by attention that is divided by the decay of the rotary embedding.

    Raises:
        InvalidOption: for an unknown name, for a method that looks at no attention or at that inside the encoder
            only, for a debiaser of whole grids in a method that cuts between layers, where grids have holes, and for
            one that reads hidden states in a method that does not cut there.
    """
    if debias is None or debias is False:
        return pipeline
    name = "recency" if debias is True else debias
    if name == ROPE:
        return _undecayed(pipeline)
    if isinstance(name, str) and name not in DEBIASERS:
        raise InvalidOption(f"debias={debias!r}: expected True, a debiaser, or one of {_NAMES}")
    stage = DEBIASERS[name] if isinstance(name, str) else name
    if not callable(stage) or isinstance(stage, type):
        raise InvalidOption(f"debias={debias!r}: expected True, a debiaser, or one of {_NAMES}")
    if isinstance(stage, _OF_GRIDS) and any(map(_looks, (pick for deep in pipeline.inside for pick in deep.picks))):
        raise InvalidOption(f"debias={debias!r}: method {pipeline.name!r} cuts between layers, where grids have holes")
    by_states = any(isinstance(need, SinkReading) for need in getattr(stage, "needs", ()))
    picks = pipeline.picks if by_states else _all_debiased(pipeline.picks, stage)
    inside = tuple(replace(deep, picks=_all_debiased(deep.picks, stage)) for deep in pipeline.inside)
    if (picks, inside) == (pipeline.picks, pipeline.inside):
        where = (
            " that debiasers reach: it chooses inside the encoder, and they work behind it" if pipeline.encoder else ""
        )
        if by_states:
            where = " at a cut between layers, where sinks are told by hidden states"
        raise InvalidOption(f"debias={debias!r}: method {pipeline.name!r} looks at no attention{where}")
    label = name if isinstance(name, str) else type(stage).__name__
    return replace(pipeline, name=f"{pipeline.name}+{label}", picks=picks, inside=inside)


def _undecayed(pipeline: Pipeline) -> Pipeline:
    """The pipeline whose picks between layers score by attention divided by its decay."""
    inside = tuple(
        replace(deep, picks=tuple(replace(pick, scorer=_divided(pick.scorer)) for pick in deep.picks))
        for deep in pipeline.inside
    )
    glances = [need for deep in inside for pick in deep.picks for need in pick.scorer.needs if isinstance(need, Glance)]
    if not glances:
        raise InvalidOption(
            f"debias={ROPE!r}: method {pipeline.name!r} chooses by no attention of decoder layers, and no other is "
            "known to decay as the rotary embedding has it"
        )
    if not all(glance.divides for glance in glances):
        raise InvalidOption(
            f"debias={ROPE!r}: method {pipeline.name!r} reads attention of decoder layers by a scorer of its own; put "
            "`Undecayed` around the rule there"
        )
    if inside == pipeline.inside:
        raise InvalidOption(f"debias={ROPE!r}: method {pipeline.name!r} divides its attention by the decay already")
    return replace(pipeline, name=f"{pipeline.name}+{ROPE}", inside=inside)


def _divided(scorer: Any) -> Any:
    """A scorer, or one made of others, that glances at attention divided by its decay."""
    if isinstance(scorer, Glanced):
        return scorer if scorer.glance.divides else replace(scorer, rule=Undecayed(rule=scorer.rule))
    if not hasattr(scorer, "__dataclass_fields__"):
        return scorer
    parts = {field.name: getattr(scorer, field.name) for field in fields(scorer) if field.init}
    changed = {name: _divided(part) for name, part in parts.items() if hasattr(part, "needs")}
    return replace(scorer, **changed) if changed else scorer


def _all_debiased(picks: tuple[Pick, ...], stage: Debiaser) -> tuple[Pick, ...]:
    return tuple(replace(pick, debiasers=(stage, *pick.debiasers)) if _looks(pick) else pick for pick in picks)


def _looks(pick: Pick) -> bool:
    """Whether a pick scores by attention."""
    return any(_is_attention(need) for need in pick.scorer.needs)


def _is_attention(need: Need) -> bool:
    if not isinstance(need, (str, Reading)):
        return isinstance(need, Glance)
    rule = need.rule if isinstance(need, Reading) else NAMED_RULES.get(need)
    return rule is not None and rule.of == "attention" and not isinstance(rule, Keys)
