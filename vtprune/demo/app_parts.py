"""What the tabs of the page are made of: components, errors in sentences, outcomes as files."""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.demo import page
from vtprune.demo.asking import PLACES
from vtprune.demo.choices import Choice
from vtprune.demo.export import to_html, to_png
from vtprune.demo.hosting import Answering
from vtprune.demo.panes import Outcome, Pane
from vtprune.errors import VtpruneError

logger = logging.getLogger("vtprune")
METHODS, KEEP = ("vtprune", "divprune"), 0.25
"""What a page begins with."""


def sentence_of(error: Exception) -> str:
    """What went wrong, for the page: no trace of it belongs there."""
    if isinstance(error, VtpruneError):
        return str(error)
    logger.error("a step of the demo failed", exc_info=error)
    return "this went wrong; the terminal says how"


def told(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step of a tab, which gives new values of components, with what goes wrong as its message."""

    @functools.wraps(step)
    def call(tab: Any, *given: Any) -> Any:
        try:
            return step(tab, *given) or gr.skip()
        except Exception as error:  # every kind of it is told
            return {tab.message: page.message_html(sentence_of(error))}

    return call


def told_on_the_way(steps: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same of several steps."""

    @functools.wraps(steps)
    def call(tab: Any, *given: Any) -> Iterator[Any]:
        try:
            yield from steps(tab, *given)
        except Exception as error:  # every kind of it is told
            yield {tab.message: page.message_html(sentence_of(error))}

    return call


def uploads_only(component: Any) -> Any:
    """A component that takes no addresses: gradio would fetch what a request names by one."""
    move = component.async_move_resource_to_block_cache

    async def checked(path: str | Path | None) -> Any:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("only uploaded files are taken", print_exception=False)
        return await move(path)

    component.async_move_resource_to_block_cache = checked
    return component


@dataclass(kw_only=True)
class Fields:
    """What a visitor fills in and clicks on, and what is told beside it."""

    board: gr.Image
    to: gr.Radio
    free: gr.Button
    frame: gr.Slider
    example: gr.Dropdown
    file: gr.File
    camera: gr.Image
    question: gr.Textbox
    first: gr.Dropdown
    second: gr.Dropdown
    slider: gr.Slider
    keep: gr.Number
    count: gr.HTML
    seed: gr.Number
    debias: gr.Checkbox
    ask: gr.Button
    message: gr.HTML
    answers: gr.HTML

    @classmethod
    def laid_out(cls, host: Answering, choices: Sequence[Choice]) -> Fields:
        """Beside each other: the picture and where it is from, and what is asked of it with the answers."""
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                left = {**_board(), **_sources(host)}
            with gr.Column(scale=3, min_width=320):
                return cls(**left, **_wish(host, choices))


def _board() -> dict[str, Any]:
    board = gr.Image(
        show_label=False, type="pil", format="png", interactive=False, elem_classes=["vtp-board"], buttons=[]
    )
    frame = gr.Slider(0, 1, value=0, step=1, label="frame", visible=False)
    with gr.Row(equal_height=False):
        to = gr.Radio(
            [("keep it", "in"), ("drop it", "out")], value="in", label="click on a patch of the picture to", scale=2
        )
        free = gr.Button("let all go", size="sm", min_width=90, interactive=False)
    return {"board": board, "frame": frame, "to": to, "free": free}


def _sources(host: Answering) -> dict[str, Any]:
    names = [one.name for one in host.examples()]
    kinds = "a picture or a clip of your own" if host.takes_clips else "a picture of your own"
    with gr.Tabs():
        with gr.Tab("examples"):
            example = gr.Dropdown(names, value=None, label="an example")
        with gr.Tab("a file"):
            file = uploads_only(gr.File(label=kinds, file_count="single", type="filepath", height=150))
        with gr.Tab("the camera"):
            camera = uploads_only(gr.Image(sources=["webcam"], type="pil", label="the camera"))
    return {"example": example, "file": file, "camera": camera}


def _wish(host: Answering, choices: Sequence[Choice]) -> dict[str, Any]:
    names = [name for _, name in page.labels(choices)]
    question = gr.Textbox(label="question", lines=1, visible=host.takes_questions, max_length=4000)
    with gr.Row():
        first, second = (
            gr.Dropdown(page.labels(choices), value=wanted if wanted in names else names[0], label=label)
            for wanted, label in zip(METHODS, ("method", "beside it"), strict=True)
        )
    with gr.Row():
        slider = gr.Slider(
            0.01,
            1.0,
            value=KEEP,
            step=0.01,
            label="keep",
            buttons=[],
            elem_classes=["vtp-keep"],
            scale=3,
            min_width=180,
        )
        keep = gr.Number(KEEP, label="a share, or a number of tokens", min_width=150)
    count = gr.HTML(page.count_html(0, 0))
    with gr.Accordion("more", open=False), gr.Row():
        seed = gr.Number(0, label="seed of random", precision=0)
        debias = gr.Checkbox(False, label="take recency off attention where a method goes by any")
    ask = gr.Button("Compare", variant="primary", elem_classes=["vtp-ask"])
    message = gr.HTML()
    answers = gr.HTML()
    found = {"question": question, "first": first, "second": second, "slider": slider, "keep": keep, "count": count}
    return {**found, "seed": seed, "debias": debias, "ask": ask, "message": message, "answers": answers}


@dataclass(kw_only=True)
class Showing:
    """What is shown of an answer: what it is to, a picture of each method, and the numbers of all."""

    asked: gr.HTML
    view: gr.Radio
    sides: dict[str, tuple[gr.HTML, gr.Image, gr.HTML]]
    numbers: gr.HTML

    @classmethod
    def laid_out(cls) -> Showing:
        """One below the other, methods beside each other."""
        asked = gr.HTML()
        view = gr.Radio(page.views("image"), value="kept", label="show")
        with gr.Row():
            sides = {place: _side(place) for place in PLACES}
        return cls(asked=asked, view=view, sides=sides, numbers=gr.HTML())

    @property
    def components(self) -> list[Any]:
        """All that an answer changes, but for what it is to."""
        return [*(part for side in self.sides.values() for part in side), self.numbers]

    def shown(self, panes: dict[str, Pane], view: str, outcome: Outcome | None, turn: int = 0) -> dict[Any, Any]:
        """The panes that are there so far; with the whole `outcome` overlaps too."""
        found: dict[Any, Any] = {self.numbers: page.numbers_html(panes, outcome, turn)}
        for place, (head, picture, legend) in self.sides.items():
            pane = panes.get(place)
            drawn = None if pane is None else pane.pictures.get(view)
            found |= {head: page.head_html(pane, place), picture: drawn, legend: page.legend_html(pane, view)}
        return found


def _side(place: str) -> tuple[gr.HTML, gr.Image, gr.HTML]:
    with gr.Column(min_width=280, elem_classes=[f"vtp-{place}"]):
        head = gr.HTML(page.head_html(None, place), elem_classes=["vtp-head"])
        picture = gr.Image(show_label=False, type="pil", format="png", interactive=False, buttons=["fullscreen"])
        return head, picture, gr.HTML()


class Saved:
    """The last outcomes as files, in a folder that goes with the page; gradio copies what it serves."""

    def __init__(self, most: int = 16) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vtprune-demo-")
        self._most = most
        self._last: deque[Path] = deque()
        self._lock = threading.Lock()

    def picture(self, outcome: Outcome) -> Path:
        """A contact sheet."""
        return self._written("kept.png", to_png(outcome))

    def page(self, outcome: Outcome) -> Path:
        """A page of its own."""
        return self._written("kept.html", to_html(outcome).encode())

    def _written(self, name: str, content: bytes) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        with self._lock:
            self._last.append(folder)
            if len(self._last) > self._most:
                shutil.rmtree(self._last.popleft())
        (folder / name).write_bytes(content)
        return folder / name
