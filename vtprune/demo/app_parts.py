"""What the tabs of the page are made of: errors in sentences, files that stay on this machine, outcomes as files."""

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
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.demo.export import to_html, to_png
from vtprune.demo.panes import Outcome
from vtprune.errors import VtpruneError

logger = logging.getLogger("vtprune")


@contextmanager
def telling() -> Iterator[None]:
    """What goes wrong in a step, in a sentence on the page; the page goes on."""
    try:
        yield
    except gr.Error:  # told already
        raise
    except VtpruneError as error:
        raise gr.Error(escape(str(error)), duration=None, print_exception=False) from error
    except Exception as error:  # no trace of it belongs on the page
        logger.exception("a step of the demo failed")
        raise gr.Error("this went wrong; the terminal says how", duration=None, print_exception=False) from error


def told(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, with its errors on the page."""

    @functools.wraps(step)
    def call(*given: Any) -> Any:
        with telling():
            return step(*given)

    return call


def told_on_the_way(steps: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same of several steps."""

    @functools.wraps(steps)
    def call(*given: Any) -> Iterator[Any]:
        with telling():
            yield from steps(*given)

    return call


@dataclass(kw_only=True)
class Side:
    """The components of a pane."""

    head: gr.HTML
    picture: gr.Image
    numbers: gr.HTML


def uploads_only(component: Any) -> Any:
    """A component that takes no addresses: gradio would fetch what a request names by one."""
    move = component.async_move_resource_to_block_cache

    async def checked(path: str | Path | None) -> Any:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("only uploaded files are taken", print_exception=False)
        return await move(path)

    component.async_move_resource_to_block_cache = checked
    return component


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
