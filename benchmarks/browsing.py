"""The demo in a real browser, Debian's chromium without a window: for its benchmark, its pictures and its tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

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
def visited(address: str, *, width: int = 1400, height: int = 1300) -> Iterator[Page]:
    """A page that shows the demo; `page.asked` lists the addresses of all requests."""
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser(), args=list(FLAGS))
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(WAIT)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        page.locator(".vtp-ask").first.wait_for()
        yield page
        chromium.close()


def take_example(page: Page, name: str) -> None:
    """Choose an example, and wait until it is there."""
    page.get_by_label("an example").locator("visible=true").click()
    page.get_by_role("option", name=name, exact=True).locator("visible=true").click()
    page.locator(".vtp-board img:visible").wait_for()


def compare(page: Page) -> None:
    """Press the button, and wait for the last pane."""
    page.locator(".vtp-ask:visible").click()
    wait_for_panes(page)


def wait_for_panes(page: Page) -> None:
    """Wait until all panes are there, and the files to save, which come last."""
    page.locator(".vtp-random img:visible").wait_for()
    page.wait_for_function("() => !document.querySelector('.generating, .pending')")
    page.locator("#overlaps:visible").wait_for()
    page.wait_for_timeout(500)
