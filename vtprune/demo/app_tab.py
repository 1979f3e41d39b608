"""A tab of the page: its components, and what follows from what."""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.demo import asking, page
from vtprune.demo.asking import PLACES, Wish
from vtprune.demo.drawing import board
from vtprune.demo.export import to_html, to_png
from vtprune.demo.hosting import Answering
from vtprune.demo.panes import VIEWS, Outcome, Pane
from vtprune.demo.session import Visit
from vtprune.errors import VtpruneError
from vtprune.types import Modality

logger = logging.getLogger("vtprune")
_FIRST, _SECOND, _KEEP = "vtprune", "divprune", 0.25


@contextmanager
def _telling() -> Iterator[None]:
    """What goes wrong in a step, in a sentence on the page; the page goes on."""
    try:
        yield
    except VtpruneError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error
    except Exception as error:  # no trace of it belongs on the page
        logger.exception("a step of the demo failed")
        raise gr.Error("this went wrong; the terminal says how", duration=None, print_exception=False) from error


def _told(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, with its errors on the page."""

    @functools.wraps(step)
    def call(*given: Any) -> Any:
        with _telling():
            return step(*given)

    return call


def _told_on_the_way(steps: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same of several steps."""

    @functools.wraps(steps)
    def call(*given: Any) -> Iterator[Any]:
        with _telling():
            yield from steps(*given)

    return call


@dataclass(kw_only=True)
class _Side:
    """The components of a pane."""

    head: gr.HTML
    picture: gr.Image
    numbers: gr.HTML


class Tab:
    """A tab: a picture, a question, two methods and chance beside them."""

    def __init__(self, host: Answering) -> None:
        self._host = host
        self._saved = _Saved()
        kind: Modality = "video" if host.takes_clips else "image"
        self._choices = host.methods(kind)

    def lay_out(self) -> None:
        """Make the components, and say what follows from what."""
        self._visit = gr.State(Visit())
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
            self._png = gr.DownloadButton("Save a picture (PNG)", interactive=False)
            self._html = gr.DownloadButton("Save a page (HTML)", interactive=False)
        with gr.Accordion("What the methods do", open=False):
            gr.HTML(page.methods_html(self._choices))
        self._connect()

    def _lay_out_sources(self) -> None:
        names = [one.name for one in self._host.examples()]
        self._example = gr.Dropdown(names, value=None, label="an example")
        with gr.Tabs():
            with gr.Tab("a file"):
                kinds = "a picture or a clip" if self._host.takes_clips else "a picture"
                self._file = gr.File(label=kinds, file_count="single", type="filepath", height=110)
            with gr.Tab("the camera"):
                self._camera = gr.Image(sources=["webcam"], type="pil", label="the camera")
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

    def _lay_out_side(self, place: str) -> _Side:
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
            return _Side(head=head, picture=picture, numbers=gr.HTML())

    def _connect(self) -> None:
        shown = [self._visit, self._question, self._board, self._frame, self._count, self._first, self._second]
        shown += [*self._of_panes(), self._overlaps, self._png, self._html]
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        chosen = [self._first, self._second, self._keep]
        self._example.input(self._take_example, [self._example, *chosen], shown)
        self._file.upload(self._take, [self._file, self._question, *chosen], shown)
        self._camera.change(self._take_shot, [self._camera, self._question, *chosen], shown)
        self._keep.change(self._recount, [self._visit, self._keep], [self._count], **quiet)
        wish = [self._question, self._first, self._second, self._keep, self._seed, self._debias, self._view]
        answered = [self._visit, self._board, self._count, *self._of_panes(), self._overlaps, self._png, self._html]
        asked: Any = {"inputs": [self._visit, *wish, self._frame], "outputs": answered}
        self._ask.click(self._answer, **asked)
        self._question.submit(self._answer, **asked)
        marked = [self._visit, self._board]
        self._board.select(self._click, [self._visit, self._to, self._frame], marked).success(self._answer, **asked)
        self._free.click(self._let_go, [self._visit, self._frame], marked).success(self._answer, **asked)
        self._frame.change(self._turn, [self._visit, self._frame], [self._board], **quiet)
        self._view.change(self._look, [self._visit, self._view], self._of_panes(), **quiet)

    def _of_panes(self) -> list[Any]:
        sides = [part for side in self._sides.values() for part in (side.head, side.picture, side.numbers)]
        return [self._unpruned, *sides]

    @_told
    def _take_example(self, name: str, first: str, second: str, keep: float) -> list[Any]:
        visit, question = asking.example(self._host, name)
        return self._beginning(visit, question, first, second, keep)

    @_told
    def _take(self, source: Any, question: str, first: str, second: str, keep: float) -> list[Any]:
        return self._beginning(asking.brought(self._host, source), question, first, second, keep)

    @_told
    def _take_shot(self, shot: Any, *rest: Any) -> Any:
        """A picture of the camera; nothing where one was thrown away."""
        return gr.skip() if shot is None else self._take(shot, *rest)

    def _beginning(self, visit: Visit, question: str, first: str, second: str, keep: float) -> list[Any]:
        """A new picture, and nothing known of it."""
        media = visit.media
        assert media is not None
        names = asking.served(self._host.methods(media.kind))
        frame = gr.Slider(0, max(1, len(media.pictures) - 1), value=0, visible=len(media.pictures) > 1)
        methods = [gr.Dropdown(names, value=_among(names, chosen)) for chosen in (first, second)]
        count = page.count_html(*visit.tokens(float(keep)), notes=media.notes)
        files = [gr.DownloadButton(interactive=False)] * 2
        begun = [visit, question, board(media), frame, count, *methods]
        return [*begun, *self._drawn({}, "kept"), "", *files]

    @_told
    def _recount(self, visit: Visit, keep: float) -> Any:
        return gr.skip() if visit.media is None else page.count_html(*visit.tokens(float(keep)))

    @_told_on_the_way
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
        frame: int,
    ) -> Iterator[list[Any]]:
        wish = Wish(question=question or "", first=first, second=second, keep=keep, seed=seed or 0, debias=debias)
        for step in asking.answered(self._host, visit, wish):
            yield self._after(step, view, int(frame), float(keep))

    def _after(self, step: asking.Step, view: str, frame: int, keep: float) -> list[Any]:
        panes = self._drawn(step.panes, view, others=gr.skip())
        if step.visit is None:
            return [gr.skip(), gr.skip(), gr.skip(), *panes, gr.skip(), gr.skip(), gr.skip()]
        visit, outcome = step.visit, step.visit.outcome
        assert outcome is not None
        files = [gr.DownloadButton(value=str(path), interactive=True) for path in self._saved.save(outcome)]
        count = page.count_html(*visit.tokens(keep))
        return [visit, _board_of(visit, frame), count, *panes, page.overlaps_html(outcome), *files]

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

    @_told
    def _click(self, visit: Visit, to: Any, frame: int, where: gr.SelectData) -> list[Any]:
        x, y = where.index
        clicked = visit.clicked(x + 0.5, y + 0.5, to=to, frame=int(frame))
        return [clicked, _board_of(clicked, int(frame))]

    @_told
    def _let_go(self, visit: Visit, frame: int) -> list[Any]:
        freed = visit.freed()
        return [freed, _board_of(freed, int(frame))]

    @_told
    def _turn(self, visit: Visit, frame: int) -> Any:
        return _board_of(visit, int(frame))

    @_told
    def _look(self, visit: Visit, view: str) -> list[Any]:
        return self._drawn(asking.panes_of(visit), view)


def _among(names: list[str], wanted: str) -> str:
    return wanted if wanted in names else names[0]


def _board_of(visit: Visit, frame: int) -> Any:
    """The picture to click on, with what is forced."""
    if visit.media is None:
        return None
    return board(visit.media, visit.outcome, forced_in=visit.forced_in, forced_out=visit.forced_out, frame=frame)


class _Saved:
    """The last outcomes as files, in a folder that goes with the page; gradio copies what it serves."""

    def __init__(self, most: int = 16) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vtprune-demo-")
        self._most = most
        self._last: deque[Path] = deque()
        self._lock = threading.Lock()

    def save(self, outcome: Outcome) -> tuple[Path, Path]:
        """A picture and a page."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        with self._lock:
            self._last.append(folder)
            if len(self._last) > self._most:
                shutil.rmtree(self._last.popleft())
        picture, whole = folder / "kept.png", folder / "kept.html"
        picture.write_bytes(to_png(outcome))
        whole.write_text(to_html(outcome), encoding="utf-8")
        return picture, whole
