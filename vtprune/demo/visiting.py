"""What one user has done so far: a picture, an outcome, patches that were clicked on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vtprune.demo.drawing import board_scale, token_under
from vtprune.demo.hosting import Answering, OnPane, Wanted
from vtprune.demo.media import Media
from vtprune.demo.panes import Ask, Outcome
from vtprune.errors import InvalidOption
from vtprune.types import Budget


@dataclass(frozen=True, kw_only=True, eq=False)
class Visit:
    """What one user has done so far, as a value: every step gives a new one, so that no two users share any of it.

    `known` is the last outcome that tells of patches, mostly `outcome`. `forced_in` and `forced_out` are tokens that
    were clicked on, counted through all pictures of the prompt. `count` is `Host.count` of what is shown;
    `expected` a question with the right answer to it, where these are known.
    """

    media: Media | None = None
    outcome: Outcome | None = None
    known: Outcome | None = None
    forced_in: frozenset[int] = frozenset()
    forced_out: frozenset[int] = frozenset()
    count: int = 0
    expected: tuple[str, str] | None = None

    def showing(self, media: Media, host: Answering) -> Visit:
        """Another picture or clip: what came of the one before goes, and what was forced."""
        return Visit(media=media, count=host.count(media))

    def tokens(self, keep: float | int) -> tuple[int, int]:
        """How many tokens a budget leaves, and of how many: from shapes, without a call of the model.

        Before the first answer separators may be counted in. Methods that cut between layers, or in caches, have as
        many on average over layers.

        Raises:
            InvalidOption: for a budget out of range.
        """
        counts = [self.count] if self.known is None else [segment.n for segment in self.known.segments]
        return sum(Budget(keep=keep).resolve(n) for n in counts if n), sum(counts)

    def asked(
        self,
        host: Answering,
        question: str,
        *,
        methods: tuple[str, str] = ("vtprune", "divprune"),
        keep: float | int = 0.25,
        seed: int = 0,
        debias: bool = False,
        debiaser: str = "recency",
        max_new_tokens: int | None = None,
        on_pane: OnPane | None = None,
        wanted: Wanted | None = None,
    ) -> Visit:
        """With the outcome of a question, forced tokens heeded. Arguments are those of `Ask`, errors of `answer`."""
        if self.media is None:
            raise InvalidOption("there is no picture: upload one, take one with the camera, or choose an example")
        ask = Ask(
            media=self.media,
            question=question,
            methods=methods,
            keep=keep,
            seed=seed,
            debias=debias,
            debiaser=debiaser,
            forced_in=tuple(sorted(self.forced_in)),
            forced_out=tuple(sorted(self.forced_out)),
            max_new_tokens=max_new_tokens,
        )
        outcome = host.answer(ask, on_pane, wanted)
        return replace(self, outcome=outcome, known=outcome if outcome.segments else self.known)

    def clicked(self, x: float, y: float, *, to: Literal["in", "out"], frame: int = 0) -> Visit:
        """With the patch at a pixel of the `board` forced in or out; let go again where it was already.

        Raises:
            InvalidOption: before the first answer, and beside what the model sees.
        """
        if self.media is None or self.known is None:
            raise InvalidOption("nothing is known about patches yet: compare first, then click")
        scale = board_scale(self.media)
        token = token_under(self.known, x / scale, y / scale, frame=frame)
        if token is None:
            raise InvalidOption("the model does not see this part of the picture: click on a patch that it sees")
        into, out_of = self.forced_in - {token}, self.forced_out - {token}
        if to == "in" and token not in self.forced_in:
            into |= {token}
        if to == "out" and token not in self.forced_out:
            out_of |= {token}
        return replace(self, forced_in=into, forced_out=out_of)

    @property
    def forced(self) -> int:
        """How many tokens are forced."""
        return len(self.forced_in) + len(self.forced_out)

    @property
    def right(self) -> str | None:
        """The right answer to what was asked, where it is known."""
        if self.expected is None or self.outcome is None or self.outcome.ask.question != self.expected[0]:
            return None
        return self.expected[1]

    def freed(self) -> Visit:
        """With no token forced."""
        return replace(self, forced_in=frozenset(), forced_out=frozenset())
