"""The page in a real browser: what a visitor does, and what the page then says."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vtprune
from vtprune.demo import session
from vtprune.demo.media import examples
from vtprune.demo.seat import Seat
from vtprune.demo.session import Host
from vtprune.types import Budget

pytest.importorskip("gradio")
pytest.importorskip("playwright")
BENCHMARKS = Path(vtprune.__file__).parent.parent / "benchmarks"
TOKENS = 256


@pytest.fixture(scope="module")
def browsing() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setitem(sys.modules, "kernels", None)  # transformers would import the benchmark of that name
        import browsing

    if browsing.browser() is None:
        pytest.skip("there is no chromium")
    return browsing


@pytest.fixture(scope="module")
def address(browsing: Any) -> Iterator[str]:
    from vtprune.demo.photo_host import PhotoHost

    hosts = [("Ask a model", Host.load("tiny:llava", "cpu")), ("Photos", PhotoHost(source="tiny:llava"))]
    with browsing.served(hosts) as address:
        yield address


@pytest.fixture(scope="module")
def chromium(browsing: Any) -> Iterator[Any]:
    with browsing.launched() as chromium:
        yield chromium


@pytest.fixture
def page(browsing: Any, chromium: Any, address: str) -> Iterator[Any]:
    page = browsing.visit(chromium, address)
    yield page
    outside = [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]
    page.close()
    assert not outside, "the page asks other machines"


def text_of(page: Any, place: str) -> str:
    return page.locator(f".vtp-{place}:visible").inner_text()


def shot(page: Any, selector: str) -> Image.Image:
    return Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")


def bright(picture: Image.Image) -> float:
    """The share of a picture that has colours."""
    pixels = np.asarray(picture, dtype=float)
    return float((pixels.max(axis=2) - pixels.min(axis=2) > 12).mean())


def saved(page: Any, button: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name=button).locator("visible=true").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def set_keep(page: Any, share: float | int) -> None:
    number = page.get_by_label("a share, or a number of tokens").locator("visible=true")
    number.fill(str(share))
    number.press("Tab")
    k = Budget(keep=share).resolve(TOKENS)
    page.locator(f".vtp .count:visible:has-text('{k} of {TOKENS}')").wait_for()


def test_a_visit(browsing: Any, page: Any, tmp_path: Path) -> None:
    """Upload, ask, move the slider, click a patch, read the numbers, look closer, save."""
    picture = next(one for one in examples() if one.name == "scene 1")
    picture.source.save(tmp_path / "scene.png")
    browsing.upload(page, str(tmp_path / "scene.png"))
    browsing.wait_for_media(page, "scene.png")
    page.get_by_label("question").fill(picture.question)
    set_keep(page, 0.11)
    browsing.compare(page)
    assert page.locator("#unpruned").inner_text() == picture.answer
    for place in ("a", "b", "random"):
        assert f"28 of {TOKENS}" in text_of(page, place)
    numbers = page.locator("table.numbers:visible").inner_text()
    assert "random" in text_of(page, "random") and all(word in numbers for word in ("MB", "prefill", "agreement"))
    assert page.locator("#answer-a").inner_text() == picture.answer
    assert re.search(r"vtprune and divprune\s+\d+ %", page.locator("#overlaps").inner_text())
    few = bright(shot(page, ".vtp-random img:visible"))

    set_keep(page, 0.5)
    browsing.compare(page)
    assert bright(shot(page, ".vtp-random img:visible")) > few + 0.1

    board = page.locator(".vtp-board img:visible")
    box = board.bounding_box()
    before = browsing.turn_of(page)
    board.click(position={"x": box["width"] * 1.5 / 16, "y": box["height"] * 2.5 / 16})
    browsing.wait_for_turn(page, before + 1)
    page.get_by_label("by the stage that took them").check()
    page.locator(".vtp-a:has-text('forced in by hand')").wait_for()
    stored = saved(page, "Save a page (HTML)", tmp_path).read_text("utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', stored, re.S)[1])
    assert data["forced_in"] == [2 * 16 + 1]
    assert all(33 in pane["report"]["segments"][0]["keep"] for pane in data["panes"])
    for _ in range(2):
        assert Image.open(saved(page, "Save a picture (PNG)", tmp_path)).width > 500


def test_what_cannot_be_shown_is_told_and_the_page_goes_on(browsing: Any, page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    browsing.upload(page, str(tmp_path / "notes.png"))
    page.get_by_text("notes.png is no picture").first.wait_for()
    assert "Traceback" not in page.content()
    page.reload()
    browsing.opened(page)
    browsing.take_example(page, "a picture")
    page.get_by_label("question").fill("  ")
    page.locator(".vtp-ask:visible").click()
    page.get_by_text("the question is empty").first.wait_for()
    page.get_by_label("question").fill("what color is the cross ?")
    browsing.compare(page)
    assert page.locator("#unpruned").inner_text() == "orange"


def test_methods_that_cannot_serve_are_grey_with_the_reason(page: Any) -> None:
    page.get_by_text("What the methods do").locator("visible=true").click()
    row = page.locator("tr.cannot:visible", has_text="quota")
    row.wait_for()
    assert "clip" in row.inner_text()
    page.get_by_label("method", exact=True).locator("visible=true").click()
    offered = "\n".join(page.get_by_role("option").all_inner_texts())
    assert "divprune (before the language model)" in offered and "quota" not in offered


class Gate:
    """Holds panes of some methods until it is opened, so that something is certainly done meanwhile."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self._held: tuple[str, ...] = ()
        self._open = threading.Event()
        self._run = session.run

    def hold(self, *methods: str) -> None:
        self._held = methods
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.ran.append(given[4])
        if given[4] in self._held:
            assert self._open.wait(60)
        return self._run(*given, **named)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(session, "run", gate)
    return gate


