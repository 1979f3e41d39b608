"""A visit, step by step, as the page takes it: from what was entered to what is shown. Knows nothing of gradio."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.demo.choices import Choice
from vtprune.demo.hosting import Answering, OnPane
from vtprune.demo.media import read_upload
from vtprune.demo.panes import Pane
from vtprune.demo.visiting import Visit
from vtprune.errors import InvalidOption

PLACES = ("a", "b", "random")
"""Panes of methods, from left to right."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is entered beside the picture."""

    question: str
    first: str
    second: str
    keep: float
    seed: int = 0
    debias: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What came of an answer since the step before: panes by place, or at the end the visit with its outcome."""

    panes: dict[str, Pane]
    visit: Visit | None = None


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
            return brought(host, one.source), one.question
    raise InvalidOption(f"no example {name!r}: choose one of {', '.join(one.name for one in host.examples())}")


def answered(host: Answering, visit: Visit, wish: Wish) -> Iterator[Step]:
    """The panes as they come, and the visit with all of them at last.

    Raises:
        VtpruneError: as `Visit.asked` does.
    """

    def ask(note: OnPane) -> Visit:
        return visit.asked(
            host,
            wish.question,
            methods=(wish.first, wish.second),
            keep=float(wish.keep),
            seed=int(wish.seed),
            debias=wish.debias,
            on_pane=note,
        )

    for found in _as_they_come(ask):
        if isinstance(found, Visit):
            yield Step(panes={}, visit=found)
        else:
            place, pane = found
            yield Step(panes={place: pane})


class _Gone(Exception):
    """Nobody waits for the answer any more."""


def _as_they_come(ask: Callable[[OnPane], Visit]) -> Iterator[tuple[str, Pane] | Visit]:
    """What a call reports on its way, and what it returns, from a thread of its own; raises what it raises.

    Where nobody waits any more the call ends with the pane that is under way.
    """
    came: queue.SimpleQueue[tuple[str, Pane] | Visit | BaseException] = queue.SimpleQueue()
    gone = threading.Event()

    def note(place: str, pane: Pane) -> None:
        if gone.is_set():
            raise _Gone
        came.put((place, pane))

    def work() -> None:
        try:
            came.put(ask(note))
        except BaseException as error:  # raised where it is waited for
            came.put(error)

    threading.Thread(target=work, daemon=True, name="vtprune-demo").start()
    try:
        while True:
            found = came.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if isinstance(found, Visit):
                return
    finally:
        gone.set()


def panes_of(visit: Visit) -> dict[str, Pane]:
    """The panes of the last outcome, by place."""
    if visit.outcome is None:
        return {}
    found = dict(zip(PLACES, visit.outcome.panes, strict=True))
    return found if visit.outcome.unpruned is None else {"unpruned": visit.outcome.unpruned, **found}


def served(choices: Sequence[Choice]) -> list[str]:
    """Names of the methods that can be asked."""
    return [choice.name for choice in choices if not choice.reason]
