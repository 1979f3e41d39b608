"""Chance at the cuts of a method: what a method that cuts between decoder layers is measured against."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vtprune.adapters.base import language_model
from vtprune.catalog import build, list_methods
from vtprune.errors import InvalidOption, VtpruneError
from vtprune.eval.arms import OWN, Step
from vtprune.eval.subject import Answers, Batch
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.runtime.deep import schedule_of
from vtprune.schedule import Schedule
from vtprune.stages.scorers import Given
from vtprune.stages.selectors import TopK
from vtprune.types import Budget

CHANCE = "chance"
_PREFIX = "random@"
ABOUT = (
    "the same cuts in front of the same layers with the same counts as the methods it is beside, 0 being the front of "
    "the language model; at each cut chance decides, drawn anew for every scene. Where a method lets pictures leave "
    "altogether, the rule for that stays."
)
"""What such an arm does, for a legend."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """Chance at the cuts of a method: `pipeline` is called after them, `schedule` says where and how many on one model.

    It is an arm: call it with a batch and a budget. Scores are drawn once for every scene, and each cut keeps the
    highest of what the one before left: so every cut is a draw of its own.
    """

    pipeline: Pipeline
    schedule: Schedule

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.pipeline.name

    @property
    def reach(self) -> str:
        """The averages there are, for people."""
        low, high = (round(share, 4) for share in self.schedule.reach)
        return f"{low:g} to {high:g}"

    def reaches(self, keep: float | int, n: int) -> bool:
        """Whether the cuts can leave that much of `n` tokens on average over layers."""
        try:
            self.schedule.counts(n, Budget(keep=keep))
        except InvalidOption:
            return False
        return True

    def __call__(self, batch: Batch, keep: float | int) -> Answers:
        drawn = [torch.rand(batch.n, generator=torch.Generator().manual_seed(item.seed)) for item in batch.items]
        return batch.answer(self.pipeline, keep, evidence={CHANCE: drawn})


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Cuts of a method on one model; those with an equal `course` leave as many tokens at every budget."""

    method: Pipeline
    schedule: Schedule

    @property
    def layers(self) -> tuple[int, ...]:
        """What is cut in front of, 0 where something is before the language model."""
        return (*((0,) if self.method.picks else ()), *self.schedule.layers)

    @property
    def stages(self) -> tuple[LayerStage, ...]:
        return tuple(self.method.inside[number] for number in self.schedule.stages)

    @property
    def shares(self) -> tuple[float, ...]:
        """What is left at each cut, as published."""
        return (*((self.schedule.before,) if self.method.picks else ()), *self.schedule.shares)

    @property
    def course(self) -> tuple[object, ...]:
        """Layers, ratios of the logarithms of shares, and counters."""
        logs = [math.log(share) if share else -math.inf for share in self.shares]
        unit = next((log for log in logs if log and math.isfinite(log)), -1.0)
        ratios = tuple(round(log / unit, 6) for log in logs)
        return (self.layers, ratios, tuple(stage.counter for stage in self.stages))

    def control(self, name: str) -> Control:
        """Chance at these cuts."""
        pick = Pick(name=CHANCE, scorer=Given(name=CHANCE), selector=TopK())
        inside = tuple(
            LayerStage(at=layer, keep=share, picks=(pick,), counter=stage.counter)
            for layer, share, stage in zip(self.schedule.layers, self.schedule.shares, self.stages, strict=True)
        )
        picks = (pick,) if self.method.picks else ()
        pipeline = Pipeline(name=name, picks=picks, before=self.method.before, inside=inside)
        return Control(pipeline=pipeline, schedule=self.schedule)


def controls(base: nn.Module, methods: Iterable[str]) -> dict[str, Control]:
    """By method, chance at its cuts on this model: of those `methods` that cut between its layers, variants included.

    Methods that cut alike have one and the same. Its name and its pipeline do not depend on which of them are asked
    for, so that answers that were stored under it are found again.
    """
    plans = {name: plan for name in list_methods() if (plan := _plan_of(build(name), base)) is not None}
    first = {plan.course: plan for plan in reversed(plans.values())}
    alike = [plan.layers for plan in first.values()]
    found = {course: plan.control(_name(plan, alone=alike.count(plan.layers) == 1)) for course, plan in first.items()}
    plain = {name: name.partition("+")[0] for name in methods}
    return {name: found[plans[method].course] for name, method in plain.items() if method in plans}


def _plan_of(method: Pipeline, base: nn.Module) -> _Plan | None:
    """The cuts of a method; None where there are none, or none that choose among the tokens of a picture."""
    lm = language_model(base)
    if not method.inside or lm is None:
        return None
    try:
        schedule = schedule_of(method, base, lm)
    except VtpruneError:
        return None  # its own rows tell why
    return _Plan(method=method, schedule=schedule) if isinstance(schedule, Schedule) else None


def _name(plan: _Plan, *, alone: bool) -> str:
    """The layers; where other methods cut in front of the same ones in another way, also the shares."""
    name = _PREFIX + ",".join(map(str, plan.layers))
    if alone:
        return name
    leaving = " or none" if any(stage.counter is not None for stage in plan.stages) else ""
    return f"{name} ({', '.join(f'{share:.3g}' for share in plan.shares)}{leaving})"


def is_control(name: str) -> bool:
    """Whether a row of a table is chance at the cuts of a method."""
    return name.startswith(_PREFIX)


def controlled(steps: Sequence[Step], known: dict[str, Control]) -> tuple[Step, ...]:
    """The plan with chance at the cuts of its methods, in front of what all methods are measured against."""
    more = {(known[name].name, str(keep)): (known[name].name, keep) for name, keep in steps if name in known}
    place = next((number for number, (name, _) in enumerate(steps) if name in OWN), len(steps))
    return (*steps[:place], *more.values(), *steps[place:])
