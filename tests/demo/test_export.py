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

import vtprune
from tests.demo.common import ask, clip, host, kept, picture
from vtprune.demo import export
from vtprune.demo.export import asked_line, every_pane, keys_html, rows_of, to_dict, to_html, to_png
from vtprune.demo.panes import VIEWS, Numbers, Outcome, Pane
from vtprune.viz import sheet

_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements that are open, the links of the page, its text and the content of the element "data"."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.data = ""
        self.words = ""
        self.names: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
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


class Rows(HTMLParser):
    """The words of the cells of the table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return host().answer(ask(methods=("visionzip", "pyramiddrop"), keep=0.11, forced_in=(5,)))


def test_the_page_is_whole_and_asks_for_nothing(outcome: Outcome) -> None:
    page = Page(to_html(outcome))
    assert page.open == [] and page.tags.count("table") == 1
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


def test_a_table_comes_first_with_a_column_for_every_pane(outcome: Outcome) -> None:
    table = Rows(to_html(outcome)).rows
    panes = every_pane(outcome)
    assert table[0] == ["", "all tokens", "visionzip", "pyramiddrop", "random"]
    assert table[1][0] == "answer" and panes[1].answer is not None
    assert table[1][1] == panes[0].answer and table[1][2].startswith(panes[1].answer)
    assert table[1][2].endswith("same as all tokens" if panes[1].same else "another answer")
    told = {row[0]: row[1:] for row in table[2:]}
    assert len(told) == len(table) - 2 and all(len(row) == 5 for row in table)
    for number, pane in enumerate(panes):
        assert {name: cells[number] for name, cells in told.items() if cells[number]} == dict(rows_of(pane))


def test_rows_of_several_panes_keep_their_order(outcome: Outcome) -> None:
    names = [row[0] for row in Rows(to_html(outcome)).rows[2:]]
    for pane in every_pane(outcome):
        places = [names.index(name) for name, _ in rows_of(pane)]
        assert places == sorted(places)


def test_every_view_has_a_row_of_all_panes(outcome: Outcome) -> None:
    page = to_html(outcome)
    sections = [Page(part.partition("</section>")[0]) for part in page.split("<section>")[1:]]
    shown = [view for view in VIEWS if any(view in pane.pictures for pane in every_pane(outcome))]
    assert len(sections) == len(shown) + 1
    for view, section in zip(shown, sections, strict=False):
        assert section.words.startswith(VIEWS[view]) and section.tags.count("figure") == 4
        assert section.tags.count("img") == sum(view in pane.pictures for pane in every_pane(outcome))
    assert page.count("--count: 4") == len(sections) and "prefers-color-scheme: dark" in page
    assert "one picture, and no frames" in Page(page).words


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "keep 0.25, seed 0"),
        ({"keep": 32, "seed": 3, "debias": True, "debiaser": "sinks"}, "keep 32, seed 3, debiased: sinks"),
        ({"forced_in": (1,)}, "keep 0.25, seed 0, 1 patch forced in by hand"),
        ({"forced_out": (1, 2)}, "keep 0.25, seed 0, 2 patches forced out by hand"),
        ({"forced_in": (9,), "forced_out": (1, 2)}, "keep 0.25, seed 0, 1 patch forced in, 2 forced out by hand"),
    ],
)
def test_what_was_asked_is_told_in_a_line(options: dict[str, Any], told: str) -> None:
    asked = ask(**options)
    assert asked_line(asked) == told
    outcome = Outcome(ask=asked, model="tiny:<llava>", panes=())
    assert asked_line(outcome) == f"tiny:<llava>, {told}"
    words = Page(to_html(outcome)).words
    assert f"tiny:<llava>, {told}; vtprune {vtprune.__version__}" in words


def test_the_sheet_names_what_was_asked(monkeypatch: pytest.MonkeyPatch, outcome: Outcome) -> None:
    titles = []
    monkeypatch.setattr(
        export, "sheet", lambda *given, **named: titles.append(named["title"]) or sheet(*given, **named)
    )
    to_png(outcome)
    assert titles[0].split("\n") == [
        outcome.ask.question,
        f"tiny:llava, keep 0.11, seed 0, 1 patch forced in by hand; vtprune {vtprune.__version__}",
        "two frames: forced in",
    ]


def test_marks_are_named_below_the_pictures_that_have_them() -> None:
    outcome = host().answer(ask(forced_in=(5,), forced_out=(9,)))
    for view, there in (("kept", True), ("stages", True), ("scores", False), ("groups", False)):
        words = Page(keys_html(outcome.panes[0], view)).words
        assert ("forced in by hand" in words and "forced out by hand" in words) == there, view
    assert "mmr" in keys_html(outcome.panes[0]) and "mmr" not in keys_html(outcome.panes[0], "kept")
    styles = [part.split('"')[0] for part in keys_html(outcome.panes[0], "kept").split('class="key" style="')[1:]]
    assert len(styles) == len(set(styles)) == 2
    assert outcome.unpruned is not None and keys_html(outcome.unpruned, "kept") == ""


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
    known = {"method": bad, "line": bad, "paper": bad, "notes": (bad,), "missing": {"scores": bad}}
    panes = (Pane(**known, answer=bad), Pane(**known, error=bad))  # type: ignore[arg-type]
    parsed = Page(to_html(Outcome(ask=ask(), model=bad, panes=panes, notes=(bad,))))
    assert "b" not in parsed.tags[: parsed.tags.index("section")] and "onclick" not in parsed.names
    assert Rows(to_html(Outcome(ask=ask(), model=bad, panes=panes))).rows == [["", bad, bad], ["answer", bad, bad]]
    assert parsed.words.count(bad) == 2 + 4 + 1 + 8, "model, note; table; reason; what the methods do"
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
    assert rows["prompt length"] == "267 -> 39" and "all together" not in rows
    assert rows_of(outcome.panes[1]) == []
    unpruned = dict(rows_of(every_pane(outcome)[0]))
    assert "agreement" not in unpruned and unpruned["coverage (kept or beside)"] == "100 %"
    assert unpruned["prompt length"] == "267"


def numbers(**given: Any) -> Numbers:
    known = {"tokens": 256, "kept": 64, "average": 64, "merged": 0, "separators": 0, "prompt": 75, "prompt_whole": 267}
    costs = {"prompt_average": 75, "cached": False, "kv_bytes": 610_000, "kv_bytes_whole": 2_190_000, "coverage": None}
    return Numbers(**{**known, **costs, **given})


def test_of_cuts_between_layers_the_average_comes_first() -> None:
    deep = numbers(kept=41, average=128.2, prompt=52, prompt_average=139.2)
    assert rows_of(Pane(method="m", numbers=deep))[:3] == [
        ("visual tokens kept", "128 of 256 on average over layers"),
        ("behind the last cut", "41 of 256"),
        ("prompt length", "267 -> 52 (139 on average over layers)"),
    ]
    cached = numbers(kept=256, average=114.5, prompt=267, prompt_average=267, cached=True)
    assert rows_of(Pane(method="m", numbers=cached))[:3] == [
        ("visual tokens kept", "114 of 256 on average in the cache of a layer"),
        ("passing all layers", "256 of 256"),
        ("prompt length", "267"),
    ]


def test_lengths_on_average_are_those_of_the_layers() -> None:
    pane = host().answer(ask(methods=("pyramiddrop", "zipvl"), keep=0.5)).panes[0]
    assert pane.report is not None and pane.numbers is not None
    lengths = 267 - 256 + pane.report.segments[0].depths.sum().item() / pane.report.layers
    assert (
        pane.numbers.prompt_average == pytest.approx(lengths) and pane.numbers.prompt == 267 - 256 + pane.numbers.kept
    )


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.0004, "0.4 ms"), (0.00994, "9.9 ms"), (0.00996, "10 ms"), (0.0424, "42 ms"), (3.2, "3200 ms")],
)
def test_milliseconds_are_whole_from_ten_on(seconds: float, told: str) -> None:
    assert dict(rows_of(Pane(method="m", numbers=numbers(seconds={"encode": seconds}))))["encode"] == told


def test_what_is_scored_beforehand_counts_in_the_last_row() -> None:
    rows = rows_of(Pane(method="m", numbers=numbers(seconds={"score": 3.0, "encode": 0.1, "total": 0.5})))
    assert rows[-2:] == [("all of generate", "500 ms"), ("all together", "3500 ms")]
    assert rows_of(Pane(method="m", numbers=numbers(seconds={"total": 0.5})))[-1] == ("all of generate", "500 ms")


def test_what_has_no_language_model_is_exported_as_well() -> None:
    seen = host().answer(ask()).panes[0]
    pane = Pane(method="vtprune", pictures=seen.pictures, report=seen.report)
    alone = Outcome(ask=ask(question=""), model="a tower", panes=(pane,))
    assert "--count: 1" in to_html(alone) and to_png(alone)
    assert Rows(to_html(alone)).rows == [["", "vtprune"]], "nobody answered"
    assert to_dict(alone)["panes"][0]["answer"] is None and alone.segment is not None
    assert picture().name in json.dumps(to_dict(alone))
