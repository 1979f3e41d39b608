"""Where a visitor sits: what they have done so far, and which answer they wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vtprune.demo.visiting import Visit


class Seat:
    """A `Visit` that steps replace, from any thread. Every step that asks for an answer, or shows something else, is a
    new turn: what comes for an older one is dropped, and nothing that was done meanwhile is lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._visit = Visit()
        self._turn = self._begun = self._ended = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        """Another seat: the page copies one for each visitor."""
        return Seat()

    @property
    def visit(self) -> Visit:
        """What has been done so far."""
        return self._visit

    @property
    def turn(self) -> int:
        """The number of the last turn."""
        return self._turn

    @property
    def waiting(self) -> bool:
        """An answer is asked for, and has neither come nor failed."""
        return self._ended != self._turn

    def show(self, visit: Visit) -> None:
        """Begin anew, with another picture or clip; no answer is asked for."""
        with self._lock:
            self._visit = visit
            self._turn += 1
            self._begun = self._ended = self._turn

    def ask(self, step: Callable[[Visit], Visit] = lambda visit: visit) -> int:
        """Do a step, and ask for an answer after it; gives the turn. Where the step raises nothing changes."""
        with self._lock:
            self._visit = step(self._visit)
            self._turn += 1
            return self._turn

    def begin(self) -> int | None:
        """The turn to answer; None where that has begun already."""
        with self._lock:
            if self._begun == self._turn:
                return None
            self._begun = self._turn
            return self._turn

    def wants(self, turn: int) -> bool:
        """Whether the answer of that turn is still waited for."""
        return self._turn == turn

    def end(self, turn: int, found: Visit | None = None) -> bool:
        """Note what came of a turn, or that nothing did; False, and nothing noted, where it is not waited for."""
        with self._lock:
            if self._turn != turn:
                return False
            if found is not None:
                self._visit = replace(self._visit, outcome=found.outcome, known=found.known)
            self._ended = turn
            return True
