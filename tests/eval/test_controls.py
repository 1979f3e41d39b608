"""Chance at the cuts of methods that cut between layers: where, how many, drawn how, and what the table makes of it."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval.common import batch_of, bundled, llava
from tests.eval.test_clips import FEW as CLIPS
from tests.eval.test_clips import subject as clips
from tests.eval.test_table import FACTS, ITEMS, RESULTS, result
from vtprune import _console
from vtprune.catalog import build, list_methods
from vtprune.cli import main
from vtprune.errors import InvalidOption
from vtprune.eval import subject as subjects
from vtprune.eval.arms import OWN, WHOLE, plan
from vtprune.eval.controls import CHANCE, Control, controlled, controls, is_control
from vtprune.eval.markdown import as_markdown, in_order, without_a_number
from vtprune.eval.plot import draw_plot
from vtprune.eval.questions import draw_items
from vtprune.eval.runner import Result, evaluate
from vtprune.eval.store import Store
from vtprune.eval.subject import Subject
from vtprune.eval.table import tabulate
from vtprune.methods import METHODS
from vtprune.runtime.evidence import readings_of
from vtprune.stages.scorers import Given

SCENES = draw_items("test", 0, 3)
FEW = (*SCENES[:2], *SCENES[-2:])
NAMES = {
    "fastv": "random@1",
    "pyramiddrop": "random@2,4,6",
    "sparsevlm_plus": "random@1,2,4",
    "adaptinfer": "random@1,3,5",
    "atp": "random@1,4,6",
    "information_horizon": "random@0,4",
    "vflowopt": "random@0,3,5",
    "todre": "random@0,7",
}
"""On eight layers, counted by hand from the published shares of the depth."""
DEEP = list(NAMES)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods there are: names depend on whether others cut in front of the same layers."""
    names = [*DEEP, "divprune", "tome"]
    monkeypatch.setattr("vtprune.eval.controls.list_methods", lambda: names)
    return names


