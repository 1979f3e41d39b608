"""The photo mode of the page: which patches of a photo methods keep on a vision tower, without a language model."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field, replace

import torch

from vtprune.catalog import build, describe
from vtprune.demo import focus
from vtprune.demo.choices import Choice, paper_of
from vtprune.demo.drawing import views_of
from vtprune.demo.hosting import OnPane, Wanted, check_wanted
from vtprune.demo.media import Example, Media
from vtprune.demo.panes import RANDOM, Ask, Outcome, Pane, keys_of, numbers_of
from vtprune.demo.photo import choose, methods, photograph, photographs
from vtprune.demo.scoring import Watch, with_forced
from vtprune.demo.seen import Seen
from vtprune.demo.towers import Tower
from vtprune.demo.wording import about, failed
from vtprune.errors import InvalidOption
from vtprune.types import Modality
from vtprune.viz import Box


@dataclass(frozen=True, kw_only=True, eq=False)
class PhotoHost:
    """A vision tower by name, loaded when it is first asked: see `Tower.load`."""

    source: str = focus.NAME
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def name(self) -> str:
        """What loads the tower."""
        return self.source

    @property
    def takes_clips(self) -> bool:
        """One photo at a time."""
        return False

    @property
    def takes_questions(self) -> bool:
        """Nobody would answer."""
        return False

    @functools.cached_property
    def _tower(self) -> Tower:
        return Tower.load(self.source)

    @property
    def tower(self) -> Tower:
        """The tower; raises what `Tower.load` does."""
        with self._lock:
            return self._tower

    def examples(self) -> tuple[Example, ...]:
        """Real photos where scikit-image is installed, and a drawn picture."""
        return tuple(Example(name=name, source=photograph(name), question="", answer="") for name in photographs())

    def methods(self, kind: Modality = "image") -> tuple[Choice, ...]:
        """Every method, those that need more than a photo with the reason."""
        found = []
        for name, reason in methods(self.tower):
            card = describe(name)
            found.append(Choice(name=name, line=card.summary, paper=paper_of(card), reason=reason))
        return tuple(found)

    def count(self, media: Media) -> int:
        """Patches of any photo."""
        rows, columns = self.tower.grid
        return rows * columns

    def answer(self, ask: Ask, on_pane: OnPane | None = None, wanted: Wanted | None = None) -> Outcome:
        """What both methods and `random` keep; see `Host.answer`. The tower looks once, for all of them."""
        seen = self.tower.look(ask.media.pictures[0])
        panes: list[Pane] = []
        framing = seen.box.corners
        for place, method in zip(("a", "b", "random"), (*ask.methods, RANDOM), strict=True):
            check_wanted(wanted)
            panes.append(_pane(_forced(seen, ask), ask, method, framing))
            if on_pane is not None:
                on_pane(place, panes[-1])
        return Outcome(ask=ask, model=self.source, panes=tuple(panes), framing=framing, notes=ask.media.notes)


def _forced(seen: Seen, ask: Ask) -> Seen:
    """With the patches that were forced in and out."""
    evidence = dict(seen.tokens.evidence)
    n = seen.tokens.features.shape[1]
    if ask.forced_in:
        evidence["protect"] = torch.tensor([ask.forced_in])
    if ask.forced_out:
        evidence["forbid"] = torch.zeros(1, n, dtype=torch.bool)
        evidence["forbid"][0, list(ask.forced_out)] = True
    return replace(seen, tokens=replace(seen.tokens, evidence=evidence))


def _pane(seen: Seen, ask: Ask, method: str, framing: Box) -> Pane:
    card = about(method)
    try:
        pipeline = build(method, {"seed": ask.seed} if "seed" in describe(method).parameters else {})
        watch = Watch.of(pipeline, ask.debiaser, debias=ask.debias)
        report = choose(seen, watch.pipeline, ask.keep)
        if len(ask.forced_in) > report.kept:
            raise InvalidOption(f"{len(ask.forced_in)} patches are forced in, and {report.kept} are kept: let some go")
        views = views_of(report, ask.media, framing, with_forced(watch.scored(report), ask))
    except Exception as error:  # whatever it was, it costs this pane and not the others
        return Pane(method=method, line=card.line, paper=card.paper, error=failed(error))
    return Pane(
        method=method,
        line=card.line,
        paper=card.paper,
        numbers=numbers_of(report, seconds=report.seconds),
        pictures=views.pictures,
        missing=views.missing,
        colours=keys_of(report, ask),
        notes=watch.notes if method != RANDOM else (),
        report=report,
    )
