"""The demo in a real browser, Debian's chromium without a window: for its benchmark, its pictures and its tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from vtprune.demo.app import serve
from vtprune.demo.hosting import Answering

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_ABOUT = """() => {
    const open = [...document.querySelectorAll(".vtp-shown")].find(one => one.offsetParent)
    return open ? {...open.dataset} : {}
}"""
"""What the open tab is about: the name of the picture, and the number of the answer."""
WAIT = 60_000
"""Milliseconds after which something on the page is missed."""


def browser() -> str | None:
    """Where chromium is; None where it is not installed (apt-get install chromium)."""
    return shutil.which("chromium")


@contextmanager
def served(hosts: Sequence[tuple[str, Answering]]) -> Iterator[str]:
    """The address of the demo, while it is served."""
    address, blocks = serve(hosts)
    try:
        yield address
    finally:
        blocks.close()


@contextmanager
def launched() -> Iterator[Browser]:
    """The browser, for any number of pages."""
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser(), args=list(FLAGS))
        yield chromium
        chromium.close()


def visit(chromium: Browser, address: str, *, width: int = 1400, height: int = 1300) -> Page:
    """A page that shows the demo; `page.asked` lists the addresses of all requests."""
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(WAIT)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    opened(page)
    return page


@contextmanager
def visited(address: str, *, width: int = 1400, height: int = 1300) -> Iterator[Page]:
    """The same in a browser of its own."""
    with launched() as chromium:
        yield visit(chromium, address, width=width, height=height)


def opened(page: Page) -> None:
    """Wait until the first example is there, with the answers of a bundled model, which come by themselves."""
    page.locator(".vtp-board img:visible").wait_for()
    if page.get_by_label("question").is_visible():
        page.locator("#overlaps:visible").wait_for()


def take_example(page: Page, name: str) -> None:
    """Choose an example, and wait until it is there; the first is chosen when the page is opened."""
    page.wait_for_function(f"() => ({_ABOUT})().media")
    if page.evaluate(_ABOUT)["media"] == name:
        return
    page.get_by_role("tab", name="examples").locator("visible=true").click()
    page.get_by_label("an example").locator("visible=true").click()
    page.get_by_role("option", name=name, exact=True).locator("visible=true").click()
    wait_for_media(page, name)


def wait_for_media(page: Page, name: str) -> None:
    """Wait until a picture or clip is shown."""
    page.wait_for_function(f"name => ({_ABOUT})().media == name", arg=name)
    page.locator(".vtp-board img:visible").wait_for()


def upload(page: Page, path: str) -> None:
    """Bring a file."""
    page.get_by_role("tab", name="a file").locator("visible=true").click()
    page.locator("input[type=file]").first.set_input_files(path)


def compare(page: Page) -> None:
    """Press the button, and wait for all panes of the answer."""
    before = turn_of(page)
    page.locator(".vtp-ask:visible").click()
    wait_for_turn(page, before + 1)


def turn_of(page: Page) -> int:
    """The number of the last thing that was shown or answered."""
    return int(page.evaluate(_ABOUT)["turn"])


def wait_for_turn(page: Page, turn: int) -> None:
    """Wait until all panes of an answer are there, or of a later one."""
    page.wait_for_function(
        "turn => [...document.querySelectorAll('#overlaps')].some(one => one.offsetParent && one.dataset.turn >= turn)",
        arg=turn,
    )