def eight() -> dict[str, Control]:
    return controls(bundled().base, DEEP)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Reports of every answer of a subject for which anything was cut between layers."""
    seen: list[Any] = []
    original = subjects.pruning

    @contextmanager
    def pruning(*args: Any, **options: Any) -> Iterator[Any]:
        with original(*args, **options) as pruner:
            yield pruner
            seen.extend(pruner.history if pruner.pipeline.inside else ())

    with monkeypatch.context() as patch:
        patch.setattr(subjects, "pruning", pruning)
        yield seen


def test_they_are_named_after_the_layers_that_are_cut() -> None:
    found = {name: control.name for name, control in eight().items()}
    assert found == NAMES
    assert all(map(is_control, found.values())) and not any(map(is_control, list_methods()))
    assert not controls(bundled().base, ["divprune", "tome"])
    assert controls(bundled().base, ["atp"])["atp"] == eight()["atp"]


@pytest.mark.parametrize("keep", [0.5, 0.33])
@pytest.mark.parametrize("method", NAMES)
def test_as_many_tokens_go_as_far_as_with_the_method(method: str, keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(bundled(), FEW)
    batch = dataclasses.replace(batch, readings=readings_of(build(method)))
    with watched(monkeypatch) as reports:
        own, chance = batch.answer(method, keep), eight()[method](batch, keep)
    by_method, by_chance = ([one.depths for one in report.segments] for report in reports)
    assert len(by_chance) == len(FEW)
    for first, other in zip(by_method, by_chance):
        assert not torch.equal(first, other)
        if method != "todre":  # its exit depends on what is left
            assert torch.equal(first.sort().values, other.sort().values)
    if method != "todre":
        assert own.kept == chance.kept and chance.tokens is None


def test_each_cut_keeps_the_highest_of_a_draw_of_every_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, control = batch_of(bundled(), FEW), eight()["pyramiddrop"]
    with watched(monkeypatch) as reports:
        control(batch, 0.33)
    depths = [segment.depths for segment in reports[0].segments]
    for item, own in zip(FEW, depths):
        drawn = torch.rand(256, generator=torch.Generator().manual_seed(item.seed))
        for layer in (2, 4, 6):
            left = int((own > layer).sum())
            assert 0 < left < 256
            assert set(drawn.topk(left).indices.tolist()) == set((own > layer).nonzero()[:, 0].tolist())
    assert torch.equal(depths[0], depths[1]), "two questions about one scene"
    assert not torch.equal(depths[0], depths[2])


def test_a_scene_is_drawn_alike_in_every_batch() -> None:
    control = eight()["vflowopt"]
    together = control(batch_of(bundled(), FEW), 0.11)
    alone = [control(batch_of(bundled(), [item]), 0.11) for item in FEW]
    assert together.words == tuple(one.words[0] for one in alone)


def test_methods_that_cut_alike_share_one(monkeypatch: pytest.MonkeyPatch, known: list[str]) -> None:
    """Alike is what leaves as many at every budget: where ratios of logarithms agree, whatever the published shares."""
    pyramid = build("pyramiddrop")
    steeper = [dataclasses.replace(stage, keep=stage.keep**2) for stage in pyramid.inside]
    other = [dataclasses.replace(stage, keep=keep) for stage, keep in zip(pyramid.inside, (0.5, 0.5, 0.1))]
    leaves = [dataclasses.replace(stage, counter=stage_of_todre().counter) for stage in pyramid.inside]
    for name, inside in (("steeper", steeper), ("other", other), ("leaves", leaves)):
        made = dataclasses.replace(pyramid, name=name, inside=tuple(inside))
        monkeypatch.setitem(METHODS, name, lambda made=made: made)
        known.append(name)
        if name == "steeper":
            assert controls(bundled().base, ["steeper"])["steeper"] == eight()["pyramiddrop"]
    found = {name: one.name for name, one in controls(bundled().base, known).items()}
    assert found["pyramiddrop"] == found["steeper"] == "random@2,4,6 (0.5, 0.25, 0.125)"
    assert found["other"] == "random@2,4,6 (0.5, 0.5, 0.1)"
    assert found["leaves"] == "random@2,4,6 (0.5, 0.25, 0.125 or none)"
    assert found["fastv"] == "random@1"


def stage_of_todre() -> Any:
    return build("todre").inside[0]


def test_a_rule_for_exits_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = eight()["todre"].pipeline
    assert pipeline.inside[0].counter == stage_of_todre().counter
    assert {pick.scorer for pick in pipeline.all_picks} == {Given(name=CHANCE)}
    always = build("todre", {"below": 1.0})
    monkeypatch.setitem(METHODS, "todre", lambda: always)
    with watched(monkeypatch) as reports:
        eight()["todre"](batch_of(bundled(), FEW), 0.5)
    assert {int(depth) for segment in reports[0].segments for depth in segment.depths} == {0, 7}


def test_a_model_that_cannot_be_cut_between_layers_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava().model
    monkeypatch.setattr(model.config.text_config, "_attn_implementation", "flex_attention")
    assert controls(llava().base, DEEP) == {}


def test_the_plan_has_them_in_front_of_the_arms_of_all() -> None:
    known = eight()
    steps = controlled(plan(["fastv", "divprune", "pyramiddrop"], [0.5, 1, 1.0]), known)
    names = list(dict.fromkeys(name for name, _ in steps))
    assert names == [*WHOLE, "fastv", "divprune", "pyramiddrop", "random@1", "random@2,4,6", *OWN]
    assert [str(keep) for name, keep in steps if name == "random@1"] == ["0.5", "1", "1.0"]
    assert controlled(plan(["divprune"], [0.5]), known) == plan(["divprune"], [0.5])


def run(methods: list[str], store: Store | None = None, keep: Any = (0.8, 0.1), items: Any = SCENES) -> list[Result]:
    """Two layers: all that cut behind a share of the depth only do so in front of layer 1."""
    return evaluate(llava(), items, plan(methods, keep), batch=9, store=store)


def test_a_run_has_them_by_default_and_says_what_is_out_of_reach() -> None:
    found = {(one.method, one.keep): one for one in run(["fastv", "pyramiddrop", "information_horizon", "divprune"])}
    assert found["fastv", 0.8].control == found["pyramiddrop", 0.8].control == "random@1"
    early = found["information_horizon", 0.8].control
    assert early == "random@0,1 (0.5, 0.25)", "others cut there in another way"
    assert found["divprune", 0.8].control == found["random@1", 0.8].control == ""
    for name, keep in (("fastv", 0.8), ("random@1", 0.8), (early, 0.8), (early, 0.1)):
        one = found[name, keep]
        assert len(one.words) == len(one.kept) == len(SCENES) and not one.note
        assert abs(one.kept[0] - keep * 16) <= 0.5 and set(one.recall) == {None}
    low = found["fastv", 0.1]
    assert (low.note, low.words) == ("not possible, reaches 0.5 to 1", [])
    assert "keep=0.1 is the average over 2 decoder layers" in low.reason
    assert ("random@1", 0.1) not in found


def test_clips_have_them_too() -> None:
    found = {one.method: one for one in evaluate(clips(), CLIPS, plan(["fastv"], [0.6]))}
    assert found["fastv"].control == "random@1" and not found["random@1"].note
    assert found["fastv"].kept == found["random@1"].kept and len(found["random@1"].words) == len(CLIPS)


def test_a_number_that_is_out_of_reach_is_told_alike() -> None:
    found = {(one.method, one.keep): one for one in run(["fastv"], keep=[2, 12], items=SCENES[:2])}
    assert found["fastv", 2].note == "not possible, reaches 0.5 to 1" and ("random@1", 2) not in found
    assert found["fastv", 12].kept == found["random@1", 12].kept == [12, 12]


def test_what_is_refused_for_another_reason_keeps_its_note() -> None:
    subject = dataclasses.replace(llava(), positions="compact")
    found = evaluate(subject, SCENES[:2], plan(["fastv"], [0.8, 0.1]))
    assert {(one.method, one.note) for one in found if one.note} == {
        ("fastv", "not possible"),
        ("fastv", "not possible, reaches 0.5 to 1"),
        ("random@1", "not possible"),
    }
    assert any("positions='compact'" in one.reason for one in found)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And another method with the same cuts finds the answers of chance that are there."""
    path, asked = tmp_path / "answers.jsonl", []
    first = run(["fastv", "information_horizon"], Store(path, {}), keep=[0.8])
    original = Subject.answer
    monkeypatch.setattr(Subject, "answer", lambda *a, **k: asked.append(a[2]) or original(*a, **k))
    assert run(["fastv", "information_horizon"], Store(path, {}), keep=[0.8]) == first
    assert asked == []
    more = run(["pyramiddrop", "fastv"], Store(path, {}), keep=[0.8])
    assert set(map(str, asked)) == {"pyramiddrop"}
    assert [one for one in more if one.method == "random@1"] == [one for one in first if one.method == "random@1"]


