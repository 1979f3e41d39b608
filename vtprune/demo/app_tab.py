"""A tab of the page: its components, and what follows from what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.demo import asking, page
from vtprune.demo.app_parts import Saved, Side, told, told_on_the_way, uploads_only
from vtprune.demo.asking import PLACES, Wish
from vtprune.demo.drawing import board
from vtprune.demo.hosting import Answering
from vtprune.demo.panes import VIEWS, Outcome, Pane
from vtprune.demo.visiting import Visit
from vtprune.errors import InvalidOption
from vtprune.types import Modality

_STALE = 3600
"""Seconds that what a visitor did is remembered."""
_TAKE = """(file) => {
    const link = document.createElement("a")
    link.href = file.url
    link.download = file.orig_name
    link.click()
}"""
"""Has the browser save a file that gradio serves."""
_FIRST, _SECOND, _KEEP = "vtprune", "divprune", 0.25


class Tab:
    """A tab: a picture, a question, two methods and chance beside them."""

    def __init__(self, host: Answering) -> None:
        self._host = host
        self._saved = Saved()
        kind: Modality = "video" if host.takes_clips else "image"
        self._choices = host.methods(kind)

    def lay_out(self) -> None:
        """Make the components, and say what follows from what."""
        self._visit = gr.State(Visit(), time_to_live=_STALE)
        self._turn = gr.State(0)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._lay_out_sources()
            with gr.Column(scale=3, min_width=320):
                self._lay_out_wish()
        self._view = gr.Radio([(text, name) for name, text in VIEWS.items()], value="kept", label="show")
        with gr.Row():
            self._sides = {place: self._lay_out_side(place) for place in PLACES}
        self._overlaps = gr.HTML()
        with gr.Row():
            for text, write in (
                ("Save a picture (PNG)", self._saved.picture),
                ("Save a page (HTML)", self._saved.page),
            ):
                self._lay_out_save(text, write)
        with gr.Accordion("What the methods do", open=False):
            self._list = gr.HTML(page.methods_html(self._choices))
        self._connect()

    def _lay_out_sources(self) -> None:
        names = [one.name for one in self._host.examples()]
        self._example = gr.Dropdown(names, value=None, label="an example")
        with gr.Tabs():
            with gr.Tab("a file"):
                kinds = "a picture or a clip" if self._host.takes_clips else "a picture"
                self._file = uploads_only(gr.File(label=kinds, file_count="single", type="filepath", height=110))
            with gr.Tab("the camera"):
                self._camera = uploads_only(gr.Image(sources=["webcam"], type="pil", label="the camera"))
        self._board = gr.Image(
            show_label=False,
            type="pil",
            format="png",
            interactive=False,
            elem_classes=["vtp-picture", "vtp-board"],
            buttons=[],
        )
        with gr.Row(equal_height=True):
            self._to = gr.Radio(["in", "out"], value="in", label="after an answer, a click on a patch forces it")
            self._free = gr.Button("let all go", size="sm", min_width=90)
        self._frame = gr.Slider(0, 1, value=0, step=1, label="frame", visible=False)

    def _lay_out_wish(self) -> None:
        names = asking.served(self._choices)
        self._question = gr.Textbox(label="question", lines=2, visible=self._host.takes_questions, max_length=4000)
        with gr.Row():
            self._first = gr.Dropdown(names, value=_among(names, _FIRST), label="method")
            self._second = gr.Dropdown(names, value=_among(names, _SECOND), label="beside it")
        self._keep = gr.Slider(0.01, 1.0, value=_KEEP, step=0.01, label="keep", info="share of the visual tokens")
        self._count = gr.HTML(page.count_html(0, 0))
        with gr.Row():
            self._seed = gr.Number(0, label="seed of random", precision=0, minimum=0)
            self._debias = gr.Checkbox(False, label="debias attention")
        self._ask = gr.Button("Compare", variant="primary", elem_classes=["vtp-ask"])
        self._unpruned = gr.HTML()

    def _lay_out_side(self, place: str) -> Side:
        with gr.Column(min_width=280, elem_classes=[f"vtp-{place}"]):
            head = gr.HTML(page.head_html(None, place), elem_classes=["vtp-head"])
            classes = ["vtp-picture"]
            picture = gr.Image(
                show_label=False,
                type="pil",
                format="png",
                interactive=False,
                elem_classes=classes,
                buttons=["fullscreen"],
            )
            return Side(head=head, picture=picture, numbers=gr.HTML())

    def _lay_out_save(self, text: str, write: Callable[[Outcome], Path]) -> None:
        """A button that has a file written and then takes it, so that nothing is written that nobody wants."""
        button = gr.Button(text)
        file = gr.File(visible=False)

        @told
        def save(visit: Visit) -> str:
            if visit.outcome is None:
                raise InvalidOption("there is nothing to save yet: compare first")
            return str(write(visit.outcome))

        button.click(save, [self._visit], [file]).success(None, [file], None, js=_TAKE)

    def _connect(self) -> None:
        """An answer begins when the turn changes. Whatever else is done to the visit ends one that is under way, which
        would bring back the visit it began with."""
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        wish = [self._question, self._first, self._second, self._keep, self._seed, self._debias, self._view]
        panes = self._of_panes()
        answering = self._turn.change(
            self._answer, [self._visit, *wish], [self._visit, self._count, *panes], trigger_mode="multiple"
        )
        looked = answering.then(
            self._look,
            [self._visit, self._view, self._frame, self._turn],
            [self._board, self._overlaps, *panes],
            **quiet,
        )
        ends: dict[str, Any] = {"cancels": [answering, looked]}
        chosen = [self._first, self._second, self._keep]
        shown = [
            self._visit,
            self._question,
            self._board,
            self._frame,
            self._count,
            self._first,
            self._second,
            self._list,
        ]
        shown += [*panes, self._overlaps]
        self._example.input(self._take_example, [self._example, *chosen], shown, **ends)
        self._file.upload(self._take, [self._file, self._question, *chosen], shown, **ends)
        self._camera.change(self._take_shot, [self._camera, self._question, *chosen], shown, **ends)
        for asked in (self._ask.click, self._question.submit):
            asked(self._begin, [self._turn], [self._turn], **ends, **quiet)
        marked = [self._visit, self._board, self._turn]
        # Each click begins with what the one before left.
        one_by_one: dict[str, Any] = {
            "trigger_mode": "multiple",
            "concurrency_limit": 1,
            "concurrency_id": str(id(self)),
        }
        self._board.select(self._click, [self._visit, self._to, self._frame, self._turn], marked, **one_by_one, **ends)
        self._free.click(self._let_go, [self._visit, self._frame, self._turn], marked, **one_by_one, **ends)
        self._keep.change(self._recount, [self._visit, self._keep], [self._count], **quiet)
        self._frame.change(self._leaf, [self._visit, self._frame], [self._board], **quiet)
        self._view.change(self._show, [self._visit, self._view], panes, **quiet)

    def _of_panes(self) -> list[Any]:
        sides = [part for side in self._sides.values() for part in (side.head, side.picture, side.numbers)]
        return [self._unpruned, *sides]

    @told
    def _take_example(self, name: str, first: str, second: str, keep: float) -> list[Any]:
        visit, question = asking.example(self._host, name)
        return self._beginning(visit, question, first, second, keep)

    @told
    def _take(self, source: Any, question: str, first: str, second: str, keep: float) -> list[Any]:
        return self._beginning(asking.brought(self._host, source), question, first, second, keep)

    @told
    def _take_shot(self, shot: Any, *rest: Any) -> Any:
        """A picture of the camera; nothing where one was thrown away."""
        return gr.skip() if shot is None else self._take(shot, *rest)

    def _beginning(self, visit: Visit, question: str, first: str, second: str, keep: float) -> list[Any]:
        """A new picture, and nothing known of it."""
        media = visit.media
        assert media is not None
        choices = self._host.methods(media.kind)
        names = asking.served(choices)
        frame = gr.Slider(0, max(1, len(media.pictures) - 1), value=0, visible=len(media.pictures) > 1)
        for gone in {first, second} - {*names}:
            gr.Warning(escape(f"{gone} cannot be asked about this: {names[0]} takes its place"))
        methods = [gr.Dropdown(names, value=_among(names, own)) for own in (first, second)]
        begun = [visit, question, board(media), frame, _count_of(visit, keep), *methods, page.methods_html(choices)]
        return [*begun, *self._drawn({}, "kept"), ""]

    @told
    def _recount(self, visit: Visit, keep: float) -> Any:
        return gr.skip() if visit.media is None else _count_of(visit, keep)

    @told
    def _begin(self, turn: int) -> int:
        return turn + 1

    @told_on_the_way
    def _answer(
        self,
        visit: Visit,
        question: str,
        first: str,
        second: str,
        keep: float,
        seed: int | None,
        debias: bool,
        view: str,
    ) -> Iterator[list[Any]]:
        wish = Wish(question=question or "", first=first, second=second, keep=keep, seed=seed or 0, debias=debias)
        for step in asking.answered(self._host, visit, wish):
            panes = self._drawn(step.panes, view, others=gr.skip())
            if step.visit is None:
                yield [gr.skip(), gr.skip(), *panes]
            else:
                yield [step.visit, _count_of(step.visit, keep), *panes]

    @told
    def _look(self, visit: Visit, view: str, frame: int, turn: int) -> list[Any]:
        """All of an outcome at once: what was looked at may have changed while it came."""
        if visit.outcome is None:
            return [gr.skip()] * (2 + len(self._of_panes()))
        panes = self._drawn(asking.panes_of(visit), view)
        return [_board_of(visit, int(frame)), page.overlaps_html(visit.outcome, turn), *panes]

    @told
    def _show(self, visit: Visit, view: str) -> list[Any]:
        if visit.outcome is None:
            return [gr.skip()] * len(self._of_panes())
        return self._drawn(asking.panes_of(visit), view)

    def _drawn(self, panes: dict[str, Pane], view: str, *, others: Any = None) -> list[Any]:
        """What panes show; `others` instead of those that are not there, by default nothing."""
        unpruned = panes.get("unpruned")
        found = [others if unpruned is None and others is not None else page.unpruned_html(unpruned)]
        for place in PLACES:
            pane = panes.get(place)
            if pane is None and others is not None:
                found += [others] * 3
                continue
            picture = None if pane is None else pane.pictures.get(view)
            found += [page.head_html(pane, place), picture, page.numbers_html(pane, view)]
        return found

    @told
    def _click(self, visit: Visit, to: Any, frame: int, turn: int, where: gr.SelectData) -> list[Any]:
        x, y = where.index
        clicked = visit.clicked(x + 0.5, y + 0.5, to=to, frame=int(frame))
        return [clicked, _board_of(clicked, int(frame)), turn + 1]

    @told
    def _let_go(self, visit: Visit, frame: int, turn: int) -> list[Any]:
        freed = visit.freed()
        again = turn if visit.outcome is None else turn + 1
        return [freed, _board_of(freed, int(frame)), again]

    @told
    def _leaf(self, visit: Visit, frame: int) -> Any:
        return _board_of(visit, int(frame))


def _among(names: list[str], wanted: str) -> str:
    return wanted if wanted in names else names[0]


def _count_of(visit: Visit, keep: float) -> str:
    notes = () if visit.media is None else visit.media.notes
    return page.count_html(*visit.tokens(float(keep)), about=visit.known is None, notes=notes)


def _board_of(visit: Visit, frame: int) -> Any:
    """The picture to click on, with what is forced."""
    if visit.media is None:
        return None
    return board(visit.media, visit.known, forced_in=visit.forced_in, forced_out=visit.forced_out, frame=frame)
