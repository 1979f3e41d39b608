"""Where a visitor sits: steps from several threads, and answers that come late."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest

import vtprune
from tests.demo.common import host, picture
from vtprune.demo import asking, session
from vtprune.demo.asking import Wish, answered
from vtprune.demo.hosting import Unwanted
from vtprune.demo.seat import Seat
from vtprune.demo.session import Host
from vtprune.demo.visiting import Visit
from vtprune.errors import InvalidOption
from vtprune.tiny import QUESTION

WISH = Wish(question=QUESTION, first="vtprune", second="divprune", keep=0.25)


def seated() -> Seat:
    seat = Seat()
    seat.show(Visit().showing(picture(), host()))
    return seat


def forcing(token: int) -> Any:
    return lambda visit: replace(visit, forced_in=visit.forced_in | {token})


def test_steps_from_several_threads_are_all_kept() -> None:
    seat = seated()
    threads = [threading.Thread(target=seat.ask, args=(forcing(token),)) for token in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seat.visit.forced_in == frozenset(range(50)) and seat.turn == 51


def test_a_step_that_fails_changes_nothing() -> None:
    seat = seated()
    turn = seat.ask()
    with pytest.raises(InvalidOption):
        seat.ask(lambda visit: visit.clicked(1, 1, to="in"))
    assert seat.turn == turn and seat.waiting and seat.wants(turn)


def test_only_the_answer_that_is_waited_for_is_noted() -> None:
    seat = seated()
    turn, visit = seat.ask(), seat.visit
    assert seat.begin() == turn and seat.begin() is None
    seat.ask(forcing(3))
    assert not seat.end(turn, visit) and seat.waiting
    later = seat.begin()
    assert later is not None and seat.end(later, visit.asked(host(), QUESTION)) and not seat.waiting
    assert seat.visit.outcome is not None and seat.visit.forced_in == {3}
    seat.show(visit)
    assert seat.visit.outcome is None and not seat.waiting and seat.begin() is None


def test_every_visitor_has_a_seat_of_their_own() -> None:
    seat = seated()
    other = copy.deepcopy(seat)
    assert other.visit.media is None and other.turn == 0
    other.ask(forcing(1))
    assert seat.visit.forced_in == frozenset()


def test_an_answer_comes_pane_by_pane() -> None:
    seat = seated()
    seat.ask()
    steps = list(answered(host(), seat, WISH))
    assert [list(panes)[-1] for panes in steps] == ["unpruned", "a", "b", "random"]
    assert seat.visit.outcome is not None and not seat.waiting
    assert asking.panes_of(seat.visit) == steps[-1]
    assert list(answered(host(), seat, WISH)) == []


def test_an_answer_that_nobody_waits_for_ends_with_its_pane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presses one after the other do not queue up answers: of each that is given up one pane is computed at most."""
    seat, ran, run = seated(), [], session.run

    def counted(*given: Any, **named: Any) -> Any:
        ran.append(given[4])
        return run(*given, **named)

    monkeypatch.setattr(session, "run", counted)
    for _ in range(3):
        seat.ask()
        next(answered(host(), seat, WISH))
        seat.ask(forcing(7))
        assert list(answered(host(), seat, WISH))[-1]["random"].report is not None
    wait_for_threads()
    assert len(ran) <= 3 * (4 + 2) and seat.visit.outcome is not None
    assert seat.visit.outcome.ask.forced_in == (7,)


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "vtprune-demo":
            thread.join(60)


def test_a_model_is_not_waited_for_by_those_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    own, ran = Host(model=host().model, processor=host().processor, name="x"), []
    monkeypatch.setattr(session, "run", lambda *given, **named: ran.append(1))
    visit = seated().visit
    with pytest.raises(Unwanted):
        visit.asked(own, QUESTION, wanted=lambda: False)
    assert ran == []


def test_what_fails_is_raised_and_the_seat_waits_no_more() -> None:
    seat = seated()
    seat.ask()
    with pytest.raises(InvalidOption, match="the question is empty"):
        list(answered(host(), seat, replace(WISH, question=" ")))
    assert not seat.waiting and seat.visit.outcome is None


@pytest.mark.parametrize(("keep", "budget"), [(0.25, 0.25), (1, 1.0), (1.0, 1.0), (64, 64), (64.0, 64), (2.4, 2)])
def test_keep_is_a_share_up_to_one_and_a_number_above(keep: float, budget: float) -> None:
    wish = Wish.of(QUESTION, "vtprune", "divprune", keep, 0, False)
    assert wish.keep == budget and type(wish.keep) is type(budget)


@pytest.mark.parametrize(
    ("keep", "seed", "text"), [(None, 0, "keep"), (0, 0, "keep"), (-3, 0, "keep"), (1, None, "seed")]
)
def test_empty_fields_are_told(keep: Any, seed: Any, text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        Wish.of(QUESTION, "vtprune", "divprune", keep, seed, False)


def test_the_right_answer_is_known_for_the_question_of_an_example_alone() -> None:
    visit, question = asking.example(host(), "scene 1")
    expected = next(one.answer for one in host().examples() if one.name == "scene 1")
    assert visit.media is not None and visit.media.name == "scene 1" and visit.right is None
    assert visit.asked(host(), question).right == expected
    assert visit.asked(host(), "is there a cross ?").right is None


def test_tokens_are_counted_while_somebody_is_answered() -> None:
    with vtprune.pruning(host().model, "divprune", keep=0.25):
        assert host().count(picture()) == 256