def test_answers_of_other_cuts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    run(["fastv"], Store(path, {}), keep=[0.8], items=SCENES[:2])
    path.write_text(path.read_text().replace('"name": "random@1"', '"name": "old"'))
    with pytest.raises(InvalidOption, match="another version of 'random@1'"):
        run(["fastv"], Store(path, {}), keep=[0.8], items=SCENES[:2])


CUTS = [
    *RESULTS[:2],
    dataclasses.replace(result("fastv", 0.5, 15), control="random@1"),
    Result(method="fastv", keep=0.1, control="random@1", note="not possible, reaches 0.5 to 1", reason="keep=0.1 is"),
    Result(method="fastv", keep=0.05, control="random@1", note="not possible, reaches 0.5 to 1", reason="keep=0.05 is"),
    result("divprune", 0.5, 15),
    result("divprune", 0.1, 15),
    result("random@1", 0.5, 60, 2),
    result("random", 0.5, 72, 2),
    result("random", 0.1, 72, 2),
]
ROWS = tabulate(CUTS, ITEMS, FACTS, seed=0)


def test_the_table_has_the_paired_difference_to_chance() -> None:
    found = {(row["method"], row["keep"]): row for row in ROWS if row["kind"] == "all"}
    row, n = found["fastv", "0.5"], len(ITEMS)
    assert row["control"] == "random@1" and float(row["minus_control"]) == pytest.approx(45 / n, abs=1e-4)
    assert float(row["minus_random"]) == pytest.approx(57 / n, abs=1e-4)
    assert float(row["minus_control_low"]) < 45 / n < float(row["minus_control_high"])
    assert found["divprune", "0.5"]["minus_control"] == found["fastv", "0.1"]["minus_control"] == ""


