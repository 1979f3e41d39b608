"""Scores of the first pick of a method for a heat-map, as it stands and debiased: heard in the call, made after it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtprune.debiasing import debiased
from vtprune.demo.panes import Ask
from vtprune.demo.quantities import alike, no_scores, not_debiased, quantity
from vtprune.errors import InvalidOption
from vtprune.glances import Need
from vtprune.picking import Pick, choose
from vtprune.pipeline import Pipeline
from vtprune.protocols import Scorer
from vtprune.report import PruneReport
from vtprune.stages.debiasers import MinMax
from vtprune.types import VisualTokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Listening:
    """A scorer that remembers what it was shown, and scores as the one inside of it does."""

    scorer: Scorer
    heard: list[VisualTokens] = field(default_factory=list, repr=False)

    @property
    def needs(self) -> frozenset[Need]:
        return self.scorer.needs

    def __call__(self, tokens: VisualTokens) -> Tensor:
        self.heard.append(tokens)
        return self.scorer(tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Scores (n,) of every picture of a report by the first pick, on the host, without and with a debiaser.

    Where one of them is not there, or says nothing, it is None and `missing` says why, by the name of the view; `names`
    say what is scored. `forced_in` and `forced_out` are the tokens that were forced, as in `Ask`.
    """

    scores: tuple[Tensor, ...] | None
    debiased: tuple[Tensor, ...] | None
    missing: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)
    forced_in: tuple[int, ...] = ()
    forced_out: tuple[int, ...] = ()


def with_forced(scored: Scored, ask: Ask) -> Scored:
    """With the tokens that were forced."""
    return replace(scored, forced_in=ask.forced_in, forced_out=ask.forced_out)


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """A method to be run, and what its first pick hears while it is.

    `plain` and `treated` are all picks without and with a debiaser, None where that changes nothing of the first, or
    there is none; `why` says why then. `notes` say what became of debiasing where it was asked for.
    """

    pipeline: Pipeline
    plain: tuple[Pick, ...] | None
    treated: tuple[Pick, ...] | None
    why: dict[str, str]
    debiaser: str
    heard: list[VisualTokens] = field(default_factory=list, repr=False)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, method: Pipeline, debiaser: str, *, debias: bool) -> Watch:
        """Watch a method, which runs debiased where `debias` says so and the method goes by attention."""
        refused = ""
        try:
            other = debiased(method, debiaser)
        except InvalidOption as error:
            other, refused = method, str(error).partition(": ")[2] or str(error)
        notes = (f"not debiased: {refused}" if refused else f"debiased: {debiaser}",) if debias else ()
        running = other if debias else method
        if none := no_scores(method):
            why = dict.fromkeys(("scores", "debiased"), none)
            return cls(pipeline=running, plain=None, treated=None, why=why, debiaser=debiaser, notes=notes)
        treated = other.picks if other.picks[0] != method.picks[0] else None
        why = {} if treated is not None else {"debiased": not_debiased(method, debiaser)}
        heard: list[VisualTokens] = []
        first = replace(running.picks[0], scorer=Listening(scorer=running.picks[0].scorer, heard=heard))
        return cls(
            pipeline=replace(running, picks=(first, *running.picks[1:])),
            plain=method.picks,
            treated=treated,
            why=why,
            debiaser=debiaser,
            heard=heard,
            notes=notes,
        )

    def scored(self, report: PruneReport) -> Scored:
        """What the first pick makes of what it heard in the call that the report is about."""
        missing, names = dict(self.why), {}
        found: dict[str, tuple[Tensor, ...] | None] = {"scores": None, "debiased": None}
        if self.plain is not None and not self.heard:
            missing = dict.fromkeys(found, "everything was kept: nothing was scored")
        for name, picks in (("scores", self.plain), ("debiased", self.treated)):
            if picks is None or not self.heard:
                continue
            found[name] = _of_pictures(picks[0], self.heard, report)
            stretched = any(isinstance(one, MinMax) for one in picks[0].debiasers)
            named = quantity(_inner(picks[0].scorer), report.importance)
            names[name] = f"{named}, stretched to 0 to 1" if stretched else named
            if all(bool((own == own[:1]).all()) for own in found[name] or ()):
                found[name] = None
                missing[name] = alike(report.method, picks[0])
        if found["debiased"] is not None:
            changed = self._changed(report)
            names["debiased"] += f"; {self.debiaser} taken off" + (f"\n{changed}" if changed else "")
        return Scored(scores=found["scores"], debiased=found["debiased"], missing=missing, names=names)

    @torch.no_grad()
    def _changed(self, report: PruneReport) -> str:
        """How many of the chosen tokens a debiaser changes; empty where choices cannot be made again alike.

        They are made again where there was one for each whole picture; one of the two has to be what the report says.
        """
        plan = self.pipeline
        only = plan.counter is None and plan.frames is None and plan.encoder is None and not plan.inside
        if not only or self.plain is None or self.treated is None:
            return ""
        chosen: list[list[list[int]]] = [[], []]
        there = []
        for tokens in self.heard:
            for ordinal in tokens.ordinals:
                if tokens.features.shape[1] != report.segments[ordinal.segment].n:
                    return ""
                there.append(ordinal.segment)
            k = {report.segments[ordinal.segment].k for ordinal in tokens.ordinals}
            if len(k) != 1:
                return ""
            for own, picks in zip(chosen, (self.plain, self.treated), strict=True):
                own += choose(picks, tokens, min(k)).keep.tolist()
        kept = [report.segments[number].keep.tolist() for number in there]
        if sorted(there) != list(range(len(report.segments))) or kept not in chosen:
            return ""
        others = sum(len(set(one) - set(other)) for one, other in zip(*chosen, strict=True))
        return f"{others} of {report.kept} choices change by that"


def _inner(scorer: Scorer) -> Scorer:
    """A scorer without what listens to it."""
    return scorer.scorer if isinstance(scorer, Listening) else scorer


@torch.no_grad()
def _of_pictures(pick: Pick, heard: list[VisualTokens], report: PruneReport) -> tuple[Tensor, ...]:
    """Scores (n,) of every picture; NaN at tokens that nobody asked about."""
    found = [torch.full((segment.n,), float("nan")) for segment in report.segments]
    for tokens in heard:
        scores = pick.scorer(tokens)
        for debiaser in pick.debiasers:
            scores = debiaser(tokens, scores)
        for ordinal, own in zip(tokens.ordinals, scores.float().cpu(), strict=True):
            parts = report.segments[ordinal.segment].parts
            start = sum(part.tokens for part in parts[: ordinal.part])
            found[ordinal.segment][start : start + len(own)] = own
    return tuple(found)