def until(page: Any, condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        page.wait_for_timeout(50)


def answering() -> bool:
    return any(thread.name == "vtprune-demo" for thread in threading.enumerate())


def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the model is asked from now on."""
    seen: list[Any] = []
    answer = Host.answer

    def noting(self: Host, ask: Any, *rest: Any) -> Any:
        seen.append(ask)
        return answer(self, ask, *rest)

    monkeypatch.setattr(Host, "answer", noting)
    return seen


def test_a_new_picture_ends_the_answer_about_the_old_one(
    browsing: Any, page: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(monkeypatch)
    gate.hold("vtprune")
    page.locator(".vtp-ask:visible").click()
    until(page, lambda: "vtprune" in gate.ran)
    browsing.take_example(page, "scene 1")
    gate.open()
    until(page, lambda: not answering())
    page.wait_for_timeout(500)
    assert gate.ran == ["identity", "vtprune"], "the pane that was under way is the last of it"
    assert page.locator("#unpruned").count() == 0 and page.locator("#answer-random").count() == 0
    browsing.compare(page)
    own = next(one for one in examples() if one.name == "scene 1")
    assert page.locator("#unpruned").inner_text() == own.answer
    assert [ask.question for ask in seen][-1] == own.question
    assert np.array_equal(np.asarray(seen[-1].media.pictures[0]), np.asarray(own.source))


def test_clicks_while_an_answer_is_under_way_are_not_lost(
    browsing: Any, page: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(monkeypatch)
    board = page.locator(".vtp-board img:visible")
    box = board.bounding_box()
    before = browsing.turn_of(page)
    gate.hold("identity", "vtprune", "divprune", "random")
    cells = range(1, 14, 2)
    for number, cell in enumerate(cells, start=1):
        board.click(position={"x": box["width"] * (cell + 0.5) / 16, "y": box["height"] * (cell + 0.5) / 16})
        page.get_by_role("button", name=f"let all {number} go").wait_for()
        # The picture is another one now: before it is there a click means no place in it.
        page.wait_for_function("() => [...document.querySelectorAll('.vtp-board img')].every(one => one.complete)")
    gate.open()
    browsing.wait_for_turn(page, before + len(cells))
    assert seen[-1].forced_in == tuple(17 * cell for cell in cells)
    until(page, lambda: not answering())
    assert len(gate.ran) <= len(cells) + 4, "answers that nobody waits for end with their pane"
    page.locator(".vtp-random:has-text('64 of 256')").wait_for()


def test_what_cannot_be_done_ends_no_answer(browsing: Any, page: Any, gate: Gate, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    browsing.take_example(page, "scene 1")
    before = browsing.turn_of(page)
    gate.hold("vtprune")
    page.locator(".vtp-ask:visible").click()
    until(page, lambda: "vtprune" in gate.ran)
    page.locator(".vtp-board img:visible").click()
    page.get_by_text("compare first, then click").wait_for()
    browsing.upload(page, str(tmp_path / "notes.png"))
    page.get_by_text("notes.png is no picture").wait_for()
    gate.open()
    browsing.wait_for_turn(page, before + 1)
    own = next(one for one in examples() if one.name == "scene 1")
    assert page.locator("#answer-random").count() == 1 and page.locator("#unpruned").inner_text() == own.answer


def test_what_is_looked_at_may_change_while_an_answer_comes(browsing: Any, page: Any, gate: Gate) -> None:
    set_keep(page, 0.5)
    before = browsing.turn_of(page)
    gate.hold("divprune")
    page.locator(".vtp-ask:visible").click()
    page.locator(f".vtp-a:has-text('128 of {TOKENS}')").wait_for()
    page.get_by_label("by the stage that took them").check()
    set_keep(page, 0.25)
    gate.open()
    browsing.wait_for_turn(page, before + 1)
    assert all(f"128 of {TOKENS}" in text_of(page, place) for place in ("a", "b", "random"))
    page.locator(".vtp-b:has-text('k-center')").wait_for()
    assert "64 of 256" in page.locator(".vtp .count:visible").inner_text(), "the slider says what is asked for next"


def test_what_was_changed_since_the_answer_is_told(browsing: Any, page: Any) -> None:
    told = page.get_by_text("what is asked was changed")
    assert told.count() == 0
    set_keep(page, 0.5)
    told.wait_for()
    page.get_by_label("by the stage that took them").check()
    page.locator(".vtp-b:has-text('k-center')").wait_for()
    assert told.count() == 1
    number = page.get_by_label("a share, or a number of tokens").locator("visible=true")
    number.fill("")
    number.press("Tab")
    page.get_by_text("keep: expected a share").wait_for()
    page.locator(".vtp-board img:visible").click()
    page.get_by_role("button", name="let all 1 go").wait_for()
    set_keep(page, 0.5)
    page.get_by_text("keep: expected a share").wait_for(state="detached")
    page.get_by_label("kept patches", exact=True).check()
    page.locator(".vtp-b:has-text('k-center')").wait_for(state="detached")
    browsing.compare(page)
    assert told.count() == 0
    set_keep(page, 40)
    page.locator(".vtp .count:visible:has-text('40 of 256')").wait_for()
    browsing.compare(page)
    assert f"40 of {TOKENS}" in text_of(page, "a")


def test_shots_of_the_camera() -> None:
    """One that was thrown away changes nothing, one that is none is told as any other picture."""
    import gradio as gr

    from vtprune.demo.app_tab import Tab

    tab, seat = Tab(Host.load("tiny:llava", "cpu")), Seat()
    with gr.Blocks() as blocks:
        tab.lay_out(blocks.load)
    chosen = (seat, "vtprune", "divprune", 0.25)
    assert tab._take_shot(None, *chosen) == gr.skip() and seat.turn == 0
    tab._take_shot(Image.new("RGB", (64, 48), "red"), *chosen)
    assert seat.visit.media is not None and seat.visit.media.size == (64, 48)
    told = tab._take_shot(Image.new("1", (30_000, 30_000)), *chosen)
    assert "million pixels" in told[tab.message] and seat.visit.media.size == (64, 48)


def test_two_visitors_do_not_see_each_other(browsing: Any, chromium: Any, page: Any, address: str) -> None:
    other = browsing.visit(chromium, address)
    browsing.take_example(page, "a picture")
    browsing.take_example(other, "scene 1")
    before = {visitor: browsing.turn_of(visitor) for visitor in (page, other)}
    for visitor in before:
        visitor.locator(".vtp-ask:visible").click()
    for visitor, turn in before.items():
        browsing.wait_for_turn(visitor, turn + 1)
    answers = {one.name: one.answer for one in examples()}
    assert page.locator("#unpruned").inner_text() == answers["a picture"]
    assert other.locator("#unpruned").inner_text() == answers["scene 1"]


def test_photos_need_no_question(browsing: Any, page: Any) -> None:
    page.get_by_role("tab", name="Photos").click()
    browsing.take_example(page, "scene")
    browsing.compare(page)
    assert f"64 of {TOKENS}" in text_of(page, "a")
    assert page.locator("#unpruned:visible").count() == 0
