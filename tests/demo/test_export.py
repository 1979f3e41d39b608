"""Files to keep: a page that is whole by itself, and a picture."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.demo.common import ask, clip, host, kept, picture
from vtprune.demo.export import every_pane, rows_of, to_dict, to_html, to_png
from vtprune.demo.panes import Outcome, Pane

_VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements that are open, the links of the page, its text and the content of the element "data"."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.data = ""
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data += data
        else:
            self.words += data


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return host().answer(ask(methods=("visionzip", "pyramiddrop"), keep=0.11, forced_in=(5,)))


def test_the_page_is_whole_and_asks_for_nothing(outcome: Outcome) -> None:
    page = Page(to_html(outcome))
    assert page.open == [] and page.tags.count("section") == 4
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    outside = to_html(outcome)
    for link in page.links:
        outside = outside.replace(link, "")
    assert "http" not in outside and "@import" not in outside and "url(" not in outside
    assert page.tags.count("script") == 1 and "link" not in page.tags


def test_the_page_holds_the_same_indices(outcome: Outcome) -> None:
    data = json.loads(Page(to_html(outcome)).data)
    assert data == json.loads(json.dumps(to_dict(outcome)))
    for stored, pane in zip(data["panes"], every_pane(outcome), strict=True):
        if pane.report is None:
            assert stored["report"] is None and stored["error"] == pane.error != ""
        else:
            assert [one["keep"] for one in stored["report"]["segments"]] == kept(pane.report)
    assert [pane["method"] for pane in data["panes"]] == ["identity", "visionzip", "pyramiddrop", "random"]
    assert data["forced_in"] == [5] and data["question"] == outcome.ask.question


def test_the_page_shows_the_pictures(outcome: Outcome) -> None:
    page = Page(to_html(outcome))
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))).tobytes() for link in page.links
    ]
    for pane in every_pane(outcome):
        for drawn in pane.pictures.values():
            assert np.asarray(drawn).tobytes() in shown


def test_errors_numbers_and_papers_are_told(outcome: Outcome) -> None:
    words = Page(to_html(outcome)).words
    assert "reaches 0.25 to 1" in words and "arXiv 2412.04467" in words and "28 of 256" in words
    assert "merged into them" in words and "visionzip and random" in words


@pytest.mark.parametrize("question", ["<script>alert(1)</script>", '</script><img src="http://a.b/c">', "a & b < c"])
def test_whatever_is_asked_is_text(question: str, outcome: Outcome) -> None:
    page = to_html(host().answer(ask(question=question)))
    plain = to_html(outcome)
    assert "<script>" not in page and page.count("<script") == plain.count("<script") == 1
    parsed = Page(page)
    assert question in parsed.words and json.loads(parsed.data)["question"] == question
    assert all(link.startswith("data:") for link in parsed.links)


def test_answers_and_errors_are_text_too() -> None:
    bad = "<b onclick=x>'\"&"
    pane = Pane(method=bad, line=bad, paper=bad, answer=bad, notes=(bad,), missing={"scores": bad}, error=bad)
    parsed = Page(to_html(Outcome(ask=ask(), model=bad, panes=(pane,), notes=(bad,))))
    assert "b" not in parsed.tags and parsed.words.count(bad) == 9
    assert json.loads(parsed.data)["panes"][0]["answer"] == bad


def test_the_picture_is_a_sheet_of_all_panes(outcome: Outcome) -> None:
    image = Image.open(io.BytesIO(to_png(outcome)))
    assert image.format == "PNG" and image.width > 4 * outcome.panes[0].pictures["kept"].width
    assert image.height > outcome.panes[0].pictures["kept"].height


def test_of_a_clip_the_frames_are_put_below_each_other() -> None:
    found = host("qwen2_5_vl").answer(ask(media=clip()))
    image = Image.open(io.BytesIO(to_png(found)))
    assert image.height > sum(pane.pictures["strip"].height for pane in every_pane(found))


def test_rows_say_what_is_known(outcome: Outcome) -> None:
    rows: dict[str, Any] = dict(rows_of(outcome.panes[0]))
    assert rows["visual tokens kept"] == "28 of 256" and rows["KV cache"].endswith("of 2.19 MB")
    assert rows_of(outcome.panes[1]) == []
    unpruned = dict(rows_of(every_pane(outcome)[0]))
    assert "agreement" not in unpruned and unpruned["coverage (kept or beside)"] == "100 %"


def test_what_has_no_language_model_is_exported_as_well() -> None:
    seen = host().answer(ask()).panes[0]
    pane = Pane(method="vtprune", pictures=seen.pictures, report=seen.report)
    alone = Outcome(ask=ask(question=""), model="a tower", panes=(pane,))
    assert Page(to_html(alone)).tags.count("section") == 1 and to_png(alone)
    assert to_dict(alone)["panes"][0]["answer"] is None and alone.segment is not None
    assert picture().name in json.dumps(to_dict(alone))
