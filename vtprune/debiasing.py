"""A debiaser put in front of every choice by attention that a method makes."""

from __future__ import annotations

from dataclasses import replace

from vtprune.errors import InvalidOption
from vtprune.pipeline import Pick, Pipeline
from vtprune.protocols import Debiaser
from vtprune.readings import Glance, Reading
from vtprune.stages.debiasers import WithoutPadding, WithoutSinks, WithoutTrend
from vtprune.stages.recency import WithoutRecency
from vtprune.stages.rules import NAMED_RULES, Keys

DEBIASERS: dict[str, Debiaser] = {
    "recency": WithoutRecency(),
    "cubic": WithoutRecency(form="cubic"),
    "sinks": WithoutSinks(),
    "padding": WithoutPadding(),
    "trend": WithoutTrend(),
}
"""What `wrap(..., debias=...)` takes by name; True is the first."""
_OF_GRIDS = (WithoutPadding, WithoutTrend)


def debiased(pipeline: Pipeline, debias: bool | str | Debiaser | None) -> Pipeline:
    """The pipeline with a debiaser in front of every pick that scores by attention, of the encoder or of the layers.

    Raises:
        InvalidOption: for an unknown name, for a method that looks at no attention or at that inside the encoder
            only, and for a debiaser of whole grids in a method that cuts between layers, where grids have holes.
    """
    if debias is None or debias is False:
        return pipeline
    name = "recency" if debias is True else debias
    if isinstance(name, str) and name not in DEBIASERS:
        raise InvalidOption(f"debias={debias!r}: expected True, a debiaser, or one of {', '.join(DEBIASERS)}")
    stage = DEBIASERS[name] if isinstance(name, str) else name
    if not callable(stage) or isinstance(stage, type):
        raise InvalidOption(f"debias={debias!r}: expected True, a debiaser, or one of {', '.join(DEBIASERS)}")
    if isinstance(stage, _OF_GRIDS) and any(map(_looks, (pick for deep in pipeline.inside for pick in deep.picks))):
        raise InvalidOption(f"debias={debias!r}: method {pipeline.name!r} cuts between layers, where grids have holes")
    picks = _all_debiased(pipeline.picks, stage)
    inside = tuple(replace(deep, picks=_all_debiased(deep.picks, stage)) for deep in pipeline.inside)
    if (picks, inside) == (pipeline.picks, pipeline.inside):
        where = " that debiasers reach: it chooses inside the encoder, and they work behind it"
        raise InvalidOption(
            f"debias={debias!r}: method {pipeline.name!r} looks at no attention{where if pipeline.encoder else ''}"
        )
    label = name if isinstance(name, str) else type(stage).__name__
    return replace(pipeline, name=f"{pipeline.name}+{label}", picks=picks, inside=inside)


def _all_debiased(picks: tuple[Pick, ...], stage: Debiaser) -> tuple[Pick, ...]:
    return tuple(replace(pick, debiasers=(stage, *pick.debiasers)) if _looks(pick) else pick for pick in picks)


def _looks(pick: Pick) -> bool:
    """Whether a pick scores by attention."""
    return any(_is_attention(need) for need in pick.scorer.needs)


def _is_attention(need: str | Reading | Glance) -> bool:
    if isinstance(need, Glance):
        return True
    rule = need.rule if isinstance(need, Reading) else NAMED_RULES.get(need)
    return rule is not None and rule.of == "attention" and not isinstance(rule, Keys)
