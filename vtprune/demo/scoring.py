"""Scores of the first pick of a method for a heat-map, as it stands and debiased: heard in the call, made after it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtprune.debiasing import debiased
from vtprune.errors import InvalidOption
from vtprune.glances import Need
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.protocols import Scorer
from vtprune.report import PruneReport
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

    Where one of them is not there, or says nothing, it is None and `missing` says why, by the name of the view.
    """

    scores: tuple[Tensor, ...] | None
    debiased: tuple[Tensor, ...] | None
    missing: dict[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """A method to be run, and what its first pick hears while it is.

    `plain` and `treated` are that pick without and with a debiaser, None where there is none; `why` says why then.
    `notes` say what became of debiasing where it was asked for.
    """

    pipeline: Pipeline
    plain: Pick | None
    treated: Pick | None
    why: dict[str, str]
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
        if not method.picks:
            where = "stores what it chooses in every layer" if method.cache else "scores tokens between decoder layers"
            where = where if method.drops else "keeps every token and scores none"
            why = dict.fromkeys(("scores", "debiased"), f"{method.name} {where}: there is no map of it")
            return cls(pipeline=running, plain=None, treated=None, why=why, notes=notes)
        treated = other.picks[0] if other.picks[0] != method.picks[0] else None
        reason = refused or f"{debiaser} changes nothing that {method.name} scores by before the language model"
        why = {} if treated is not None else {"debiased": reason}
        heard: list[VisualTokens] = []
        first = replace(running.picks[0], scorer=Listening(scorer=running.picks[0].scorer, heard=heard))
        return cls(
            pipeline=replace(running, picks=(first, *running.picks[1:])),
            plain=method.picks[0],
            treated=treated,
            why=why,
            heard=heard,
            notes=notes,
        )

    def scored(self, report: PruneReport) -> Scored:
        """What the first pick makes of what it heard in the call that the report is about."""
        missing = dict(self.why)
        found: dict[str, tuple[Tensor, ...] | None] = {"scores": None, "debiased": None}
        if self.plain is not None and not self.heard:
            missing = dict.fromkeys(found, "everything was kept: nothing was scored")
        for name, pick in (("scores", self.plain), ("debiased", self.treated)):
            if pick is None or not self.heard:
                continue
            found[name] = _of_pictures(pick, self.heard, report)
            if all(bool((own == own[:1]).all()) for own in found[name] or ()):
                found[name] = None
                missing[name] = f"pick {pick.name!r} scores all tokens alike and goes by {_rule(pick)}"
        return Scored(scores=found["scores"], debiased=found["debiased"], missing=missing)


def _rule(pick: Pick) -> str:
    return f"its rule {type(pick.selector).__name__}"


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
