"""A debiaser put in front of every choice by attention that a method makes."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any

from vtprune.errors import InvalidOption
from vtprune.glances import Glance, Need, SinkReading
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.protocols import Debiaser, Scorer
from vtprune.readings import Reading
from vtprune.stages.debiasers import WithoutPadding, WithoutSinks, WithoutTrend
from vtprune.stages.filters import DualFilter
from vtprune.stages.glances import Undecayed
from vtprune.stages.recency import WithoutRecency
from vtprune.stages.rules import NAMED_RULES, Keys
from vtprune.stages.scorers import Debiased, Glanced
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


def debiased(pipeline: Pipeline, debias: bool | str | Debiaser | tuple[str | Debiaser, ...] | None) -> Pipeline:
    """The pipeline with a debiaser in front of every pick that scores by attention, of the encoder or of the layers.

    Of several the first is applied first. Where a scorer is made of others, those parts that attend are debiased.
    Masses of attention that an exit is decided by stay as they are.
    With `"rope"` picks between layers score by attention that is divided by the decay of the rotary embedding.

    Raises:
        InvalidOption: for an unknown name, for a method that looks at no attention or at that inside the encoder
            only, for the trend of rows and columns in a method that cuts between layers, where grids have holes, and
            for one that reads hidden states in a method that does not cut there.
    """
    if debias is None or debias is False:
        return pipeline
    if isinstance(debias, tuple):
        found = functools.reduce(debiased, reversed(debias), pipeline)
        labels = "+".join(map(_label, debias))
        return found if found == pipeline else replace(found, name=f"{pipeline.name}+{labels}")
    name = "recency" if debias is True else debias
    if name == ROPE:
        return _undecayed(pipeline)
    if isinstance(name, str) and name not in DEBIASERS:
        raise InvalidOption(f"debias={debias!r}: expected True, a debiaser, or one of {_NAMES}")
    stage = DEBIASERS[name] if isinstance(name, str) else name
    if not callable(stage) or isinstance(stage, type):
        raise InvalidOption(f"debias={debias!r}: expected True, a debiaser, or one of {_NAMES}")
    if isinstance(stage, WithoutTrend) and any(_looks(pick.scorer) for deep in pipeline.inside for pick in deep.picks):
        raise InvalidOption(f"debias={debias!r}: method {pipeline.name!r} cuts between layers, where grids have holes")
    changed = _everywhere(pipeline, stage)
    if changed == pipeline:
        raise InvalidOption(f"debias={debias!r}: method {pipeline.name!r} looks at no attention{_why(pipeline, stage)}")
    return replace(changed, name=f"{pipeline.name}+{_label(debias)}")


def padding_of(pipeline: Pipeline) -> WithoutPadding | None:
    """What tells padding for cuts between layers; None where no stage asks."""
    for pick in (pick for deep in pipeline.inside for pick in deep.picks):
        found = [*pick.debiasers, *_debiasers_in(pick.scorer)]
        padding = next((one for one in found if isinstance(one, WithoutPadding)), None)
        if padding is not None:
            return padding
    return None


def _debiasers_in(scorer: Any) -> list[Debiaser]:
    own = [scorer.debiaser] if isinstance(scorer, Debiased) else []
    return own + [one for part in _parts(scorer).values() for one in _debiasers_in(part)]


def _label(debias: Any) -> str:
    """What a debiaser adds to the name of a method."""
    return "recency" if debias is True else debias if isinstance(debias, str) else type(debias).__name__


def _by_states(stage: Debiaser) -> bool:
    """Whether a debiaser reads hidden states at cuts between layers."""
    return any(isinstance(need, SinkReading) for need in getattr(stage, "needs", ()))


def _everywhere(pipeline: Pipeline, stage: Debiaser) -> Pipeline:
    """The pipeline with a debiaser wherever it goes by attention, or by states between layers."""
    inside = tuple(_debiased_stage(deep, stage) for deep in pipeline.inside)
    if _by_states(stage):
        return replace(pipeline, inside=inside)
    cache = pipeline.cache
    if cache is not None and not isinstance(stage, WithoutPadding):
        cache = replace(cache, picks=_all_debiased(cache.picks, stage))
    return replace(pipeline, picks=_all_debiased(pipeline.picks, stage), inside=inside, cache=cache)


def _why(pipeline: Pipeline, stage: Debiaser) -> str:
    """What an error adds where nothing of a pipeline can be debiased."""
    if _by_states(stage):
        return " at a cut between layers, where sinks are told by hidden states"
    if pipeline.encoder is not None:
        return " that debiasers reach: it chooses inside the encoder, and they work behind it"
    counts = any(stage.counter is not None for stage in pipeline.inside)
    return " to choose among tokens; what it checks is a mass of attention, which stays as it is" if counts else ""


def _debiased_stage(deep: LayerStage, stage: Debiaser) -> LayerStage:
    """A cut between layers; a counter that goes by the scorer of a pick goes by it still."""
    picks = _all_debiased(deep.picks, stage)
    scorers = {pick.scorer: new.scorer for pick, new in zip(deep.picks, picks, strict=True)}
    counter: Any = deep.counter
    if counter is not None and hasattr(counter, "__dataclass_fields__"):
        own = {field.name: getattr(counter, field.name) for field in fields(counter)}
        kept = {name: scorers[part] for name, part in own.items() if isinstance(part, DualFilter) and part in scorers}
        counter = replace(counter, **kept) if kept else counter
    return replace(deep, picks=picks, counter=counter)


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
    changed = {name: _divided(part) for name, part in _parts(scorer).items()}
    return replace(scorer, **changed) if changed else scorer


def _all_debiased(picks: tuple[Pick, ...], stage: Debiaser) -> tuple[Pick, ...]:
    return tuple(_debiased_pick(pick, stage) if _looks(pick.scorer) else pick for pick in picks)


def _debiased_pick(pick: Pick, stage: Debiaser) -> Pick:
    """A pick with a debiaser in front of its own; where its scorer is made of others, behind those that attend."""
    if not _parts(pick.scorer):
        return replace(pick, debiasers=(stage, *pick.debiasers))
    return replace(pick, scorer=_debiased_parts(pick.scorer, stage))


def _debiased_parts(scorer: Any, stage: Debiaser) -> Any:
    parts = _parts(scorer)
    if not parts:
        return Debiased(scorer=scorer, debiaser=stage) if _looks(scorer) else scorer
    return replace(scorer, **{name: _debiased_parts(part, stage) for name, part in parts.items()})


def _parts(scorer: Any) -> dict[str, Any]:
    """The scorers that a scorer is made of, by field."""
    own = fields(scorer) if hasattr(scorer, "__dataclass_fields__") else ()
    found = {field.name: getattr(scorer, field.name) for field in own if field.init}
    return {name: part for name, part in found.items() if hasattr(part, "needs") and callable(part)}


def _looks(scorer: Scorer) -> bool:
    """Whether a scorer goes by attention."""
    return any(_is_attention(need) for need in scorer.needs)


def _is_attention(need: Need) -> bool:
    if not isinstance(need, (str, Reading)):
        return isinstance(need, Glance)
    rule = need.rule if isinstance(need, Reading) else NAMED_RULES.get(need)
    return rule is not None and rule.of == "attention" and not isinstance(rule, Keys)
