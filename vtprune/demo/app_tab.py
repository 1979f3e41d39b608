"""A tab of the page: what follows from what a visitor does in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.demo import asking, page
from vtprune.demo.app_parts import Fields, Saved, Showing, sentence_of, told, told_on_the_way
from vtprune.demo.asking import Wish
from vtprune.demo.drawing import board
from vtprune.demo.hosting import Answering
from vtprune.demo.panes import Outcome, Pane
from vtprune.demo.seat import Seat
from vtprune.demo.visiting import Visit
from vtprune.errors import InvalidOption, VtpruneError
from vtprune.types import Modality

_STALE = 12 * 3600
"""Seconds that what a visitor did is remembered."""
_TAKE = """(file) => {
    if (!file) return
    const link = document.createElement("a")
    link.href = file.url
    link.download = file.orig_name
    link.click()
}"""
"""Has the browser save a file that gradio serves."""
Shown = dict[Any, Any]
"""New values of components."""


class Tab:
    """A tab: a picture, a question, two methods and chance beside them."""

    def __init__(self, host: Answering) -> None:
        self._host = host
        self._saved = Saved()
        kind: Modality = "video" if host.takes_clips else "image"
        self._choices = host.methods(kind)

    def lay_out(self, on_open: Callable[..., Any]) -> None:
        """Make the components, and say what follows from what; `on_open` is the event of the tab being looked at."""
        self._seat = gr.State(Seat(), time_to_live=_STALE)
        self._turn = gr.State(0, time_to_live=_STALE)
        gr.HTML(page.model_html(self._host.name, asks=self._host.takes_questions))
        self._at = Fields.laid_out(self._host, self._choices)
        self._out = Showing.laid_out()
        with gr.Row():
            self._lay_out_save("Save a picture (PNG)", self._saved.picture)
            self._lay_out_save("Save a page (HTML)", self._saved.page)
        with gr.Accordion("What the methods do", open=False):
            self._list = gr.HTML(page.methods_html(self._choices))
        self._connect(on_open)

    @property
    def message(self) -> gr.HTML:
        """Where it is told what went wrong."""
        return self._at.message

    def _lay_out_save(self, text: str, write: Callable[[Outcome], Path]) -> None:
        """A button that has a file written and then takes it: nothing is written that nobody wants."""
        button, file = gr.Button(text), gr.File(visible=False)
        written = button.click(functools.partial(self._save, write, file), [self._seat], [file, self.message])
        written.then(None, [file], None, js=_TAKE)

    def _connect(self, on_open: Callable[..., Any]) -> None:
        """A step changes the seat, and with it the turn; a new turn has the question answered."""
        at, seat = self._at, self._seat
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        wish: list[Any] = [at.question, at.first, at.second, at.keep, at.seed, at.debias]
        view = self._out.view
        panes = [*self._out.components, at.answers]
        # A seat that changes goes out again: its time runs from then.
        begun: list[Any] = [seat, at.question, at.board, at.frame, at.free, at.count, at.first, at.second, at.example]
        begun += [at.file, at.message, self._out.asked, view, self._list, *panes]
        chosen = [seat, at.first, at.second, at.keep]
        # Files may be large: few are read at once.
        reading: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "reading"}
        on_open(self._open, chosen, [*begun, self._turn], **quiet)
        at.example.input(self._take_example, [at.example, *chosen], begun)
        at.file.upload(self._take, [at.file, *chosen], begun, **reading)
        at.camera.change(self._take_shot, [at.camera, *chosen], begun, **reading)
        steps: dict[str, Any] = {"trigger_mode": "multiple", **quiet}
        for asked in (at.ask.click, at.question.submit):
            asked(self._begin, [seat, *wish], [seat, self._turn, at.message], **steps)
        marked = [seat, at.board, at.free, self._turn, at.message]
        # One by one: what comes last on the page is what was clicked on last.
        one_by_one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": f"marks of {id(self)}"}
        at.board.select(self._click, [seat, at.to, at.frame], marked, **steps, **one_by_one)
        at.free.click(self._let_go, [seat, at.frame], marked, **steps, **one_by_one)
        answering = self._turn.change(
            self._answer,
            [seat, *wish, view],
            [*panes, self._out.asked, at.message],
            trigger_mode="multiple",
            show_progress_on=at.answers,
        )
        told = [at.board, at.count, self._out.asked, at.message]
        answering.then(self._look, [seat, view, at.frame, *wish], [*told, *panes], **quiet)
        at.slider.input(lambda share: share, [at.slider], [at.keep], **quiet)
        at.keep.change(self._recount, [seat, at.keep], [at.count, at.message], **quiet)
        for field in wish:
            field.change(self._compare_wish, [seat, *wish], [self._out.asked, at.message], **quiet)
        at.frame.change(self._leaf, [seat, at.frame], [at.board, at.message], **quiet)
        view.change(self._show, [seat, view], [*panes, at.message], **quiet)

    @told
    def _open(self, seat: Seat, first: str, second: str, keep: float) -> Shown:
        """The first example, unless something is shown already; models that come with vtprune answer at once."""
        if seat.visit.media is not None:
            return {}
        name = self._host.examples()[0].name
        shown = self._begun_with(name, seat, first, second, keep)
        bundled = self._host.name.startswith("tiny:") and self._host.takes_questions
        return {**shown, self._at.example: name, **({self._turn: seat.ask()} if bundled else {})}

    @told
    def _take_example(self, name: str, seat: Seat, *chosen: Any) -> Shown:
        """Once for each choice, though a list tells of one twice."""
        if seat.visit.media is not None and seat.visit.media.name == name:
            return {}
        return self._begun_with(name, seat, *chosen)

    def _begun_with(self, name: str, seat: Seat, *chosen: Any) -> Shown:
        """An example, with its question."""
        visit, asked = asking.example(self._host, name)
        return {**self._begun(seat, visit, *chosen), self._at.question: asked}

    @told
    def _take(self, *given: Any) -> Shown:
        return self._bring(*given)

    def _bring(self, source: Any, seat: Seat, *chosen: Any) -> Shown:
        """What the visitor brought; what was shown before still is where that is nothing."""
        try:
            visit = asking.brought(self._host, source)
        except VtpruneError as error:
            kept = "" if seat.visit.media is None else f" {seat.visit.media.name} is still shown."
            return {self._at.file: None, self._at.message: page.message_html(f"{error}.{kept}")}
        return {**self._begun(seat, visit, *chosen), self._at.example: None}

    @told
    def _take_shot(self, shot: Any, *rest: Any) -> Shown:
        """A picture of the camera; nothing where one was thrown away."""
        return {} if shot is None else self._bring(shot, *rest)

    def _begun(self, seat: Seat, visit: Visit, first: str, second: str, keep: float) -> Shown:
        """A new picture, and nothing known of it; what was entered stays."""
        media, at = visit.media, self._at
        assert media is not None
        choices = self._host.methods(media.kind)
        names = asking.served(choices)
        gone = sorted({first, second} - {*names})
        told = [f"{own} cannot be asked about this: {names[0]} takes its place" for own in gone]
        seat.show(visit)
        several = len(media.pictures) > 1
        offered = page.labels(choices)
        methods = {
            field: gr.Dropdown(offered) if own in names else gr.Dropdown(offered, value=names[0])
            for field, own in ((at.first, first), (at.second, second))
        }
        return {
            **methods,
            **self._out.shown({}, "kept", None),
            self._out.asked: "",
            self._seat: seat,
            at.board: board(media),
            at.free: gr.Button("let all go", interactive=False),
            at.frame: gr.Slider(0, max(1, len(media.pictures) - 1), value=0, visible=several),
            at.count: _count_of(visit, keep),
            self._out.view: gr.Radio(page.views(media.kind), value="kept"),
            at.answers: page.answers_html({}, media.name, seat.turn),
            at.message: page.message_html(" ".join(told)),
            self._list: page.methods_html(choices),
        }

    @told
    def _recount(self, seat: Seat, keep: float) -> Shown:
        if seat.visit.media is None:
            return {}
        return {self._at.count: _count_of(seat.visit, keep), self.message: ""}

    @told
    def _compare_wish(self, seat: Seat, *wish: Any) -> Shown:
        """Whether what is shown is still what is asked for."""
        outcome = seat.visit.outcome
        if outcome is None or seat.waiting:
            return {}
        return {self._out.asked: page.asked_html(outcome, _wish(*wish))}

    @told
    def _begin(self, seat: Seat, *wish: Any) -> Shown:
        if seat.visit.media is None:
            raise InvalidOption("there is no picture: upload one, take one with the camera, or choose an example")
        Wish.of(*wish)
        return {self._seat: seat, self._turn: seat.ask(), self.message: ""}

    @told_on_the_way
    def _answer(self, seat: Seat, *given: Any) -> Iterator[Shown]:
        *entered, view = given
        try:
            wish = Wish.of(*entered)
        except VtpruneError:
            seat.end(seat.turn)
            raise
        for panes in asking.answered(self._host, seat, wish):
            yield {**self._panes(seat, panes, view, None), self._out.asked: ""}
        # What was sent last is sent again at the end, by when something else may be shown.
        yield gr.skip()

    @told
    def _look(self, seat: Seat, view: str, frame: int, *wish: Any) -> Shown:
        """All of an outcome at once: what is looked at may have changed while it came."""
        outcome = seat.visit.outcome
        if outcome is None or seat.waiting:
            return {}
        now = _wish(*wish)
        return {
            **self._panes(seat, asking.panes_of(seat.visit), view, outcome),
            self._out.asked: page.asked_html(outcome, now),
            self._at.board: _board_of(seat.visit, int(frame)),
            **({} if now is None else {self._at.count: _count_of(seat.visit, now.keep)}),
        }

    @told
    def _show(self, seat: Seat, view: str) -> Shown:
        outcome = seat.visit.outcome
        if outcome is None or seat.waiting:
            return {}
        return self._panes(seat, asking.panes_of(seat.visit), view, outcome)

    def _panes(self, seat: Seat, panes: dict[str, Pane], view: str, outcome: Outcome | None) -> Shown:
        """What is there of an answer, the whole `outcome` at the end."""
        media = seat.visit.media
        name = "" if media is None else media.name
        answers = page.answers_html(panes, name, seat.turn, seat.visit.right, whole=outcome)
        return {**self._out.shown(panes, view, outcome, seat.turn), self._at.answers: answers}

    @told
    def _click(self, seat: Seat, to: Any, frame: int, where: gr.SelectData) -> Shown:
        x, y = where.index
        turn = seat.ask(lambda visit: visit.clicked(x + 0.5, y + 0.5, to=to, frame=int(frame)))
        return self._marked(seat, frame, turn)

    @told
    def _let_go(self, seat: Seat, frame: int) -> Shown:
        if not seat.visit.forced:
            return {}
        return self._marked(seat, frame, seat.ask(Visit.freed))

    def _marked(self, seat: Seat, frame: int, turn: int) -> Shown:
        count = seat.visit.forced
        free = gr.Button(f"let all {count} go" if count else "let all go", interactive=count > 0)
        found = {self._seat: seat, self._turn: turn, self.message: ""}
        return {**found, self._at.board: _board_of(seat.visit, int(frame)), self._at.free: free}

    @told
    def _leaf(self, seat: Seat, frame: int) -> Shown:
        return {self._at.board: _board_of(seat.visit, int(frame))}

    def _save(self, write: Callable[[Outcome], Path], file: Any, seat: Seat) -> Shown:
        """The file, or none and why: what was written before is not taken again."""
        try:
            if seat.visit.outcome is None:
                raise InvalidOption("there is nothing to save yet: compare first")
            return {file: str(write(seat.visit.outcome)), self.message: ""}
        except Exception as error:  # every kind of it is told
            return {file: None, self.message: page.message_html(sentence_of(error))}


def _wish(*given: Any) -> Wish | None:
    """What stands in the fields, None where that is nothing to ask by."""
    try:
        return Wish.of(*given)
    except VtpruneError:
        return None


def _count_of(visit: Visit, keep: float | None) -> str:
    notes = () if visit.media is None else visit.media.notes
    return page.count_html(*visit.tokens(asking.budget_of(keep)), about=visit.known is None, notes=notes)


def _board_of(visit: Visit, frame: int) -> Any:
    """The picture to click on, with what is forced."""
    if visit.media is None:
        return None
    return board(visit.media, visit.known, forced_in=visit.forced_in, forced_out=visit.forced_out, frame=frame)
