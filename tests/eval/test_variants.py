"""Second rows of methods: with a debiaser, with a calibration, called after both."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.eval.common import llava
from tests.test_calibration import SETTINGS, made
from vtprune import _console
from vtprune.catalog import build
from vtprune.cli import main
from vtprune.debiasing import debiased
from vtprune.errors import InvalidOption
from vtprune.eval.arms import OWN, WHOLE, plan, readings
from vtprune.eval.questions import draw_items
from vtprune.eval.runner import evaluate
from vtprune.eval.store import Store
from vtprune.eval.subject import Subject
from vtprune.eval.variants import Variants

ITEMS = draw_items("test", 0, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A calibration of the small model, with settings for two averages."""
    file = tmp_path / "mine.json"
    known = made(llava().model, depth=2, horizon=1, settings=SETTINGS, trends=(), inflections=())
    known.write(file)
    return file


def rows(*methods: str, **options: object) -> list[str]:
    """Names of the rows of a plan, without those that every plan has."""
    steps = plan(methods, [0.5], Variants(**options))
    return [name for name, _ in steps if name not in OWN and name not in WHOLE]


def test_methods_that_take_something_come_twice(path: Path) -> None:
    methods = ("fastv", "divprune", "fastervlm", "vflowopt", "tome")
    assert rows(*methods) == list(methods)
    assert rows(*methods, debias="recency") == [
        *(
            "fastv",
            "fastv+recency",
            "divprune",
            "fastervlm",
            "fastervlm+recency",
            "vflowopt",
            "vflowopt+recency",
            "tome",
        )
    ]
    assert rows(*methods, calibration=path) == [*methods[:4], "vflowopt+calibrated", "tome"]
    assert rows(*methods, debias="recency", calibration=path) == [
        *("fastv", "fastv+recency+calibrated", "divprune", "fastervlm", "fastervlm+recency"),
        *("vflowopt", "vflowopt+recency+calibrated", "tome"),
    ]
    assert rows("fastv", "fastervlm", debias="sinks") == ["fastv", "fastv+sinks", "fastervlm", "fastervlm+sinks"]
    assert rows("fastv", "fastervlm", debias="trend") == ["fastv", "fastervlm", "fastervlm+trend"], "holes in the grid"
    assert "vflowopt+calibrated" in [name for name, _ in plan(None, [0.5], Variants(calibration=path))]


def test_options_that_no_method_takes_are_refused(path: Path) -> None:
    with pytest.raises(InvalidOption, match="--debias sinks: none of these methods takes it: divprune, tome"):
        rows("divprune", "tome", debias="sinks")
    with pytest.raises(InvalidOption, match=r"--calibration .*mine.json: none of these methods takes it: fastv"):
        rows("fastv", debias="sinks", calibration=path)
    with pytest.raises(InvalidOption, match="vtprune calibrate"):
        rows("fastv", calibration=path.with_name("none.json"))


def test_names_stand_for_what_wrap_is_given(path: Path) -> None:
    known = Variants(debias="recency", calibration=path)
    assert known.pipeline("fastv", 0.5) == build("fastv")
    assert known.pipeline("fastv+recency+calibrated", 0.5) == debiased(build("fastv"), True)
    near, far = (build("vflowopt", setting.parameters) for setting in SETTINGS)
    assert known.pipeline("vflowopt+recency+calibrated", 0.6) == debiased(near, True)
    assert known.pipeline("vflowopt+calibrated", 0.1) == far
    assert known.asked("fastv") == ("fastv", {"debias": None, "calibration": None})
    assert known.asked("fastv+recency") == ("fastv", {"debias": "recency", "calibration": None})
    assert known.asked("vflowopt+recency+calibrated") == ("vflowopt", {"debias": "recency", "calibration": path})
    read = readings([("vflowopt", 0.5), ("vflowopt+calibrated", 0.6), ("vflowopt+calibrated", 0.1)], known)
    assert {f"sink_attention(threshold={one})" for one in ("34.76", "5", "7")} <= read.keys()


def test_rows_are_answered_and_another_calibration_is_not_taken_for_this(path: Path, tmp_path: Path) -> None:
    known = Variants(debias="recency", calibration=path)
    subject = Subject(model=llava().model, processor=llava().processor, variants=known)
    steps = plan(["vflowopt"], [0.75], known)
    store = tmp_path / "answers.jsonl"
    found = {one.method: one for one in evaluate(subject, ITEMS, steps, store=Store(store, {}))}
    calibrated = found["vflowopt+recency+calibrated"]
    assert len(calibrated.words) == len(ITEMS) and not calibrated.note
    assert set(calibrated.kept) == set(found["vflowopt"].kept) == {12}
    again = evaluate(subject, ITEMS, steps, store=Store(store, {}))
    assert [one.words for one in again] == [one.words for one in found.values()]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(InvalidOption, match="another version of 'vflowopt\\+recency\\+calibrated'"):
        evaluate(subject, ITEMS, steps, store=Store(store, {}))


def test_the_command(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_console, "load_model", lambda source, device: (llava().model, llava().processor))
    table, page = tmp_path / "out.csv", tmp_path / "out.md"
    asked = ["--methods", "vflowopt", "fastervlm", "--keep", "0.75", "--calibration", str(path), "--debias", "sinks"]
    assert main(["eval", "--samples", "1", *asked, "--csv", str(table), "--markdown", str(page)]) == 0
    assert {"vflowopt+sinks+calibrated", "fastervlm+sinks"} <= {row["method"] for row in csv.DictReader(table.open())}
    assert "`method+calibrated`: with what `vtprune calibrate` measured" in page.read_text(encoding="utf-8")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--debias", "sink"], "--debias sink: expected one of recency"),
        (["--debias", "sinks", "--methods", "divprune"], "none of these methods takes it"),
        (["--calibration", ""], "--calibration is empty"),
        (["--calibration", "none.json"], "cannot be read"),
        (["--calibration", "a.csv", "--csv", "./a.csv"], "this is the file of --calibration"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.setattr(_console, "load_model", lambda *_: pytest.fail("loaded"))
    assert main(["eval", *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
