"""A visit, step by step, as the page takes it: from what was entered to what is shown. Knows nothing of gradio."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vtprune.demo.choices import Choice
from vtprune.demo.hosting import Answering, OnPane, Unwanted, Wanted
from vtprune.demo.media import read_upload
from vtprune.demo.panes import Pane
from vtprune.demo.seat import Seat
from vtprune.demo.visiting import Visit
from vtprune.errors import InvalidOption

_LOOK = 0.1
"""Seconds after which it is looked whether anybody still waits."""
PLACES = ("a", "b", "random")
"""Panes of methods, from left to right."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is entered beside the picture."""

    question: str
    first: str
    second: str
    keep: float | int
    seed: int = 0
    debias: bool = False

    @classmethod
    def of(cls, question: Any, first: Any, second: Any, keep: Any, seed: Any, debias: Any) -> Wish:
        """What stands in the fields of the page; raises `InvalidOption` for one without a number."""
        budget = budget_of(keep)
        if seed is None:
            raise InvalidOption("the seed is empty: expected a whole number, 0 or more")
        return cls(
            question=question or "", first=first, second=second, keep=budget, seed=int(seed), debias=bool(debias)
        )


def budget_of(keep: float | None) -> float | int:
    """A share of the tokens up to 1, a number of them above it.

    Raises:
        InvalidOption: for nothing, and what is not above 0.
    """
    if keep is None or keep <= 0:
        raise InvalidOption("keep: expected a share of the tokens, up to 1, or a number of tokens")
    return float(keep) if keep <= 1 else round(keep)


def brought(host: Answering, source: Any) -> Visit:
    """A visit that begins with a picture or clip.

    Raises:
        VtpruneError: for what is none, in a sentence for the page.
    """
    media = read_upload(source)
    if media.kind == "video" and not host.takes_clips:
        raise InvalidOption(f"{host.name} takes pictures only: show it one, or start the demo with a model for clips")
    return Visit().showing(media, host)


def example(host: Answering, name: str) -> tuple[Visit, str]:
    """A visit that begins with an example, and its question."""
    for one in host.examples():
        if one.name == name:
            visit = brought(host, one.source)
            media = None if visit.media is None else replace(visit.media, name=name)
            expected = (one.question, one.answer) if one.answer else None
            return replace(visit, media=media, expected=expected), one.question
    raise InvalidOption(f"no example {name!r}: choose one of {', '.join(one.name for one in host.examples())}")


def answered(host: Answering, seat: Seat, wish: Wish) -> Iterator[dict[str, Pane]]:
    """The panes that are there so far, each time one more is; what came of it all is in the seat then.

    Ends early, with nothing noted, where the visitor does something else meanwhile.

    Raises:
        VtpruneError: as `Visit.asked` does.
    """
    turn, visit = seat.begin(), seat.visit
    if turn is None:
        return
    gone = threading.Event()

    def wanted() -> bool:
        return not gone.is_set() and seat.wants(turn)

    def ask(note: OnPane) -> Visit:
        return visit.asked(
            host,
            wish.question,
            methods=(wish.first, wish.second),
            keep=wish.keep,
            seed=wish.seed,
            debias=wish.debias,
            on_pane=note,
            wanted=wanted,
        )

    panes: dict[str, Pane] = {}
    try:
        for found in _as_they_come(ask, wanted):
            if isinstance(found, Visit):
                seat.end(turn, found)
            else:
                panes = {**panes, found[0]: found[1]}
                yield panes
    except Unwanted:
        return
    finally:
        gone.set()
        seat.end(turn)


def _as_they_come(ask: Callable[[OnPane], Visit], wanted: Wanted) -> Iterator[tuple[str, Pane] | Visit]:
    """What a call reports on its way, and what it returns, from a thread of its own; raises what it raises.

    Ends where nobody waits any more; the call then ends with the pane that is under way.
    """
    came: queue.SimpleQueue[tuple[str, Pane] | Visit | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            came.put(ask(lambda place, pane: came.put((place, pane))))
        except BaseException as error:  # raised where it is waited for
            came.put(error)

    threading.Thread(target=work, daemon=True, name="vtprune-demo").start()
    while wanted():
        try:
            found = came.get(timeout=_LOOK)
        except queue.Empty:
            continue
        if isinstance(found, BaseException):
            raise found
        yield found
        if isinstance(found, Visit):
            return


def panes_of(visit: Visit) -> dict[str, Pane]:
    """The panes of the last outcome, by place."""
    if visit.outcome is None:
        return {}
    found = dict(zip(PLACES, visit.outcome.panes, strict=True))
    return found if visit.outcome.unpruned is None else {"unpruned": visit.outcome.unpruned, **found}


def served(choices: Sequence[Choice]) -> list[str]:
    """Names of the methods that can be asked."""
    return [choice.name for choice in choices if not choice.reason]
