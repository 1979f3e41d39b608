"""What a page asks: a model, or a vision tower by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vtprune.demo.choices import Choice
from vtprune.demo.media import Example, Media
from vtprune.demo.panes import Ask, Outcome, Pane
from vtprune.types import Modality

OnPane = Callable[[str, Pane], None]
Wanted = Callable[[], bool]


class Unwanted(Exception):
    """Nobody waits for the answer any more."""


def check_wanted(wanted: Wanted | None) -> None:
    """Raise `Unwanted` where nobody waits any more."""
    if wanted is not None and not wanted():
        raise Unwanted


class Answering(Protocol):
    """See `Host` and `PhotoHost`."""

    @property
    def name(self) -> str: ...
    @property
    def takes_clips(self) -> bool: ...
    @property
    def takes_questions(self) -> bool: ...
    def examples(self) -> tuple[Example, ...]: ...
    def methods(self, kind: Modality = "image") -> tuple[Choice, ...]: ...
    def count(self, media: Media) -> int: ...
    def answer(self, ask: Ask, on_pane: OnPane | None = None, wanted: Wanted | None = None) -> Outcome: ...