def test_the_page_puts_methods_beside_chance_and_what_has_no_number_last() -> None:
    page = as_markdown(ROWS)
    main, beside = page.split("## Cuts between layers, and chance at the same cuts")
    shown = [line.split("|")[1].strip(" `") for line in main.splitlines() if line.startswith("| `")]
    assert shown == ["identity", "blind", "fastv", "divprune", "divprune", "random@1", "random", "random", "fastv"]
    assert "| `fastv` | 0.1, 0.05 |  | not possible, reaches 0.5 to 1 |" in main
    rows = [line for line in beside.split("## Every kind")[0].splitlines() if line.startswith("| `")]
    assert [line.split("|")[1:3] for line in rows] == [[" `fastv` ", " 0.5 "], [" `fastv` ", " 0.1, 0.05 "]]
    assert "| `random@1` |" in rows[0] and "+" in rows[0].split("|")[7]
    assert "not possible, reaches 0.5 to 1 | `random@1` |  |  |" in rows[1]
    kinds = beside.split("## Every kind, keep 0.1\n")[1].split("##")[0]
    assert [line.split("|")[1].strip(" `") for line in kinds.splitlines()[4:-1]][-1] == "fastv"
    assert page.count("keep=0.1 is") == 1 and "keep=0.05 is" not in page
    assert "- `random@` and layers: the same cuts" in page


def test_a_page_of_methods_before_the_language_model_has_nothing_of_it() -> None:
    page = as_markdown(tabulate(RESULTS, ITEMS, FACTS, seed=0))
    assert "Cuts between layers" not in page and "random@" not in page


def test_rows_without_a_number_share_a_line_where_they_share_a_note() -> None:
    rows = [row for row in ROWS if row["kind"] == "all"]
    assert [row["keep"] for row in in_order(rows) if row["note"]] == ["0.1, 0.05"]
    assert len(without_a_number(ROWS)) == 1
    apart = [{**row, "note": row["note"] and "not possible"} for row in ROWS]
    assert [row["reason"] for row in without_a_number(apart)] == ["keep=0.1 is", "keep=0.05 is"]


def test_panels_say_what_has_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    written: list[tuple[float, str]] = []
    original = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: written.append((y, s)) or original(self, x, y, s, **k))
    many = [{**row, "method": f"m{n}"} for n in range(14) for row in ROWS if row["method"] == "divprune"]
    for row in many:
        row["accuracy"] = str(1.0 - int(row["method"][1:]) / 100)
    draw_plot([*ROWS, *many], tmp_path / "plot.png")
    assert set(written) == {(1, "not possible, reaches 0.5 to 1")}, "at the bottom, above chance, which is worse"
    written.clear()
    draw_plot(ROWS, tmp_path / "plot.png")
    assert not written


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_console, "load_model", lambda source, device: (llava().model, llava().processor))
    monkeypatch.setenv("COLUMNS", "200")
    table, page, plot = (tmp_path / f"out.{kind}" for kind in ("csv", "md", "png"))
    arguments = ["eval", "--methods", "fastv", "pyramiddrop", "divprune", "--keep", "0.8", "0.1", "--samples", "2"]
    arguments += ["--csv", str(table), "--markdown", str(page), "--plot", str(plot)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "above chance" in shown and "random@1" in shown and "not possible, reaches 0.5 to 1" in shown
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    kept = {float(row["kept"]) for row in rows if row["method"] == "random@1"}
    assert kept == {float(row["kept"]) for row in rows if row["method"] == "fastv" and row["keep"] == "0.8"}
    text = page.read_text(encoding="utf-8")
    assert "## Cuts between layers, and chance at the same cuts" in text and plot.exists()
    first = table.read_text()
    assert main(arguments) == 0 and table.read_text() == first
    assert main(["eval", "--from-csv", str(table), "--markdown", str(page), "--plot", str(plot)]) == 0
    assert page.read_text(encoding="utf-8") == text
